"""Mistakes of a network: the classes it confuses most, and example images with its predictions."""

from collections.abc import Sequence

import numpy as np

from ..data.dataset import Image
from ..data.decode import encode_thumbnail
from ..runs.results import Example
from .results import Confused

EXAMPLES = 12
MAX_SIDE = 128
"""Pixels of an example's side as shown."""
MAX_CONFUSED = 100

Prediction = tuple[str, float]
"""Predicted label as text, and its probability."""


def most_confused(confusion: np.ndarray, classes: Sequence[str]) -> list[Confused]:
    """Return the most frequent mistakes in ``confusion``, image counts [true class, predicted class]."""
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    places = np.argsort(-mistakes, axis=None, kind="stable")[:MAX_CONFUSED].tolist()
    return [
        Confused(
            label=classes[label],
            predicted=classes[predicted],
            n=int(mistakes[label, predicted]),
            percent=100 * float(mistakes[label, predicted] / confusion[label].sum()),
        )
        for label, predicted in (divmod(place, len(classes)) for place in places)
        if mistakes[label, predicted]
    ]


def make_example(
    image: Image, label: str, student: Prediction, teacher: Prediction | None, pixels: np.ndarray | None
) -> Example:
    """Return an image with its predictions; ``pixels`` uint8 [S,S,3], None if they cannot be read."""
    return Example(
        name=image.name,
        label=label,
        teacher=None if teacher is None else teacher[0],
        teacher_probability=None if teacher is None else teacher[1],
        student=student[0],
        student_probability=student[1],
        png="" if pixels is None else encode_thumbnail(pixels, min(MAX_SIDE, len(pixels))),
    )


def choose_examples(
    images: Sequence[Image],
    pixels: np.ndarray,
    labels: Sequence[str],
    teacher: Sequence[Prediction] | None,
    student: Sequence[Prediction],
) -> list[Example]:
    """Return the student's most confident mistakes first, then images spread over the split."""
    mistakes = [i for i, label in enumerate(labels) if student[i][0] != label]
    mistakes = sorted(mistakes, key=lambda i: -student[i][1])[: EXAMPLES // 2]
    spread = np.linspace(0, len(labels) - 1, min(EXAMPLES, len(labels))).astype(int)
    chosen = list(dict.fromkeys([*mistakes, *spread.tolist()]))[:EXAMPLES]
    return [
        make_example(images[i], labels[i], student[i], None if teacher is None else teacher[i], pixels[i])
        for i in chosen
    ]
