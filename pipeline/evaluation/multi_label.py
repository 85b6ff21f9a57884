"""Scores of networks that answer each class for itself: images with several labels, or none.

Targets are 0 or 1, [n,classes]. A network gives each class the probability σ(logit), and says that an image
has the class where that reaches the class's threshold.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from timm.task.evaluator import MultiLabelClassificationEvaluator

from ...export.runtime import sigmoid
from ..runs.results import Subject
from ..runs.scores import Accuracy, ClassScore, MultiLabelScore

EVEN = 0.5
"""The threshold where nothing tells a better one."""

RESAMPLES, LEAST_RESAMPLES, MOST_WORK = 400, 50, 2_000_000_000
"""Of the test images, for the interval of the mean average precision: fewer, down to the least, where they
times images times classes would be more than the most work (some ten seconds).
"""

AT_ONCE = 1 << 22
"""Images times classes that are ranked together: some 200 MB."""


def score(
    logits: np.ndarray,
    targets: np.ndarray,
    thresholds: np.ndarray | None = None,
    classes: Sequence[str] = (),
) -> MultiLabelScore:
    """timm's mAP over the classes that an image shows, with its 95 % bootstrap interval over images, and F1
    at the thresholds (default: even chances).

    Args:
        logits, targets: [n,classes], n > 0.
        classes: names; with them each class is scored for itself, too.
    """
    shown = targets.any(0)
    thresholds = np.full(targets.shape[1], EVEN) if thresholds is None else thresholds
    decided = decide(logits, thresholds)
    low, high = _interval(logits[:, shown], targets[:, shown])
    # timm's evaluator knows one threshold for all classes: decisions stand in for the logits.
    of_decided = np.where(decided, 1.0, -1.0)
    return MultiLabelScore(
        map=mean_average_precision(logits, targets),
        n=len(logits),
        low=low,
        high=high,
        micro_f1=_evaluated(of_decided, targets)["micro_f1"],
        macro_f1=_evaluated(of_decided[:, shown], targets[:, shown])["macro_f1"],
        classes=_each(logits, targets, decided, thresholds, classes) if classes else [],
    )


def mean_average_precision(logits: np.ndarray, targets: np.ndarray) -> float:
    """In percent, over the classes that an image shows."""
    shown = targets.any(0)
    return _evaluated(logits[:, shown], targets[:, shown])["map"]


def decide(logits: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Which classes are in the answer: bool [n,classes]."""
    decided: np.ndarray = sigmoid(logits) >= thresholds
    return decided


def agreement(decided: np.ndarray, others: np.ndarray) -> Accuracy:
    """How often two networks give an image the very same labels."""
    return Accuracy.of(int((decided == others).all(1).sum()), len(decided))


def choose_thresholds(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """For each class the threshold whose answers have the highest F1, float64 [classes].

    It lies halfway between the least probability that is taken and the greatest that is not. Of equal ones,
    the highest is chosen; a class that no image shows has even chances.
    """
    chosen = np.full(targets.shape[1], EVEN)
    for c in np.flatnonzero(targets.any(0)):
        probability = sigmoid(logits[:, c])
        order = np.argsort(-probability, kind="stable")
        ranked, right = probability[order], np.cumsum(targets[order, c])
        taken = np.arange(1, len(ranked) + 1)
        ends = np.append(ranked[:-1] != ranked[1:], True)  # equal probabilities are taken together
        f1 = np.where(ends, 2 * right / (taken + right[-1]), -1)
        last = int(f1.argmax())
        below = ranked[last + 1] if last + 1 < len(ranked) else 0.0
        chosen[c] = (ranked[last] + below) / 2
    return chosen


def thresholds_of(subject: Subject) -> np.ndarray | None:
    """Those its score was measured at; None in a single-label set."""
    if subject.multi_label is None:
        return None
    return np.array([one.threshold for one in subject.multi_label.classes])


def mean_thresholds(subjects: Sequence[Subject]) -> np.ndarray | None:
    """For the mean of several networks' probabilities."""
    each = [found for one in subjects if (found := thresholds_of(one)) is not None]
    return np.mean(each, axis=0) if each else None


def near_chance(score: MultiLabelScore, targets: np.ndarray, factor: float) -> float | None:
    """The mAP of a random ranking, where the score is near it: the mean share of images that show a class.

    Near is less than ``factor`` times that, or less than halfway from it to the top where this is nearer; or
    where the interval reaches it.
    """
    shares = targets.mean(0)
    chance = 100 * float(shares[shares > 0].mean())
    near = score.map < min(factor * chance, (100 + chance) / 2) or score.low <= chance
    return chance if near else None


class Ranking:
    """Images of each class by falling score, and where among them those are that show it."""

    def __init__(self, logits: np.ndarray, targets: np.ndarray) -> None:
        scores, shown = np.ascontiguousarray(logits.T), np.ascontiguousarray(targets.T) > 0
        self.order = np.argsort(-scores, axis=1, kind="stable")
        """Numbers of the images [classes,n]."""
        ranked = np.take_along_axis(scores, self.order, axis=1)
        hits = np.take_along_axis(shown, self.order, axis=1)
        last = np.ones(ranked.shape, dtype=bool)
        last[:, :-1] = ranked[:, :-1] != ranked[:, 1:]
        places = np.where(last, np.arange(ranked.shape[1]), ranked.shape[1])
        ends = np.minimum.accumulate(places[:, ::-1], axis=1)[:, ::-1]
        # Of each hit: its class, its image, where the images of its score end, and the last hit up to there.
        self.classes = np.nonzero(hits)[0]
        self.images, self.ends = self.order[hits], ends[hits]
        each = hits.sum(1)
        self.firsts = np.cumsum(each) - each
        self.last_hits = self.firsts[self.classes] + np.cumsum(hits, axis=1)[self.classes, self.ends] - 1


def average_precision(ranking: Ranking, weights: np.ndarray) -> np.ndarray:
    """Each class's average precision, 0 to 1, where image i counts ``weights[i]`` times; NaN without a
    positive one. With ones it is timm's.
    """
    classes, hits = ranking.classes, weights[ranking.images]
    counted = np.concatenate([[0.0], np.cumsum(hits)])
    # Equal scores are one step: precision is that at its end. Where nothing has been seen, nothing is hit.
    found = counted[ranking.last_hits + 1] - counted[ranking.firsts[classes]]
    seen = np.cumsum(weights[ranking.order], axis=1)[classes, ranking.ends]
    precise = np.bincount(classes, hits * found / np.maximum(seen, 1), minlength=len(ranking.order))
    with np.errstate(invalid="ignore"):
        every: np.ndarray = precise / np.bincount(classes, hits, minlength=len(ranking.order))
    return every


def _interval(logits: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the mAP of images drawn anew, with replacement, in percent; moved by as
    much as their mean is too high, since an image that is drawn twice raises average precision.
    """
    n, classes = targets.shape
    resamples = int(np.clip(MOST_WORK // (n * classes), LEAST_RESAMPLES, RESAMPLES))
    sums, counts, own = np.zeros(resamples), np.zeros(resamples), 0.0
    for ranking in _rankings(logits, targets):
        rng = np.random.default_rng(0)  # the same images for all classes
        own += float(average_precision(ranking, np.ones(n)).sum())
        for draw in range(resamples):
            weights = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
            each = average_precision(ranking, weights)
            sums[draw] += np.nansum(each)
            counts[draw] += np.count_nonzero(~np.isnan(each))
    drawn, own = 100 * sums[counts > 0] / counts[counts > 0], 100 * own / classes
    low, high = np.percentile(drawn, (2.5, 97.5)) - (np.mean(drawn) - own)
    return max(0.0, min(float(low), own)), min(100.0, max(float(high), own))


def _rankings(logits: np.ndarray, targets: np.ndarray) -> Iterator[Ranking]:
    """Of a few classes at a time, so that many images of many classes fit into memory."""
    few = max(1, AT_ONCE // len(targets))
    for first in range(0, targets.shape[1], few):
        some = slice(first, first + few)
        yield Ranking(logits[:, some], targets[:, some])


def _evaluated(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    evaluator = MultiLabelClassificationEvaluator()
    evaluator.update(torch.from_numpy(np.ascontiguousarray(logits)), torch.from_numpy(np.array(targets)))
    return dict(evaluator.compute())


def _each(
    logits: np.ndarray,
    targets: np.ndarray,
    decided: np.ndarray,
    thresholds: np.ndarray,
    classes: Sequence[str],
) -> list[ClassScore]:
    ones = np.ones(len(logits))
    precise = 100 * np.concatenate([average_precision(one, ones) for one in _rankings(logits, targets)])
    right = (decided & (targets > 0)).sum(0)
    both = decided.sum(0) + targets.sum(0)
    return [
        ClassScore(
            label=name,
            n=int(targets[:, c].sum()),
            average_precision=None if np.isnan(precise[c]) else float(precise[c]),
            f1=200 * float(right[c] / both[c]) if both[c] else None,
            threshold=float(thresholds[c]),
        )
        for c, name in enumerate(classes)
    ]
