"""`compress predict`: answers of an artifact, through the runtime that ships."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..export.runtime import ArtifactError, Classifier, ImageError, Prediction, decode_image
from .errors import UsageError


def predict(
    artifact: Path,
    images: Sequence[Path],
    *,
    top: int,
    file: str | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """Print each image's labels and probabilities; the number of images that could not be read.

    Raises:
        UsageError: the artifact cannot be loaded.
    """
    try:
        classifier = Classifier.load(artifact, file=file, threads=threads)
    except ArtifactError as error:
        raise UsageError(f"{error}.") from error
    unread = 0
    for path in images:
        try:
            [answer] = classifier.predict([decode_image(path)], top=top)
        except ImageError as error:
            unread += 1
            print(f"Error: {error}", file=sys.stderr)
            continue
        several = classifier.thresholds is not None
        print(_line(path, answer, as_json=as_json, several=several))
    return unread


def _line(path: Path, answer: Prediction, *, as_json: bool, several: bool) -> str:
    """The likeliest labels; where an image may have ``several``, those it has, and in JSON the others too."""
    if as_json:
        has = {"labels": _named(answer.labels)} if several else {}
        return json.dumps({"image": str(path), **has, "answers": _named(answer.top)}, ensure_ascii=False)
    shown = answer.labels if several else answer.top
    told = ", ".join(f"{label} {100 * probability:.1f} %" for label, probability in shown)
    return f"{path}: {told or 'none of the labels'}"


def _named(answers: list[tuple[str, float]]) -> list[dict[str, str | float]]:
    return [{"label": label, "probability": probability} for label, probability in answers]
