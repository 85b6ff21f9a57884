"""What a network's logits amount to: accuracy, each class, calibration, agreement, and files in pairs."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ...export.runtime import Pixels, Preprocessing, render
from ..data.dataset import Image, Progress, Skipped
from ..data.decode import decode_each
from ..data.unreadable import check_unreadable, read_pixels
from ..errors import UsageError
from ..evaluation import calibration
from ..evaluation.comparison import SIGNIFICANT, holm, mcnemar
from ..evaluation.mistakes import make_example, most_confused
from ..evaluation.results import Pair, Verdict
from ..runs.files import escape_cell
from ..runs.results import Example
from ..runs.scores import Proportion
from .validate_inputs import Asked

MOST_IN_MATRIX = 100
"""A larger confusion matrix is not kept: the pairs confused most often say what it would."""


def measured(network: Asked, logits: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """What the images tell of a network, as fields of ``results.Network``.

    Args:
        logits: [n,classes], n > 0.
        targets: class numbers [n], or [n,classes] of zeros and ones where images have several labels.
    """
    task, labels, thresholds = network.task, network.labels, network.thresholds
    table = task.confusion(logits, targets)
    return {
        "score": task.score(logits, targets, labels, thresholds),
        "calibration": calibration.measure(logits, targets, task.likelihood),
        "mistakes": int((~right(network, logits, targets)).sum()),
        "per_class": task.measure_classes(logits, targets, labels, thresholds),
        "confusion": None if table is None or len(labels) > MOST_IN_MATRIX else table.tolist(),
        "confused": [] if table is None else most_confused(table, labels),
    }


def right(network: Asked, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """bool [n]: the answer is the label, or with several labels the very same ones."""
    return network.task.is_correct(logits, targets, network.thresholds)


def agreement(student: Asked, logits: np.ndarray, teacher: Asked, others: np.ndarray) -> Proportion | None:
    """How often the student's answer is the teacher's; None where they know different classes."""
    columns = in_order_of(student, teacher)
    if columns is None:
        return None
    thresholds = None if teacher.thresholds is None else teacher.thresholds[columns]
    return student.task.agreement(logits, others[:, columns], student.thresholds, thresholds)


def in_order_of(student: Asked, teacher: Asked) -> list[int] | None:
    """Where the teacher has each of the student's classes; None where they are not the same ones."""
    if set(student.labels) != set(teacher.labels) or len(student.labels) != len(teacher.labels):
        return None
    place = {name: number for number, name in enumerate(teacher.labels)}
    return [place[name] for name in student.labels]


def pairs(names: Sequence[str], rights: Sequence[np.ndarray]) -> list[Pair]:
    """Every two files on the same images; ``rights`` bool [n] each."""
    found = []
    for i, k in combinations(range(len(names)), 2):
        alone, other = int((rights[i] & ~rights[k]).sum()), int((rights[k] & ~rights[i]).sum())
        found.append((names[i], names[k], alone, other, mcnemar(alone, other)))
    corrected = holm([one[-1] for one in found])
    n = max((len(one) for one in rights), default=1)
    return [
        Pair(
            first=first,
            second=second,
            first_alone=alone,
            second_alone=other,
            points=100 * (alone - other) / n,
            p=p,
            p_holm=p_holm,
            verdict=verdict(alone - other, p_holm),
        )
        for (first, second, alone, other, p), p_holm in zip(found, corrected, strict=True)
    ]


def verdict(difference: float, p: float) -> Verdict:
    if p >= SIGNIFICANT or difference == 0:
        return "no difference"
    return "better" if difference > 0 else "worse"


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
    truths = network.task.describe(targets, labels)
    own = network.task.decode(logits, labels, network.thresholds)
    theirs: list[tuple[str, float]] | None = None
    columns = None if teacher is None else in_order_of(network, teacher)
    if teacher is not None and others is not None and columns is not None:
        thresholds = None if teacher.thresholds is None else teacher.thresholds[columns]
        theirs = network.task.decode(others[:, columns], labels, thresholds)
    found = [
        Answered(network.name, image, truth, *answer, *(theirs[i] if theirs is not None else (None, None)))
        for i, (image, truth, answer) in enumerate(zip(images, truths, own, strict=True))
    ]
    return sorted(found, key=lambda one: (-one.probability, one.image.name))


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
        writer.writerow([escape_cell(cell) for cell in (*cells, *more)])
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
        pixels = read_pixels(one.image, lambda image: render(image, form))
        progress(done, min(most, len(rows)))
        found.append(
            make_example(
                one.image,
                one.label,
                (one.answer, one.probability),
                None
                if one.teacher is None or one.teacher_probability is None
                else (one.teacher, one.teacher_probability),
                None if isinstance(pixels, str) else pixels,
            )
        )
    return found


BATCH = 32


@dataclass(frozen=True)
class Answers:
    """``logits[i]`` float32 [n,classes of network i] to ``images``, those that could be read."""

    images: tuple[Image, ...]
    logits: list[np.ndarray]
    skipped: tuple[Skipped, ...]


def ask(
    images: Sequence[Image], networks: Sequence[Asked], skipped: Sequence[Skipped], progress: Progress
) -> Answers:
    """The networks' logits.

    Args:
        skipped: what was left out before; of all images 1 % may be unreadable.

    Raises:
        JobError: more are unreadable, or an image has changed since it was opened.
        UsageError: none can be read.
    """
    forms = list(dict.fromkeys(one.classifiers[0].preprocessing for one in networks))
    kept: list[Image] = []
    unread: list[Skipped] = []
    found: list[list[np.ndarray]] = [[] for _ in networks]
    for batch, rendered in _batches(images, _rendered(forms), unread, progress):
        kept += batch
        for logits, one in zip(found, networks, strict=True):
            pixels = rendered[forms.index(one.classifiers[0].preprocessing)]
            logits.append(_together(one, pixels))
    before = sum(one.unreadable for one in skipped)
    check_unreadable([*skipped, *unread], len(images) + before)
    if not kept:
        raise UsageError("None of the images can be read.")
    return Answers(tuple(kept), [np.concatenate(each) for each in found], tuple(unread))


def _together(network: Asked, pixels: np.ndarray) -> np.ndarray:
    """float32 [B,classes]: logits, of several teachers those of their mean probabilities."""
    each = [one.predict_logits(pixels) for one in network.classifiers]
    return network.task.likelihood.ensemble(each).astype(np.float32)


def _rendered(forms: Sequence[Preprocessing]) -> Callable[[Pixels], list[Pixels]]:
    return lambda image: [render(image, form) for form in forms]


def _batches(
    images: Sequence[Image],
    form: Callable[[Pixels], list[Pixels]],
    unread: list[Skipped],
    progress: Progress,
) -> Iterator[tuple[list[Image], list[np.ndarray]]]:
    """Batches of readable images, rendered in each form: uint8 [B,S,S,3]. The others go to ``unread``."""
    batch: list[tuple[Image, list[Pixels]]] = []
    for done, (image, made) in enumerate(zip(images, decode_each(images, form), strict=True), 1):
        if isinstance(made, str):
            unread.append(Skipped(image.name, made, unreadable=True))
        else:
            batch.append((image, made))
        if batch and (len(batch) == BATCH or done == len(images)):
            columns = zip(*(pixels for _, pixels in batch), strict=True)
            yield [one for one, _ in batch], [np.stack(column) for column in columns]
            batch = []
        progress(done, len(images))
