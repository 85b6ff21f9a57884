"""Any number of classes per image: a sigmoid per class, mean average precision, a threshold per class."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from ...export.runtime import sigmoid
from ..data.dataset import Image
from ..evaluation import average_precision
from ..evaluation.likelihood import Sigmoid
from ..runs.scores import ClassScore, Measure, Score, TaskName
from .base import Chance, PairedTest, Task, Thresholds

NO_CLASS = "no class"


class MultiLabel(Task):
    """Labels are 1 for each class of the image and 0 otherwise, float32 [n,classes]."""

    name = "multi-label"
    metric = "mAP"
    class_metric = "average precision"
    likelihood = Sigmoid()
    # The gradient ratios that balancing aims at were measured on images with one label.
    default_balance = "off"
    has_thresholds = True
    accepts = frozenset[TaskName]({"classification", "multi-label"})
    labels_note = " (several per image)"
    prediction_note = (
        "A prediction is a set of labels: it is correct if all are, and its probability assumes that labels "
        "are independent."
    )

    def encode(self, labels: Sequence[Sequence[int]], classes: int) -> np.ndarray:
        encoded = np.zeros((len(labels), classes), dtype=np.float32)
        for row, shown in enumerate(labels):
            encoded[row, list(shown)] = 1
        return encoded

    def drop_unknown(self, images: Sequence[Image], unknown: set[int]) -> tuple[Image, ...]:
        return tuple(images)  # the other labels of an image still count

    def label_loss(self, smoothing: float) -> nn.Module:
        """Return the sum of the classes' binary cross-entropies, smoothed towards 1/2.

        It is the negative log-likelihood of the set of labels, as it is for one label. The mean over classes,
        timm's default, would weigh less beside a method's loss the more classes there are.
        """
        return BinaryCrossEntropy(smoothing=smoothing, smooth_dense=True, sum_classes=True)

    def count_correct(self, logits: Tensor, labels: Tensor) -> None:
        return None

    def percent(self, logits: np.ndarray, labels: np.ndarray) -> float:
        return average_precision.mean_average_precision(logits, labels)

    def score(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str] = (),
        thresholds: Thresholds = None,
    ) -> Score:
        if thresholds is None:
            thresholds = self.default_thresholds(logits.shape[1])
        shown = labels.any(0)
        predicted = self.predict(logits, thresholds)
        # timm's evaluator has one threshold for all classes: predictions stand in for the logits.
        decided = np.where(predicted, 1.0, -1.0)
        micro = average_precision.evaluate(decided, labels)["micro_f1"]
        macro = average_precision.evaluate(decided[:, shown], labels[:, shown])["macro_f1"]
        low, high = average_precision.map_interval(logits[:, shown], labels[:, shown])
        return Score(
            metric=self.metric,
            percent=self.percent(logits, labels),
            n=len(logits),
            low=low,
            high=high,
            details={"micro F1": Measure(percent=micro), "macro F1": Measure(percent=macro)},
            classes=self._score_classes(logits, labels, classes, thresholds) if classes else [],
        )

    def _score_classes(
        self, logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], thresholds: np.ndarray
    ) -> list[ClassScore]:
        precision = average_precision.class_average_precision(logits, labels)
        measures = self.measure_classes(logits, labels, classes, thresholds)
        return [
            ClassScore(
                label=one.label,
                n=one.n,
                percent=float(precision[c]) if one.n else None,
                f1=one.f1,
                threshold=float(thresholds[c]),
            )
            for c, one in enumerate(measures)
        ]

    def chance(self, labels: np.ndarray) -> Chance:
        fractions = labels.mean(0)
        percent = 100 * float(fractions[fractions > 0].mean())
        return Chance(percent, "the mean fraction of images that show a class")

    def paired_test(self, fp32: np.ndarray, int8: np.ndarray, labels: np.ndarray) -> PairedTest:
        return PairedTest(None, may_be_chance=False)

    def default_thresholds(self, classes: int) -> np.ndarray:
        return np.full(classes, average_precision.DEFAULT_THRESHOLD)

    def choose_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return average_precision.choose_thresholds(logits, labels)

    def predict(self, logits: np.ndarray, thresholds: Thresholds = None) -> np.ndarray:
        if thresholds is None:
            thresholds = self.default_thresholds(logits.shape[1])
        predictions: np.ndarray = sigmoid(logits) >= thresholds
        return predictions

    def describe(self, labels: np.ndarray, classes: Sequence[str]) -> list[str]:
        return [", ".join(classes[int(c)] for c in np.flatnonzero(row)) or NO_CLASS for row in labels]

    def confidence(self, logits: np.ndarray, thresholds: Thresholds = None) -> np.ndarray:
        p = sigmoid(logits)
        probability: np.ndarray = np.where(self.predict(logits, thresholds), p, 1 - p).prod(1)
        return probability

    def count_classes(
        self, predictions: np.ndarray, labels: np.ndarray, classes: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shown = labels > 0
        return shown.sum(0), predictions.sum(0), (predictions & shown).sum(0)

    def confusion(self, logits: np.ndarray, labels: np.ndarray) -> None:
        return None

    def manifest_entry(self, score: Score) -> dict[str, Any]:
        return {
            "map": score.percent,
            "n": score.n,
            "low": score.low,
            "high": score.high,
            "micro_f1": score.details["micro F1"].percent,
            "macro_f1": score.details["macro F1"].percent,
        }
