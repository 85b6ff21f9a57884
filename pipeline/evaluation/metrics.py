"""Answers of a network over a role's images, and what they amount to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, chi2_contingency  # type: ignore[import-untyped]
from torch import Tensor, nn

from ..runs.device import Engine
from ..runs.scores import Accuracy, ClassResult, Score
from . import multi_label

BATCH = 128
AT_ONCE = 4096
"""Images whose classes are ranked together."""
UNEVEN = 1.5
"""Classes are uneven when the largest has more than this many times the images of the smallest."""


@torch.no_grad()
def logits(
    network: nn.Module,
    normalise: nn.Module,
    pixels: Tensor,
    engine: Engine,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The network's logits in eval mode, fp32 [N,classes] on the host.

    Args:
        pixels: uint8 [N,S,S,3], as the runtime renders them.
    """
    was_training = network.training
    network.eval()
    answers = []
    for start, batch in batches(pixels, engine.device):
        with engine.autocast():
            answers.append(network(normalise(batch)).float().cpu())
        if progress is not None:
            progress(start + len(batch), len(pixels))
    network.train(was_training)
    return torch.cat(answers) if answers else torch.empty(0)


def batches(pixels: Tensor, device: str, size: int = BATCH) -> Iterator[tuple[int, Tensor]]:
    """Rendered images uint8 [N,S,S,3] as (index of the first, uint8 [B,3,S,S] on the device)."""
    for start in range(0, len(pixels), size):
        yield start, pixels[start : start + size].to(device).permute(0, 3, 1, 2)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Top-1 (and top-5 above ten classes) with its interval; the balanced one where classes are uneven.

    Args:
        logits: [N,classes]; labels: [N]; N > 0.
    """
    right = logits.argmax(1) == labels
    counts = np.bincount(labels, minlength=logits.shape[1])
    present = counts > 0
    balanced = None
    if counts[present].max() > UNEVEN * counts[present].min():
        balanced = 100 * float(
            (np.bincount(labels[right], minlength=len(counts))[present] / counts[present]).mean()
        )
    five = top5(logits, labels)
    return Accuracy.of(
        int(right.sum()), len(labels), balanced=balanced, top5=None if five is None else five.top1
    )


def top5(logits: np.ndarray, labels: np.ndarray) -> Accuracy | None:
    """How often the label is among the five likeliest classes, of more than ten; else None."""
    if logits.shape[1] <= 10:
        return None
    correct = 0
    for start in range(0, len(logits), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        best = np.argpartition(-logits[some], 4, axis=1)[:, :5]
        correct += int((best == labels[some, None]).any(1).sum())
    return Accuracy.of(correct, len(labels))


def percent(logits: np.ndarray, labels: np.ndarray) -> float:
    """The figure that networks are compared by while they learn: top-1, or mAP where images have several
    labels [N,classes]; in percent.
    """
    if labels.ndim == 1:
        return accuracy(logits, labels).top1
    return multi_label.mean_average_precision(logits, labels)


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Accuracy; where images have several labels the mean average precision."""
    return accuracy(logits, labels) if labels.ndim == 1 else multi_label.score(logits, labels)


def measured(
    logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], thresholds: np.ndarray | None = None
) -> dict[str, Any]:
    """What the test images tell of a network, as fields of ``Subject``.

    Args:
        thresholds: where images have several labels.
    """
    if labels.ndim == 1:
        return {"accuracy": accuracy(logits, labels), "per_class": per_class(logits, labels, classes)}
    return {"multi_label": multi_label.score(logits, labels, thresholds, classes)}


def selected(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What the val images tell of a network before export, as a field of ``Subject``."""
    if labels.ndim == 1:
        return {"val_accuracy": accuracy(logits, labels)}
    return {"val_multi_label": multi_label.score(logits, labels)}


def agreement(
    logits: np.ndarray,
    others: np.ndarray,
    thresholds: np.ndarray | None = None,
    others_thresholds: np.ndarray | None = None,
) -> Accuracy:
    """How often two networks give the same answer; with thresholds the very same labels."""
    if thresholds is not None and others_thresholds is not None:
        return multi_label.agreement(
            multi_label.decide(logits, thresholds), multi_label.decide(others, others_thresholds)
        )
    return Accuracy.of(int((logits.argmax(1) == others.argmax(1)).sum()), len(logits))


def per_class(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> list[ClassResult]:
    right = logits.argmax(1) == labels
    return [
        ClassResult(label=name, n=int((labels == c).sum()), correct=int(right[labels == c].sum()))
        for c, name in enumerate(classes)
    ]


def confusion(logits: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Counts [true class][answer]."""
    n = logits.shape[1]
    flat = np.bincount(labels * n + logits.argmax(1), minlength=n * n)
    table: list[list[int]] = flat.reshape(n, n).tolist()
    return table


SIGNIFICANT = 0.05


def mcnemar(worse: int, better: int) -> float:
    """The exact two-sided p of McNemar's test, from how many images one file alone has right and the other
    alone."""
    return float(binomtest(worse, worse + better).pvalue) if worse + better else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, made larger so that of all of them together 5 % are wrong at most (Holm
    1979); in the order given.
    """
    order = np.argsort(np.asarray(p, dtype=np.float64), kind="stable")
    adjusted, least = [1.0] * len(p), 0.0
    for rank, place in enumerate(order.tolist()):
        least = max(least, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = least
    return adjusted


@dataclass(frozen=True)
class Unpaired:
    """Two shares of different images: ``p`` of the chi-squared test without correction, and the interval of
    their difference in points (first minus second).
    """

    p: float
    low: float
    high: float


def unpaired(first: Accuracy, second: Accuracy) -> Unpaired:
    """Two accuracies of which it is not known which images they are about.

    The interval is Newcombe's (1998, method 10): from both Wilson intervals.
    """
    table = [[one.correct, one.n - one.correct] for one in (first, second)]
    all_alike = any(sum(column) == 0 for column in zip(*table, strict=True))
    p = 1.0 if all_alike else float(chi2_contingency(table, correction=False).pvalue)
    difference = first.top1 - second.top1
    return Unpaired(
        p,
        difference - hypot(first.top1 - first.low, second.high - second.top1),
        difference + hypot(first.high - first.top1, second.top1 - second.low),
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Those that no other beats: none is as cheap and as good, and better in one of the two.

    Args:
        points: what each costs (less is better) and what it gives (more is better), both finite.

    Returns:
        Their indices, the cheapest first.
    """
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        last = points[kept[-1]] if kept else None
        # Of two alike in both neither beats the other: only their order or their names could choose one, and
        # a reader would take the other for worse.
        if last is None or points[i][1] > last[1] or points[i] == last:
            kept.append(i)
    return kept
