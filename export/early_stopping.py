"""How many runs a percentile needs, and MLPerf's estimate of one from however many there are.

MLPerf's load generator (`loadgen/early_stopping.cc` and `loadgen/results.cc` in mlcommons/inference, scenario
"single stream") asks: were the percentile p truly above some latency, how likely would it be that of n runs
only t or fewer took longer? Where that is less likely than 1 %, t runs may be left aside, and the slowest of
the others is an upper bound of the percentile with 99 % confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.99


def chance(slower: int, runs: int, percentile: float) -> float:
    """The probability that `slower` or fewer of `runs` independent runs take longer than the percentile (0 to
    1): the binomial distribution's, with 1 − percentile for each.
    """
    from scipy.special import bdtr  # type: ignore[import-untyped]

    return float(bdtr(slower, runs, 1 - percentile))


def least_runs(percentile: float, slower: int = 1, confidence: float = CONFIDENCE) -> int:
    """The fewest runs of which `slower` may be slower than the bound: with one, 11 for the median, 64 for
    p90, 130 for p95, 662 for p99, 6636 for p99.9.
    """
    enough = max(2, 2 * (slower + 1))
    while chance(slower, enough, percentile) >= 1 - confidence:
        enough *= 2
    low, high = slower, enough
    while high - low > 1:
        middle = (low + high) // 2
        if chance(slower, middle, percentile) < 1 - confidence:
            high = middle
        else:
            low = middle
    return high


def estimate(samples: Sequence[float] | np.ndarray, percentile: float) -> float | None:
    """MLPerf's early-stopping estimate of a percentile (0 to 1), in the samples' unit: never below the
    percentile with 99 % confidence. None where there are fewer than `least_runs`.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    n = len(ordered)
    if n < least_runs(percentile):
        return None
    # What may be aside grows by about 1 − p for each run more; the rest is found by halving.
    low, high = 1, math.ceil(n * (1 - percentile)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if chance(middle, n, percentile) < 1 - CONFIDENCE:
            low = middle
        else:
            high = middle
    return float(ordered[n - low])
