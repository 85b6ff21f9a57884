"""Any number of classes per image: a sigmoid per class, mean average precision, a threshold per class."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray
from timm.loss import BinaryCrossEntropy
from torch import nn

from ...export.runtime import sigmoid
from ..config import TaskName
from ..evaluation import average_precision
from ..evaluation.likelihood import Sigmoid
from ..runs.scores import ClassScore, Measure, Score
from .base import Chance, Names, Task, Thresholds

NO_CLASS = "no class"

MICRO, MACRO = "micro F1", "macro F1"


class MultiLabel(Task):
    """Labels are 1 for each class of the image and 0 otherwise, float32 [n,classes]."""

    name = "multi-label"
    metric = "mAP"
    class_metric = "average precision"
    likelihood = Sigmoid()
    # The gradient ratios that balancing aims at were measured on images with one label.
    default_balance = "off"
    accepts = frozenset[TaskName]({"classification", "multi-label"})
    has_thresholds = True
    labels_note = " (several per image)"
    prediction_note = (
        "A prediction is a set of labels: it is correct if all are, and its probability assumes that labels "
        "are independent."
    )

    def label_loss(self, smoothing: float) -> nn.Module:
        """Return the sum of the classes' binary cross-entropies, with labels smoothed towards 1/2.

        It is the negative log-likelihood of the set of labels, as the cross-entropy is of one label. The mean
        over classes, timm's default, would weigh less against a method's loss the more classes there are.
        """
        return BinaryCrossEntropy(smoothing=smoothing, smooth_dense=True, sum_classes=True)

    def encode(self, labels: Sequence[Sequence[int]], classes: int) -> ndarray:
        encoded = np.zeros((len(labels), classes), dtype=np.float32)
        for row, shown in enumerate(labels):
            encoded[row, list(shown)] = 1
        return encoded

    def default_thresholds(self, classes: int) -> ndarray:
        return np.full(classes, average_precision.DEFAULT_THRESHOLD)

    def choose_thresholds(self, logits: ndarray, labels: ndarray) -> ndarray:
        return average_precision.choose_thresholds(logits, labels)

    def predict(self, logits: ndarray, thresholds: Thresholds = None) -> ndarray:
        if thresholds is None:
            thresholds = self.default_thresholds(logits.shape[1])
        return np.asarray(sigmoid(logits) >= thresholds)

    def confidence(self, logits: ndarray, thresholds: Thresholds = None) -> ndarray:
        p = sigmoid(logits)
        return np.asarray(np.where(self.predict(logits, thresholds), p, 1 - p).prod(1))

    def describe(self, labels: ndarray, classes: Names) -> list[str]:
        return [", ".join(classes[int(c)] for c in np.flatnonzero(row)) or NO_CLASS for row in labels]

    def percent(self, logits: ndarray, labels: ndarray) -> float:
        return average_precision.mean_average_precision(logits, labels)

    def score(
        self, logits: ndarray, labels: ndarray, classes: Names = (), thresholds: Thresholds = None
    ) -> Score:
        shown = labels.any(0)
        # timm's evaluator has one threshold for all classes: predictions stand in for the logits.
        predictions = np.where(self.predict(logits, thresholds), 1.0, -1.0)
        micro = average_precision.evaluate(predictions, labels)["micro_f1"]
        macro = average_precision.evaluate(predictions[:, shown], labels[:, shown])["macro_f1"]
        low, high = average_precision.map_interval(logits[:, shown], labels[:, shown])
        return Score(
            metric=self.metric,
            percent=self.percent(logits, labels),
            n=len(logits),
            low=low,
            high=high,
            details={MICRO: Measure(percent=micro), MACRO: Measure(percent=macro)},
            classes=self._score_classes(logits, labels, classes, thresholds) if classes else [],
        )

    def _score_classes(
        self, logits: ndarray, labels: ndarray, classes: Names, thresholds: Thresholds
    ) -> list[ClassScore]:
        precision = average_precision.class_average_precision(logits, labels)
        measures = self.measure_classes(logits, labels, classes, thresholds)
        thresholds = self.default_thresholds(len(classes)) if thresholds is None else thresholds
        rows = zip(measures, precision.tolist(), thresholds.tolist(), strict=True)
        return [
            ClassScore(label=m.label, n=m.n, percent=ap if m.n else None, f1=m.f1, threshold=threshold)
            for m, ap, threshold in rows
        ]

    def manifest_entry(self, score: Score) -> dict[str, Any]:
        return {
            "map": score.percent,
            "n": score.n,
            "low": score.low,
            "high": score.high,
            "micro_f1": score.details[MICRO].percent,
            "macro_f1": score.details[MACRO].percent,
        }

    def count_classes(self, predictions: ndarray, labels: ndarray, classes: int) -> tuple[ndarray, ...]:
        shown = labels > 0
        return shown.sum(0), predictions.sum(0), (predictions & shown).sum(0)

    def chance(self, labels: ndarray) -> Chance:
        fractions = labels.mean(0)
        percent = 100 * float(fractions[fractions > 0].mean())
        return Chance(percent, "the mean fraction of images that show a class")
