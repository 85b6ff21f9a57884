"""Any number of classes per image: a sigmoid per class, mean average precision, a threshold per class.

Targets are 0 or 1, [n,classes], and logits [n,classes] are those of independent sigmoids.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from timm.loss import BinaryCrossEntropy
from timm.task.evaluator import MultiLabelClassificationEvaluator

from ...export.runtime import Preprocessing, sigmoid
from ..data.dataset import Image
from ..evaluation.calibration import Sigmoid
from ..evaluation.comparison import bootstrap_interval
from ..runs.scores import ClassScore, Measure, Score
from .base import Chance, LabelLoss, Names, Task, Thresholds, compute_labeled_loss

NO_CLASS = "no class"
MICRO, MACRO = "micro F1", "macro F1"
DEFAULT_THRESHOLD = 0.5
RESAMPLES, MIN_RESAMPLES, MAX_WORK = 400, 50, 2_000_000_000
"""Bootstrap resamples of the images. The number falls to the minimum as resamples times images times classes
reach the maximum (about ten seconds).
"""
CHUNK = 1 << 22
"""Images times classes that are ranked at once: about 200 MB."""


def evaluate(logits: ndarray, targets: ndarray) -> dict[str, float]:
    """Return timm's multi-label metrics, with labels predicted from a logit of 0."""
    evaluator = MultiLabelClassificationEvaluator()
    evaluator.update(torch.from_numpy(np.ascontiguousarray(logits)), torch.from_numpy(np.array(targets)))
    return dict(evaluator.compute())


class Ranking:
    """The images of each class by falling logit, and the ranks of those that show the class."""

    def __init__(self, logits: ndarray, targets: ndarray) -> None:
        scores, shown = np.ascontiguousarray(logits.T), np.ascontiguousarray(targets.T) > 0
        self.order = np.argsort(-scores, axis=1, kind="stable")
        """Indices of the images, [classes,n]."""
        ranked = np.take_along_axis(scores, self.order, axis=1)
        hits = np.take_along_axis(shown, self.order, axis=1)
        last = np.ones(ranked.shape, dtype=bool)
        last[:, :-1] = ranked[:, :-1] != ranked[:, 1:]
        places = np.where(last, np.arange(ranked.shape[1]), ranked.shape[1])
        ends = np.minimum.accumulate(places[:, ::-1], axis=1)[:, ::-1]
        # For each hit: its class, its image, the last rank with its logit, and the last hit up to there.
        self.classes = np.nonzero(hits)[0]
        self.images, self.ends = self.order[hits], ends[hits]
        counts = hits.sum(1)
        self.firsts = np.cumsum(counts) - counts
        self.last_hits = self.firsts[self.classes] + np.cumsum(hits, axis=1)[self.classes, self.ends] - 1


def average_precision(ranking: Ranking, weights: ndarray) -> ndarray:
    """Return each class's average precision, 0 to 1, if image i counts ``weights[i]`` times.

    A class without a positive image gets NaN. Weights of 1 give timm's average precision.
    """
    classes, hits = ranking.classes, weights[ranking.images]
    counted = np.concatenate([[0.0], np.cumsum(hits)])
    # Equal logits are one step, whose precision is that at its end.
    hits_so_far = counted[ranking.last_hits + 1] - counted[ranking.firsts[classes]]
    seen = np.cumsum(weights[ranking.order], axis=1)[classes, ranking.ends]
    # A hit of weight 0 may come before any weight: 0 / 0 counts as 0.
    total = np.bincount(classes, hits * hits_so_far / np.maximum(seen, 1), minlength=len(ranking.order))
    with np.errstate(invalid="ignore"):
        return np.asarray(total / np.bincount(classes, hits, minlength=len(ranking.order)))


def map_interval(logits: ndarray, targets: ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval over images of the mAP, in percent.

    Every class must be shown by an image.
    """
    n, classes = targets.shape
    resamples = int(np.clip(MAX_WORK // (n * classes), MIN_RESAMPLES, RESAMPLES))
    sums, counts, own = np.zeros(resamples), np.zeros(resamples), 0.0
    for ranking in _rankings(logits, targets):
        rng = np.random.default_rng(0)  # the same images for all classes
        own += float(average_precision(ranking, np.ones(n)).sum())
        for draw in range(resamples):
            weights = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
            precision = average_precision(ranking, weights)
            sums[draw] += np.nansum(precision)
            counts[draw] += np.count_nonzero(~np.isnan(precision))
    return bootstrap_interval(100 * sums[counts > 0] / counts[counts > 0], 100 * own / classes)


def _rankings(logits: ndarray, targets: ndarray) -> Iterator[Ranking]:
    """Rank a few classes at a time to bound memory."""
    few = max(1, CHUNK // len(targets))
    for first in range(0, targets.shape[1], few):
        part = slice(first, first + few)
        yield Ranking(logits[:, part], targets[:, part])


class MultiLabel(Task):
    """Labels are 1 for each class of the image and 0 otherwise, float32 [n,classes]."""

    name = "multi-label"
    metric = "mAP"
    class_metric = "average precision"
    manifest_key = "map"
    likelihood = Sigmoid()
    # The gradient ratios that balancing aims at were measured on images with one label.
    default_balance = "off"
    accepts = ("classification",)
    has_thresholds = True
    labels_note = " (several per image)"
    prediction_note = (
        "A prediction is a set of labels: it is correct if all are, and its probability assumes that labels "
        "are independent."
    )

    def label_loss(self, smoothing: float) -> LabelLoss:
        """Return the sum of the classes' binary cross-entropies, with labels smoothed towards 1/2.

        It is the negative log-likelihood of the set of labels, as the cross-entropy is of one label. The mean
        over classes, timm's default, would weigh less against a method's loss the more classes there are.
        """
        loss = BinaryCrossEntropy(smoothing=smoothing, smooth_dense=True, sum_classes=True)
        return partial(compute_labeled_loss, loss)

    def guessing_loss(self, classes: int) -> float:
        return classes * math.log(2)

    def encode(
        self, images: Sequence[Image], numbers: Sequence[int], classes: int, preprocessing: Preprocessing
    ) -> ndarray:
        encoded = np.zeros((len(images), classes), dtype=np.float32)
        for row, image in enumerate(images):
            encoded[row, [numbers[label] for label in image.labels if numbers[label] >= 0]] = 1
        return encoded

    def default_thresholds(self, classes: int) -> ndarray:
        return np.full(classes, DEFAULT_THRESHOLD)

    def choose_thresholds(self, logits: ndarray, labels: ndarray) -> ndarray:
        """Return the threshold of each class that gives the highest F1.

        It lies halfway between the lowest accepted probability and the highest rejected one. Of several with
        equal F1 the highest is chosen; a class that no image shows gets the default.
        """
        chosen = self.default_thresholds(labels.shape[1])
        for c in np.flatnonzero(labels.any(0)):
            probability = sigmoid(logits[:, c])
            order = np.argsort(-probability, kind="stable")
            ranked, hits = probability[order], np.cumsum(labels[order, c])
            accepted = np.arange(1, len(ranked) + 1)
            ends = np.append(ranked[:-1] != ranked[1:], True)  # equal probabilities are accepted together
            f1 = np.where(ends, 2 * hits / (accepted + hits[-1]), -1)
            last = int(f1.argmax())
            below = ranked[last + 1] if last + 1 < len(ranked) else 0.0
            chosen[c] = (ranked[last] + below) / 2
        return chosen

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
        """Compute timm's mAP over the classes that an image shows."""
        shown = labels.any(0)
        return evaluate(logits[:, shown], labels[:, shown])["map"]

    def score(
        self, logits: ndarray, labels: ndarray, classes: Names = (), thresholds: Thresholds = None
    ) -> Score:
        shown = labels.any(0)
        # timm's evaluator has one threshold for all classes: predictions stand in for the logits.
        predictions = np.where(self.predict(logits, thresholds), 1.0, -1.0)
        micro = evaluate(predictions, labels)["micro_f1"]
        macro = evaluate(predictions[:, shown], labels[:, shown])["macro_f1"]
        low, high = map_interval(logits[:, shown], labels[:, shown])
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
        ones = np.ones(len(logits))
        precision = 100 * np.concatenate([average_precision(r, ones) for r in _rankings(logits, labels)])
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

    def count_classes(
        self, logits: ndarray, labels: ndarray, classes: int, thresholds: Thresholds = None
    ) -> tuple[ndarray, ...]:
        shown, predictions = labels > 0, self.predict(logits, thresholds)
        return shown.sum(0), predictions.sum(0), (predictions & shown).sum(0)

    def chance(self, labels: ndarray) -> Chance:
        fractions = labels.mean(0)
        percent = 100 * float(fractions[fractions > 0].mean())
        return Chance(percent, "the mean fraction of images that show a class")
