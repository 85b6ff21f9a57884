"""What is said of a subject's runs, and of two subjects that ran in the same rounds.

Percentiles come with distribution-free intervals: two of the ordered samples, chosen by the binomial
distribution (Hahn and Meeker, Statistical Intervals, section 5.2). Runs of one round resemble each other, so
they count as fewer: by how much more the numbers of slow runs vary between rounds than chance would have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from ..early_stopping import least_runs

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
MINIMUM_SAMPLES = {name: least_runs(p) for name, p in PERCENTILES.items()}
"""A percentile of fewer runs is not told: 11, 64, 130, 662 and 6636 of them."""

LEVEL = 0.95
"""Of every interval here."""


@dataclass(frozen=True)
class Interval:
    """Ends in the unit of what they belong to; None where the samples do not bound it."""

    low: float | None
    high: float | None


@dataclass(frozen=True)
class Latency:
    """One subject at one thread count, in milliseconds; a percentile is None where too few runs carry it.

    `samples` float64 [n] are all runs in order, `rounds` int64 [n] the round each belongs to. Its `processes`
    took turns: round r was run by process r mod `processes`. `settled` is False where warm-up ended at its
    limit before two windows agreed within 2 %.
    """

    subject: str
    threads: int
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    p99_9: float | None
    mean: float
    n: int
    settled: bool
    samples: np.ndarray
    rounds: np.ndarray
    processes: int = 1
    intervals: dict[str, Interval] = field(default_factory=dict)
    """By the percentile's name."""

    def to_dict(self) -> dict[str, Any]:
        """All but the samples, for JSON."""
        aside = ("samples", "rounds", "intervals")
        told = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in aside}
        ends = {name: [one.low, one.high] for name, one in self.intervals.items()}
        return {**told, "intervals": ends}

    @cached_property
    def medians(self) -> np.ndarray:
        """Of each round, float64 [rounds]."""
        return np.array([np.median(block) for block in self.blocks])

    @property
    def blocks(self) -> list[np.ndarray]:
        """The samples of each round."""
        return np.split(self.samples, np.flatnonzero(np.diff(self.rounds)) + 1)

    @property
    def of_processes(self) -> np.ndarray:
        """Each process's median over its rounds of the logarithm of a round's median: float64 [processes]."""
        logs = np.log(self.medians)
        return np.array([np.median(logs[one :: self.processes]) for one in range(self.processes)])


def summarise(
    subject: str,
    threads: int,
    blocks: Sequence[np.ndarray],
    settled: bool = True,
    processes: int = 1,
) -> Latency:
    """The figures of a subject's blocks, one a round, float64 milliseconds each; percentiles interpolate
    linearly.
    """
    samples = np.concatenate(blocks)
    rounds = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
    ordered = np.sort(samples)
    given, intervals = {}, {}
    for name, p in PERCENTILES.items():
        given[name] = float(np.quantile(ordered, p)) if len(ordered) >= MINIMUM_SAMPLES[name] else None
        if given[name] is not None:
            slow = np.array([np.count_nonzero(block > given[name]) for block in blocks])
            intervals[name] = _order_statistics(ordered, p, _repetition(slow, rounds, p))
    return Latency(
        subject,
        threads,
        **given,
        mean=float(samples.mean()),
        n=len(samples),
        settled=settled,
        samples=samples,
        rounds=rounds,
        processes=processes,
        intervals=intervals,
    )


def _repetition(slow: np.ndarray, rounds: np.ndarray, p: float) -> float:
    """How many runs count as one, at least 1: the variance between rounds of the numbers of slow runs over
    that of independent ones (the design effect of survey sampling, with rounds as clusters).
    """
    sizes = np.bincount(rounds)
    expected = len(rounds) * p * (1 - p)
    spread = float(np.sum((slow - sizes * slow.sum() / len(rounds)) ** 2))
    of_few = len(sizes) / max(1, len(sizes) - 1)
    return max(1.0, spread * of_few / expected)


def _order_statistics(ordered: np.ndarray, p: float, repetition: float = 1.0) -> Interval:
    """The two of the ordered samples that hold the quantile `p` between them, 95 times of 100."""
    from scipy.stats import binom  # type: ignore[import-untyped]

    n = len(ordered)
    counted = max(1.0, n / repetition)
    tail = (1 - LEVEL) / 2
    whole = math.floor(counted)
    below, above = binom.ppf(tail, whole, p), binom.ppf(1 - tail, whole, p) + 1
    first, last = math.floor(below * n / whole), math.ceil(above * n / whole)
    return Interval(
        float(ordered[first - 1]) if first >= 1 else None,
        float(ordered[last - 1]) if last <= n else None,
    )
