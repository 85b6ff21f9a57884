"""Classify images with a compressed model (`compress predict`)."""

from collections.abc import Sequence
from pathlib import Path

from ...export.errors import ExportError
from ...export.predict_cli import print_predictions
from ...export.runtime import ArtifactError, Classifier
from ..data.sources.folders import EXTENSIONS
from ..errors import UsageError
from ..runs.folder import check_finished


def predict(
    artifact: Path,
    images: Sequence[Path],
    *,
    top: int = 3,
    file: str | None = None,
    threads: int | None = None,
    as_json: bool = False,
) -> int:
    """Print labels and probabilities of each image file, and of the images in each folder.

    Returns:
        The number of unreadable images.

    Raises:
        UsageError: the artifact cannot be loaded.
    """
    check_finished(artifact)
    if artifact.suffix.lower() in EXTENSIONS and artifact.is_file():
        raise UsageError(
            f"{artifact} is an image. The run or artifact comes first: compress predict RUN {artifact.name}."
        )
    if artifact.is_file() and file is not None:
        raise UsageError(f"--file requires a run folder or an artifact folder, got {artifact}.")
    try:
        if artifact.is_file():
            from ...export.conversion.untrusted import read_untrusted  # imports onnx

            content, _ = read_untrusted(artifact)
            classifier = Classifier(content, artifact.name, threads=threads)
        else:
            classifier = Classifier.load(artifact, file=file, threads=threads)
    except (ArtifactError, ExportError) as error:
        raise UsageError(f"{error}.") from error
    return print_predictions(classifier, images, top=top, as_json=as_json)
