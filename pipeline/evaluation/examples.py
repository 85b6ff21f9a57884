"""A few test images with the predictions of the file that ships and of the teacher, for the report."""

from collections.abc import Sequence

import numpy as np

from ..data.dataset import Image
from ..data.decode import encode_thumbnail
from ..runs.results import Example

EXAMPLES = 12
MAX_SIDE = 128
"""Pixels of an example's side as shown."""

Predicted = Sequence[tuple[str, float]]
"""The predicted label of each image and its probability."""


def choose_examples(
    entries: Sequence[Image],
    images: np.ndarray,
    labels: Sequence[str],
    teacher: Predicted | None,
    student: Predicted,
) -> list[Example]:
    """Return the student's most confident mistakes first, then images spread over the split."""
    mistakes = [i for i, label in enumerate(labels) if student[i][0] != label]
    mistakes = sorted(mistakes, key=lambda i: -student[i][1])[: EXAMPLES // 2]
    spread = np.linspace(0, len(labels) - 1, min(EXAMPLES, len(labels))).astype(int)
    chosen = list(dict.fromkeys([*mistakes, *spread.tolist()]))[:EXAMPLES]
    return [
        Example(
            name=entries[i].name,
            label=labels[i],
            teacher=None if teacher is None else teacher[i][0],
            teacher_probability=None if teacher is None else teacher[i][1],
            student=student[i][0],
            student_probability=student[i][1],
            png=encode_thumbnail(images[i], min(MAX_SIDE, len(images[i]))),
        )
        for i in chosen
    ]
