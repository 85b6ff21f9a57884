"""Predictions of the models, by image."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ....export.runtime import Pixels, render
from ...data.dataset import Image, Progress, Skipped
from ...data.decode import decode_each
from ...data.unreadable import check_unreadable, read_pixels
from ...errors import UsageError
from ...evaluation.mistakes import make_example
from ...runs.files import escape_cell
from ...runs.results import Example
from .models import Model

BATCH = 32


@dataclass(frozen=True)
class Logits:
    """``logits[i]`` float32 [n,classes] of model i for the n readable ``images``."""

    images: tuple[Image, ...]
    logits: list[np.ndarray]
    skipped: tuple[Skipped, ...]


def run_models(
    images: Sequence[Image], models: Sequence[Model], skipped: Sequence[Skipped], progress: Progress
) -> Logits:
    """Run all models on the images; an ensemble of teachers gives the logits of its mean probabilities.

    Up to 1 % of all images, including those ``skipped`` before, may be unreadable.

    Raises:
        JobError: more images are unreadable, or an image was changed.
        UsageError: no image can be read.
    """
    formats = list(dict.fromkeys(model.preprocessing for model in models))
    readable: list[Image] = []
    unreadable: list[Skipped] = []
    parts: list[list[np.ndarray]] = [[] for _ in models]
    render_all = lambda image: [render(image, form) for form in formats]  # noqa: E731
    for batch, rendered in _batches(images, render_all, unreadable, progress):
        readable += batch
        for part, model in zip(parts, models, strict=True):
            pixels = rendered[formats.index(model.preprocessing)]
            logits = [classifier.predict_logits(pixels) for classifier in model.classifiers]
            part.append(model.task.likelihood.ensemble(logits).astype(np.float32))
    earlier = sum(file.unreadable for file in skipped)
    check_unreadable([*skipped, *unreadable], len(images) + earlier)
    if not readable:
        raise UsageError("None of the images can be read.")
    return Logits(tuple(readable), [np.concatenate(part) for part in parts], tuple(unreadable))


def _batches(
    images: Sequence[Image],
    render_all: Callable[[Pixels], list[Pixels]],
    unreadable: list[Skipped],
    progress: Progress,
) -> Iterator[tuple[list[Image], list[np.ndarray]]]:
    """Yield readable images and their pixels uint8 [B,S,S,3] in each format; others go to ``unreadable``."""
    batch: list[tuple[Image, list[Pixels]]] = []
    for done, (image, rendered) in enumerate(zip(images, decode_each(images, render_all), strict=True), 1):
        if isinstance(rendered, str):
            unreadable.append(Skipped(image.name, rendered, unreadable=True))
        else:
            batch.append((image, rendered))
        if batch and (len(batch) == BATCH or done == len(images)):
            columns = zip(*(pixels for _, pixels in batch), strict=True)
            yield [image for image, _ in batch], [np.stack(column) for column in columns]
            batch = []
        progress(done, len(images))


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for an image, and its teacher's if it has one."""

    model: str
    image: Image
    label: str
    predicted: str
    probability: float
    teacher: str | None = None
    teacher_probability: float | None = None

    @property
    def is_correct(self) -> bool:
        return self.predicted == self.label

    @property
    def differs(self) -> bool:
        """True if the teacher's prediction is another one."""
        return self.teacher is not None and self.teacher != self.predicted


@dataclass(frozen=True)
class TeacherOutputs:
    """Logits [n,classes] and thresholds of a teacher, in the order of its student's classes."""

    name: str
    logits: np.ndarray
    thresholds: np.ndarray | None


def list_predictions(
    model: Model,
    logits: np.ndarray,
    targets: np.ndarray,
    images: Sequence[Image],
    teacher: TeacherOutputs | None,
) -> list[Prediction]:
    """Return a prediction for each image, the most confident first."""
    labels = model.task.describe(targets, model.labels)
    predicted = model.task.decode(logits, model.labels, model.thresholds)
    by_teacher: Sequence[tuple[str | None, float | None]] = [(None, None)] * len(images)
    if teacher is not None:
        by_teacher = model.task.decode(teacher.logits, model.labels, teacher.thresholds)
    predictions = [
        Prediction(model.name, image, label, *own, *other)
        for image, label, own, other in zip(images, labels, predicted, by_teacher, strict=True)
    ]
    return sorted(predictions, key=lambda prediction: (-prediction.probability, prediction.image.name))


CSV_HEADER = (
    "model", "file", "label", "prediction", "probability", "correct", "teacher_prediction",
    "teacher_probability", "teacher_correct",
)  # fmt: skip


def to_csv(predictions: Iterable[Prediction]) -> str:
    """Return a CSV table with escaped cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for p in predictions:
        cells = [p.model, p.image.name, p.label, p.predicted, f"{p.probability:.6f}", _yes(p.is_correct)]
        if p.teacher is None:
            cells += ["", "", ""]
        else:
            cells += [p.teacher, f"{p.teacher_probability:.6f}", _yes(p.teacher == p.label)]
        writer.writerow([escape_cell(cell) for cell in cells])
    return text.getvalue()


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def make_examples(
    predictions: Sequence[Prediction], model: Model, progress: Callable[[int, int], None]
) -> list[Example]:
    """Return examples with the images as the model receives them."""
    examples = []
    for done, p in enumerate(predictions, 1):
        pixels = read_pixels(p.image, lambda image: render(image, model.preprocessing))
        progress(done, len(predictions))
        by_teacher = None
        if p.teacher is not None and p.teacher_probability is not None:
            by_teacher = (p.teacher, p.teacher_probability)
        shown = None if isinstance(pixels, str) else pixels
        examples.append(make_example(p.image, p.label, (p.predicted, p.probability), by_teacher, shown))
    return examples
