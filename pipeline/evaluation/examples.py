"""A few test images with what the shipped file and the teacher say to them, for the report."""

from collections.abc import Sequence

import numpy as np

from ...export.runtime import sigmoid, softmax
from ..data.dataset import Image
from ..methods.quest.patches import thumbnail
from ..runs.results import Example
from . import multi_label

EXAMPLES = 12
LARGEST = 128
"""Pixels of an example's side as shown."""
NONE = "no class"
"""The answer where none of a multi-label set's classes is in it."""

Said = Sequence[tuple[str, float]]
"""An answer to each image, and its probability."""


def said(logits: np.ndarray, classes: Sequence[str], thresholds: np.ndarray | None) -> Said:
    """The likeliest class; or with ``thresholds`` the classes that reach theirs, with the probability of this
    very set if classes were independent of each other.
    """
    if thresholds is None:
        p = softmax(logits)
        return [(classes[int(one.argmax())], float(one.max())) for one in p]
    p, decided = sigmoid(logits), multi_label.decide(logits, thresholds)
    whole = np.where(decided, p, 1 - p).prod(1)
    return [(several(row, classes), float(one)) for row, one in zip(decided, whole, strict=True)]


def several(row: np.ndarray, classes: Sequence[str]) -> str:
    """The classes of a row of a multi-label set, in their order."""
    return ", ".join(classes[int(c)] for c in np.flatnonzero(row)) or NONE


def examples(
    entries: Sequence[Image],
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    teacher: Said | None,
    student: Said,
) -> list[Example]:
    """The student's most confident mistakes first, then some from all over the role."""
    truths = [classes[row] if labels.ndim == 1 else several(row, classes) for row in labels]
    wrong = [i for i, truth in enumerate(truths) if student[i][0] != truth]
    mistakes = sorted(wrong, key=lambda i: -student[i][1])[: EXAMPLES // 2]
    spread = np.linspace(0, len(labels) - 1, min(EXAMPLES, len(labels))).astype(int)
    chosen = list(dict.fromkeys([*mistakes, *spread.tolist()]))[:EXAMPLES]
    return [
        Example(
            name=entries[i].name,
            label=truths[i],
            teacher=None if teacher is None else teacher[i][0],
            teacher_probability=None if teacher is None else teacher[i][1],
            student=student[i][0],
            student_probability=student[i][1],
            png=thumbnail(images[i], min(LARGEST, len(images[i]))),
        )
        for i in chosen
    ]
