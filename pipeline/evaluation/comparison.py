"""Statistics that compare networks: tests, Holm's correction, intervals, Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot

import numpy as np
from scipy.stats import binomtest, chi2_contingency  # type: ignore[import-untyped]

from ..runs.scores import Proportion, Score

SIGNIFICANT = 0.05


def mcnemar(worse: int, better: int) -> float:
    """Return the two-sided p of McNemar's exact test.

    ``worse`` images are classified correctly by the first network only, ``better`` by the second only.
    """
    return float(binomtest(worse, worse + better).pvalue) if worse + better else 1.0


def paired_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two accuracies on the same n images, in points.

    Wald's with half an image added to each of the four counts (Agresti, Min, Statistics in Medicine 2005).
    """
    b, c, total = only_first + 0.5, only_second + 0.5, n + 2.0
    center, half = (b - c) / total, 1.96 * (b + c - (b - c) ** 2 / total) ** 0.5 / total
    return 100 * max(-1.0, center - half), 100 * min(1.0, center + half)


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values of several tests adjusted for a family-wise error of 5 % (Holm 1979), in order."""
    order = np.argsort(np.asarray(p, dtype=np.float64), kind="stable")
    adjusted, least = [1.0] * len(p), 0.0
    for rank, place in enumerate(order.tolist()):
        least = max(least, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = least
    return adjusted


def bootstrap_interval(drawn: np.ndarray, percent: float) -> tuple[float, float]:
    """Return the 95 % percentile interval of a percentage by those of resamples, [R].

    It is shifted by the resamples' bias, since an image that is drawn twice raises average precision.
    """
    low, high = np.percentile(drawn, (2.5, 97.5)) - (np.mean(drawn) - percent)
    return max(0.0, min(float(low), percent)), min(100.0, max(float(high), percent))


@dataclass(frozen=True)
class UnpairedTest:
    """p of the chi-squared test without correction, and the interval of the difference in points."""

    p: float
    low: float
    high: float


def compare_unpaired(first: Proportion | Score, second: Proportion | Score) -> UnpairedTest:
    """Compare two accuracies that may have been measured on different images.

    The interval of first minus second follows Newcombe (1998, method 10): from both Wilson intervals.
    """
    assert first.correct is not None and second.correct is not None
    table = [[first.correct, first.n - first.correct], [second.correct, second.n - second.correct]]
    all_alike = any(sum(column) == 0 for column in zip(*table, strict=True))
    p = 1.0 if all_alike else float(chi2_contingency(table, correction=False).pvalue)
    difference = first.percent - second.percent
    return UnpairedTest(
        p,
        difference - hypot(first.percent - first.low, second.high - second.percent),
        difference + hypot(first.high - first.percent, second.percent - second.low),
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto-optimal (cost, score) pairs, all finite, the cheapest first."""
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        last = points[kept[-1]] if kept else None
        # Keep both of two equal points: a reader would take the omitted one for worse.
        if last is None or points[i][1] > last[1] or points[i] == last:
            kept.append(i)
    return kept
