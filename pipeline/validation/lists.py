"""Lists of images: what a network has wrong, and where it differs from its teacher; the surest answers "
"first."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...export.runtime import render
from ..api.validate_answers import in_order_of, thresholds_of
from ..api.validate_inputs import Asked
from ..csv_cells import harmless
from ..data.dataset import Image
from ..data.decode import pixels_or_reason
from ..evaluation.examples import LARGEST, said, several
from ..evaluation.metrics import AT_ONCE
from ..runs.results import Example
from ..thumbnail import thumbnail

COLUMNS = (
    "network", "file", "label", "answer", "probability", "right", "teacher_answer", "teacher_probability",
    "teacher_right",
)  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """A network's answer to an image; ``teacher`` is its teacher's, None where there is none."""

    network: str
    image: Image
    label: str
    answer: str
    probability: float
    teacher: str | None = None
    teacher_probability: float | None = None

    @property
    def right(self) -> bool:
        return self.answer == self.label

    @property
    def differs(self) -> bool:
        return self.teacher is not None and self.teacher != self.answer


def answered(
    network: Asked,
    logits: np.ndarray,
    targets: np.ndarray,
    images: Sequence[Image],
    teacher: Asked | None = None,
    others: np.ndarray | None = None,
) -> list[Answered]:
    """Each image with the network's answer and its teacher's, the surest first."""
    labels = network.labels
    truths = [labels[row] if targets.ndim == 1 else several(row, labels) for row in targets]
    own = _said(network, logits, labels)
    theirs: list[tuple[str, float]] | None = None
    columns = None if teacher is None else in_order_of(network, teacher)
    if teacher is not None and others is not None and columns is not None:
        theirs = _said(teacher, others[:, columns], labels, columns)
    found = [
        Answered(network.name, image, truth, *answer, *(theirs[i] if theirs is not None else (None, None)))
        for i, (image, truth, answer) in enumerate(zip(images, truths, own, strict=True))
    ]
    return sorted(found, key=lambda one: (-one.probability, one.image.name))


def _said(
    network: Asked, logits: np.ndarray, labels: Sequence[str], columns: Sequence[int] | None = None
) -> list[tuple[str, float]]:
    thresholds = None
    if network.several:
        thresholds = thresholds_of(network)
        thresholds = thresholds if columns is None else thresholds[list(columns)]
    parts = (logits[start : start + AT_ONCE] for start in range(0, len(logits), AT_ONCE))
    return [one for part in parts for one in said(part, labels, thresholds)]


def mistakes(every: Iterable[Answered]) -> list[Answered]:
    return [one for one in every if not one.right]


def differences(every: Iterable[Answered]) -> list[Answered]:
    """Where student and teacher differ."""
    return [one for one in every if one.differs]


def as_csv(rows: Iterable[Answered]) -> str:
    """A table with a header, in which no cell is a formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in rows:
        theirs = "" if one.teacher is None else _yes(one.teacher == one.label)
        cells = (one.network, one.image.name, one.label, one.answer, _probability(one.probability))
        more = (_yes(one.right), one.teacher or "", _probability(one.teacher_probability), theirs)
        writer.writerow([harmless(cell) for cell in (*cells, *more)])
    return text.getvalue()


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _probability(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def pictured(
    rows: Sequence[Answered], network: Asked, most: int, progress: Callable[[int, int], None]
) -> list[Example]:
    """The first of the images, as the network sees them."""
    form = network.classifiers[0].preprocessing
    found = []
    for done, one in enumerate(rows[:most], 1):
        pixels = pixels_or_reason(one.image, lambda image: render(image, form))
        progress(done, min(most, len(rows)))
        found.append(
            Example(
                name=one.image.name,
                label=one.label,
                teacher=one.teacher,
                teacher_probability=one.teacher_probability,
                student=one.answer,
                student_probability=one.probability,
                png="" if isinstance(pixels, str) else thumbnail(pixels, min(LARGEST, len(pixels))),
            )
        )
    return found
