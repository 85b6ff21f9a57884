"""Percentiles and speed-ups with 95 % intervals.

A percentile's interval is distribution-free: two order statistics, chosen by the binomial distribution (Hahn
and Meeker, Statistical Intervals, section 5.2). Runs of one round are correlated, so the number of samples is
divided by the design effect with rounds as clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..results import Latency, Percentile, Speedup

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}

MIN_SAMPLES = {"p50": 11, "p90": 64, "p95": 130, "p99": 662, "p99_9": 6636}
"""A percentile of fewer samples is not reported. From these numbers on, the probability that at most one
sample is above the percentile is below 1 % (the rule of MLPerf's load generator).
"""

CONFIDENCE_LEVEL = 0.95

PROCESS_STD = 0.006
"""Relative standard deviation assumed between processes of one file if each file had only one process.

`benchmarks/latency/noise.py` measures it: 0.4 % is the median of 14 benches of an int8 MobileNetV2 on two
cores of a Xeon; this is half as much again.
"""

SPEEDUP_LEVEL = 0.98
"""Level at which 95 % intervals of speed-ups are computed. Machines are disturbed in ways that the model does
not cover; with this level, the same file measured twice differs in fewer than 1 of 20 benches there as well.
"""

RESAMPLES = 2000


@dataclass(frozen=True)
class Samples:
    """Run times of one subject at one thread count.

    `ms` float64 [n] are the times in order, `rounds` int64 [n] the round of each. The subject's processes
    take turns: round r was run by process r mod `processes`. `settled` is False if the warm-up reached its
    limit before two windows agreed within 2 %.
    """

    subject: str
    threads: int
    ms: np.ndarray
    rounds: np.ndarray
    processes: int = 1
    settled: bool = True

    @classmethod
    def from_blocks(
        cls,
        subject: str,
        threads: int,
        blocks: Sequence[np.ndarray],
        *,
        settled: bool = True,
        processes: int = 1,
    ) -> Samples:
        """Join blocks of run times in milliseconds, one block per round."""
        rounds = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
        return cls(subject, threads, np.concatenate(blocks), rounds, processes, settled)

    @property
    def blocks(self) -> list[np.ndarray]:
        """The run times of each round."""
        return np.split(self.ms, np.flatnonzero(np.diff(self.rounds)) + 1)

    @cached_property
    def medians(self) -> np.ndarray:
        """The median of each round, float64 [rounds]."""
        return np.array([np.median(block) for block in self.blocks])

    @property
    def process_medians(self) -> np.ndarray:
        """The median over each process's rounds of the log of the round's median, float64 [processes]."""
        logs = np.log(self.medians)
        return np.array([np.median(logs[process :: self.processes]) for process in range(self.processes)])


def summarize(samples: Samples) -> Latency:
    """Return the mean, percentiles and quantiles of run times."""
    return Latency(
        subject=samples.subject,
        threads=samples.threads,
        percentiles=compute_percentiles(samples),
        mean=float(samples.ms.mean()),
        n=len(samples.ms),
        settled=samples.settled,
        quantiles=[float(f"{value:.5g}") for value in np.quantile(samples.ms, np.arange(101) / 100)],
    )


def compute_percentiles(samples: Samples) -> dict[str, Percentile]:
    """Return the percentiles with enough samples, linearly interpolated, and their intervals."""
    ordered = np.sort(samples.ms)
    percentiles = {}
    for name, p in PERCENTILES.items():
        if len(ordered) >= MIN_SAMPLES[name]:
            value = float(np.quantile(ordered, p))
            low, high = _order_statistics(ordered, p, _design_effect(samples, value, p))
            percentiles[name] = Percentile(value=value, low=low, high=high)
    return percentiles


def _design_effect(samples: Samples, value: float, p: float) -> float:
    """Return the between-round variance of the number of runs above `value`.

    It is relative to that of independent runs, and at least 1.
    """
    slow = np.array([np.count_nonzero(block > value) for block in samples.blocks])
    sizes, n = np.bincount(samples.rounds), len(samples.ms)
    squares = float(np.sum((slow - sizes * slow.sum() / n) ** 2))
    correction = len(sizes) / max(1, len(sizes) - 1)
    return max(1.0, squares * correction / (n * p * (1 - p)))


def _order_statistics(
    ordered: np.ndarray, p: float, design_effect: float = 1.0
) -> tuple[float | None, float | None]:
    """Return the two ordered samples that enclose the quantile `p` with 95 % confidence."""
    from scipy.stats import binom  # type: ignore[import-untyped]

    n = len(ordered)
    effective = math.floor(max(1.0, n / design_effect))
    tail = (1 - CONFIDENCE_LEVEL) / 2
    below, above = binom.ppf(tail, effective, p), binom.ppf(1 - tail, effective, p) + 1
    first, last = math.floor(below * n / effective), math.ceil(above * n / effective)
    return (
        float(ordered[first - 1]) if first >= 1 else None,
        float(ordered[last - 1]) if last <= n else None,
    )


@dataclass(frozen=True)
class ProcessSpread:
    """Relative standard deviation between processes of one file.

    `freedom` are its degrees of freedom; 0 if it is assumed to be `PROCESS_STD`.
    """

    std: float
    freedom: int


def compute_process_spread(samples: Sequence[Samples]) -> ProcessSpread:
    """Pool the spread over all subjects of a bench at one thread count."""
    squares, freedom = 0.0, 0
    for subject in samples:
        medians = subject.process_medians
        squares += float(np.sum((medians - medians.mean()) ** 2))
        freedom += len(medians) - 1
    return ProcessSpread(math.sqrt(squares / freedom), freedom) if freedom else ProcessSpread(PROCESS_STD, 0)


def compute_speedup(
    subject: Samples,
    over: Samples,
    *,
    spread: ProcessSpread | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Speedup:
    """Compare two subjects that ran in the same rounds. Raises ValueError if they did not.

    The ratio is the mean over processes, in logs, of the median over their rounds. Its interval combines, as
    independent errors, a paired bootstrap over rounds and Student's t over processes, whose `spread` is by
    default that of these two subjects.
    """
    processes, rounds = subject.processes, len(subject.blocks)
    same_rounds = rounds == len(over.blocks) and processes == over.processes
    if subject.threads != over.threads or not same_rounds:
        raise ValueError(f"{subject.subject} and {over.subject} did not run in the same rounds")
    ratios = np.log(over.medians) - np.log(subject.medians)
    ratios = ratios[: rounds // processes * processes].reshape(-1, processes)
    middle = float(np.median(ratios, axis=0).mean())
    low, high = _bootstrap_rounds(ratios, np.random.default_rng(seed), resamples)
    half = _process_half_width(spread or compute_process_spread([subject, over]), processes)
    return Speedup(
        subject=subject.subject,
        over=over.subject,
        threads=subject.threads,
        ratio=math.exp(middle),
        low=math.exp(middle - math.hypot(middle - low, half)),
        high=math.exp(middle + math.hypot(high - middle, half)),
    )


def _bootstrap_rounds(ratios: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
    """Return the interval of the mean of the columns' medians; `ratios` [rounds, processes].

    Circular block bootstrap (Politis and Romano, 1992) with blocks of the cube root of the number of rounds;
    expanded percentile interval (Hesterberg, 2014), which widens the percentiles for few rounds.
    """
    from scipy.stats import norm, t

    rounds = len(ratios)
    if rounds < 2:
        return -math.inf, math.inf
    length = max(1, round(rounds ** (1 / 3)))
    starts = rng.integers(0, rounds, (resamples, math.ceil(rounds / length)))
    indices = (starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :rounds] % rounds
    means = np.median(ratios[indices], axis=1).mean(axis=1)
    tail = norm.cdf(t.ppf((1 - SPEEDUP_LEVEL) / 2, rounds - 1) * math.sqrt(rounds / (rounds - 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _process_half_width(spread: ProcessSpread, processes: int) -> float:
    """Return half the width, in logs, of the interval of the difference between two subjects."""
    from scipy.stats import norm, t

    upper = 1 - (1 - SPEEDUP_LEVEL) / 2
    factor = t.ppf(upper, spread.freedom) if spread.freedom else norm.ppf(upper)
    return float(factor * spread.std * math.sqrt(2 / processes))
