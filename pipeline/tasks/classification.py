"""One class per image: softmax cross-entropy, top-1 accuracy, McNemar's test."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...export.runtime import softmax
from ..data.dataset import Image
from ..evaluation.comparison import SIGNIFICANT, mcnemar
from ..evaluation.likelihood import Softmax
from ..runs.scores import ClassScore, Measure, Proportion, Score, TaskName
from .base import Chance, PairedTest, Task, Thresholds

CHUNK = 4096
"""Images whose classes are ranked at once."""

UNEVEN = 1.5
"""Balanced accuracy is reported if the largest class has more than this many times the smallest one's images."""

CHANCE_IMAGES = 2
"""An int8 file may lose this many images in any case."""


class Classification(Task):
    """Labels are class numbers int64 [n]."""

    name = "classification"
    metric = class_metric = "accuracy"
    likelihood = Softmax()
    default_balance = "auto"
    accepts = frozenset[TaskName]({"classification"})

    def encode(self, labels: Sequence[Sequence[int]], classes: int) -> np.ndarray:
        return np.array([label for [label] in labels], dtype=np.int64)

    def drop_unknown(self, images: Sequence[Image], unknown: set[int]) -> tuple[Image, ...]:
        return tuple(image for image in images if image.label not in unknown)

    def label_loss(self, smoothing: float) -> nn.Module:
        return nn.CrossEntropyLoss(label_smoothing=smoothing)

    def count_correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels).sum()

    def percent(self, logits: np.ndarray, labels: np.ndarray) -> float:
        return 100 * (int((logits.argmax(1) == labels).sum()) / len(labels))

    def score(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str] = (),
        thresholds: Thresholds = None,
    ) -> Score:
        shown, _, correct = self.count_classes(self.predict(logits), labels, logits.shape[1])
        accuracy = Proportion.from_counts(int(correct.sum()), len(labels))
        details = {}
        counts = shown[shown > 0]
        if counts.max() > UNEVEN * counts.min():
            details["balanced accuracy"] = Measure(percent=100 * float((correct[shown > 0] / counts).mean()))
        if logits.shape[1] > 10:
            top5 = Proportion.from_counts(_count_in_top5(logits, labels), len(labels))
            details["top-5 accuracy"] = Measure(percent=top5.percent, low=top5.low, high=top5.high)
        return Score(
            metric=self.metric,
            **accuracy.model_dump(),
            details=details,
            classes=[
                ClassScore(label=name, n=n, percent=100 * right / n if n else None)
                for name, n, right in zip(classes, shown.tolist(), correct.tolist(), strict=False)
            ],
        )

    def chance(self, labels: np.ndarray) -> Chance:
        return Chance(100 * float(np.bincount(labels).max()) / len(labels), "the fraction of the largest class")

    def paired_test(self, fp32: np.ndarray, int8: np.ndarray, labels: np.ndarray) -> PairedTest:
        was_right, right = self.is_correct(fp32, labels), self.is_correct(int8, labels)
        worse, better = int((was_right & ~right).sum()), int((right & ~was_right).sum())
        p = mcnemar(worse, better)
        return PairedTest(p, worse - better <= CHANCE_IMAGES and p >= SIGNIFICANT)

    def choose_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> Thresholds:
        return None

    def predict(self, logits: np.ndarray, thresholds: Thresholds = None) -> np.ndarray:
        predictions: np.ndarray = logits.argmax(1)
        return predictions

    def describe(self, labels: np.ndarray, classes: Sequence[str]) -> list[str]:
        return [classes[label] for label in labels.tolist()]

    def confidence(self, logits: np.ndarray, thresholds: Thresholds = None) -> np.ndarray:
        chunks = (logits[start : start + CHUNK] for start in range(0, len(logits), CHUNK))
        return np.concatenate([softmax(chunk).max(1) for chunk in chunks])

    def count_classes(
        self, predictions: np.ndarray, labels: np.ndarray, classes: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shown, predicted = (np.bincount(one, minlength=classes) for one in (labels, predictions))
        return shown, predicted, np.bincount(labels[predictions == labels], minlength=classes)

    def confusion(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        n = logits.shape[1]
        return np.bincount(labels * n + self.predict(logits), minlength=n * n).reshape(n, n)

    def manifest_entry(self, score: Score) -> dict[str, Any]:
        names = {"balanced": "balanced accuracy", "top5": "top-5 accuracy"}
        details = {key: score.details[name].percent for key, name in names.items() if name in score.details}
        return {
            "top1": score.percent,
            "n": score.n,
            "low": score.low,
            "high": score.high,
            "correct": score.correct,
            **details,
        }


def _count_in_top5(logits: np.ndarray, labels: np.ndarray) -> int:
    correct = 0
    for start in range(0, len(logits), CHUNK):
        part = slice(start, start + CHUNK)
        best = np.argpartition(-logits[part], 4, axis=1)[:, :5]
        correct += int((best == labels[part, None]).any(1).sum())
    return correct
