"""Whether two networks differ: exact tests on the same images, tests on different ones, and many at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot

import numpy as np
from scipy.stats import binomtest, chi2_contingency  # type: ignore[import-untyped]

from .runs.scores import Accuracy

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
