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
    top: int,
    file: str | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """Print each image's labels and probabilities, of a folder those of all images below it; the number of
    images that could not be read.

    Raises:
        UsageError: the artifact cannot be loaded.
    """
    check_finished(artifact)
    if artifact.suffix.lower() in EXTENSIONS and artifact.is_file():
        raise UsageError(
            f"{artifact} is an image: name the run or its artifact first, then the images, as in "
            f"compress predict RUN {artifact.name}."
        )
    if artifact.is_file() and file is not None:
        raise UsageError(f"--file chooses a file of an artifact; {artifact} is one already.")
    try:
        if artifact.is_file():
            from ...export.conversion.untrusted import read_foreign  # with onnx, which the folders do without

            content, _ = read_foreign(artifact)
            classifier = Classifier(content, artifact.name, threads=threads)
        else:
            classifier = Classifier.load(artifact, file=file, threads=threads)
    except (ArtifactError, ExportError) as error:
        raise UsageError(f"{error}.") from error
    return print_predictions(classifier, images, top=top, as_json=as_json)
