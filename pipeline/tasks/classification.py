"""One class per image: softmax cross-entropy, top-1 accuracy, McNemar's test."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from ...export.runtime import Preprocessing, softmax
from ..data.dataset import Image
from ..evaluation.calibration import Softmax
from ..evaluation.comparison import SIGNIFICANT
from ..runs.scores import ClassScore, Confusion, Measure, Proportion, Score
from .base import Chance, LabelLoss, Names, Outputs, PairedTest, Task, Thresholds, compute_labeled_loss

UNEVEN = 1.5
"""Balanced accuracy is reported if the largest class has more than this many times the smallest's images."""
CHANCE_IMAGES = 2
"""A loss of this many images may be chance, whatever the test."""
BALANCED, TOP5 = "balanced accuracy", "top-5 accuracy"


def mixed_loss(loss: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of class numbers [L], or of mixed views by both numbers and the ratio, [L, 3]."""
    if labels.dim() == 1:
        mean: Tensor = loss(logits, labels).mean()
        return mean
    first, second, ratio = labels.unbind(1)
    return (ratio * loss(logits, first.long()) + (1 - ratio) * loss(logits, second.long())).mean()


class Classification(Task):
    """Labels are class numbers int64 [n]."""

    name = "classification"
    metric = class_metric = "accuracy"
    manifest_key = "top1"
    likelihood = Softmax()
    default_balance = "auto"

    def label_loss(self, smoothing: float) -> LabelLoss:
        loss = nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")
        return partial(compute_labeled_loss, partial(mixed_loss, loss))

    def guessing_loss(self, classes: int) -> float:
        return math.log(classes)

    def main_labels(self, labels: Tensor) -> Tensor:
        """Return the class numbers [L]; of a mixed view, that of the image of which it shows more."""
        if labels.dim() == 1:
            return labels
        first, second, ratio = labels.unbind(1)
        return torch.where(ratio >= 0.5, first, second).long()

    def count_correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels).sum()

    def encode(
        self, images: Sequence[Image], numbers: Sequence[int], classes: int, preprocessing: Preprocessing
    ) -> ndarray:
        return np.array([numbers[image.label] for image in images], dtype=np.int64)

    def drop_unknown(self, images: Sequence[Image], unknown: set[int]) -> tuple[Image, ...]:
        return tuple(image for image in images if image.label not in unknown)

    def predict(self, logits: ndarray, thresholds: Thresholds = None) -> ndarray:
        return np.asarray(logits.argmax(1))

    def confidence(self, logits: ndarray, thresholds: Thresholds = None) -> ndarray:
        return np.asarray(softmax(logits).max(1))

    def describe(self, labels: ndarray, classes: Names) -> list[str]:
        return [classes[label] for label in labels.tolist()]

    def score(
        self, logits: ndarray, labels: ndarray, classes: Names = (), thresholds: Thresholds = None
    ) -> Score:
        counts, _, correct = self.count_classes(logits, labels, logits.shape[1])
        accuracy = Proportion.from_counts(int(correct.sum()), len(labels))
        details, shown = {}, counts > 0
        if counts.max() > UNEVEN * counts[shown].min():
            details[BALANCED] = Measure(percent=100 * float((correct[shown] / counts[shown]).mean()))
        if logits.shape[1] > 10:
            best = torch.from_numpy(logits).topk(5).indices.numpy()
            top5 = Proportion.from_counts(int((best == labels[:, None]).any(1).sum()), len(labels))
            details[TOP5] = Measure(percent=top5.percent, low=top5.low, high=top5.high)
        rows = zip(classes, counts.tolist(), correct.tolist(), strict=False)
        return Score(
            metric=self.metric,
            **accuracy.model_dump(),
            details=details,
            classes=[ClassScore(label=name, n=n, percent=100 * k / n) for name, n, k in rows if n],
        )

    def manifest_entry(self, score: Score) -> dict[str, Any]:
        details = {"balanced": score.details.get(BALANCED), "top5": score.details.get(TOP5)}
        return {
            "top1": score.percent,
            "n": score.n,
            "low": score.low,
            "high": score.high,
            "correct": score.correct,
            **{key: detail.percent for key, detail in details.items() if detail is not None},
        }

    def count_classes(
        self, logits: ndarray, labels: ndarray, classes: int, thresholds: Thresholds = None
    ) -> tuple[ndarray, ...]:
        predictions = self.predict(logits)
        correct = labels[predictions == labels]
        return tuple(np.bincount(numbers, minlength=classes) for numbers in (labels, predictions, correct))

    def confusion(self, logits: ndarray, labels: ndarray) -> Confusion:
        counts = Counter(zip(labels.tolist(), self.predict(logits).tolist(), strict=True))
        return [(label, predicted, n) for (label, predicted), n in sorted(counts.items())]

    def chance(self, labels: ndarray) -> Chance:
        largest = np.bincount(labels).max()
        return Chance(100 * float(largest) / len(labels), "the fraction of the largest class")

    def paired_test(self, fp32: ndarray, int8: ndarray, labels: ndarray) -> PairedTest:
        test = self.compare(Outputs(fp32, labels), Outputs(int8, labels))
        lost = round(test.points * len(labels) / 100)
        return PairedTest(test.p, lost <= CHANCE_IMAGES and test.p >= SIGNIFICANT)
