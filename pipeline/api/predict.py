"""Classify images, or find objects in them, with a compressed model (`compress predict`)."""

from collections.abc import Sequence
from pathlib import Path

from ...export.errors import ExportError
from ...export.predict_cli import MIN_SCORE, TOP, draw_detections, explain_unsuited, print_predictions
from ...export.runtime import ArtifactError, Detector, ImageError, open_content, open_model
from ..data.sources.folders import EXTENSIONS
from ..errors import JobError, UsageError
from ..runs.folder import check_finished


def predict(
    artifact: Path,
    images: Sequence[Path],
    *,
    top: int | None = None,
    min_score: float | None = None,
    draw: Path | None = None,
    file: str | None = None,
    threads: int | None = None,
    as_json: bool = False,
) -> int:
    """Print labels and probabilities of each image file, and of the images in each folder.

    A classifier prints its ``top`` labels, 3 by default; a detector the objects of at least ``min_score``,
    0.5 by default, and draws those of a single image into ``draw``.

    Returns:
        The number of unreadable images.

    Raises:
        UsageError: the artifact cannot be loaded, or an option does not apply to it.
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
            model = open_content(content, artifact.name, threads=threads)
        else:
            model = open_model(artifact, file=file, threads=threads)
    except (ArtifactError, ExportError) as error:
        raise UsageError(f"{error}.") from error
    if (reason := explain_unsuited(model, images, top, min_score, draw)) is not None:
        raise UsageError(f"{reason}.")
    top, min_score = top or TOP, MIN_SCORE if min_score is None else min_score
    unreadable = print_predictions(model, images, top=top, min_score=min_score, as_json=as_json)
    if isinstance(model, Detector) and draw is not None and not unreadable:
        try:
            draw_detections(model, images[0], draw, min_score)
        except ImageError as error:
            raise JobError(f"{error}.") from error
    return unreadable
