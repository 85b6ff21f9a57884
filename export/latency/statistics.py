"""Percentiles and speed-ups with 95 % intervals.

A percentile's interval is distribution-free: two order statistics, chosen by the binomial distribution (Hahn
and Meeker, Statistical Intervals, section 5.2). Runs of one round are correlated, so the number of samples is
divided by the design effect with rounds as clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..device.bench import MIN_SAMPLES
from ..results import Latency, Percentile, Speedup

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}

CONFIDENCE_LEVEL = 0.95

PROCESS_STD = 0.006
"""Relative standard deviation assumed between processes of one file if each file had only one process.

`benchmarks/latency/noise.py` measures it: 0.4 % is the median of 14 benches of an int8 MobileNetV2 on two
cores of a Xeon; this is half as much again.
"""

RESAMPLES = 2000

PROCESSOR_QUANTILE = 0.01
"""Quantile of the processor times that is compared. Processes that use caches and memory add to the processor
time of others, twofold in the median of an fp32 MobileNetV2, but hardly in its fastest runs.
"""

MAX_PROCESSOR_INTERVAL = 1.1
"""Largest ratio of the ends of an interval of processor times; above it the speed-up is not reported."""

_GRID = np.linspace(0, 1, 401) ** 2
"""Quantiles at which the distribution of runs is stored for the bootstrap."""


@dataclass(frozen=True)
class Samples:
    """Run times of one subject at one thread count: a block for each round, float64 [runs], milliseconds.

    The subject's processes take turns: round r was run by process r mod `processes`. `settled` is False if
    the warm-up reached its limit before two windows agreed within 2 %. `processor_blocks` are the same runs
    in processor time, the sum of all threads; None if it was not measured. `quantile` is the one that is
    compared.
    """

    subject: str
    threads: int
    blocks: Sequence[np.ndarray]
    processes: int = 1
    settled: bool = True
    processor_blocks: Sequence[np.ndarray] | None = None
    quantile: float = 0.5

    @property
    def in_processor_time(self) -> Samples | None:
        """The same runs in processor time; None if it was not measured, or the clock is too coarse."""
        if self.processor_blocks is None:
            return None
        samples = replace(
            self, blocks=self.processor_blocks, processor_blocks=None, quantile=PROCESSOR_QUANTILE
        )
        return samples if samples.compared_ms > 0 else None

    @cached_property
    def ms(self) -> np.ndarray:
        """All run times in order, float64 [n]."""
        return np.concatenate(self.blocks)

    @cached_property
    def medians(self) -> np.ndarray:
        """The median of each round, float64 [rounds]."""
        return np.array([np.median(block) for block in self.blocks])

    @property
    def compared_ms(self) -> float:
        """The run time that is compared: the median, or another `quantile`."""
        return float(np.quantile(self.ms, self.quantile))

    @property
    def process_logs(self) -> np.ndarray:
        """The log of the `quantile` of each process's runs, float64 [processes]."""
        runs = [np.concatenate(self.blocks[process :: self.processes]) for process in range(self.processes)]
        return np.log([np.quantile(ms, self.quantile) for ms in runs])


def summarize(samples: Samples, *, wall_time: bool = True) -> Latency:
    """Return the mean, percentiles and quantiles of run times; without `wall_time` only processor time."""
    quantiles = np.quantile(samples.ms, np.arange(101) / 100) if wall_time else []
    processor = samples.in_processor_time
    return Latency(
        subject=samples.subject,
        threads=samples.threads,
        percentiles=compute_percentiles(samples) if wall_time else {},
        mean=float(samples.ms.mean()) if wall_time else None,
        processor_ms=None if processor is None else processor.compared_ms,
        n=len(samples.ms),
        settled=samples.settled,
        quantiles=[float(f"{value:.5g}") for value in quantiles],
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
    sizes, n = np.array([len(block) for block in samples.blocks]), len(samples.ms)
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
        logs = subject.process_logs
        squares += float(np.sum((logs - logs.mean()) ** 2))
        freedom += len(logs) - 1
    return ProcessSpread(math.sqrt(squares / freedom), freedom) if freedom else ProcessSpread(PROCESS_STD, 0)


def compare(
    samples: Sequence[Samples], subject: str, over: str, *, wall_time: bool, seed: int
) -> Speedup | None:
    """Compare two subjects of a bench at one thread count.

    Without `wall_time` by their processor times. None if that is impossible: with several threads, processor
    time includes waiting for each other; or it varies too much, or was not measured.
    """
    if not wall_time:
        clocked = [s.in_processor_time for s in samples if s.threads == 1]
        samples = [s for s in clocked if s is not None]
    by_name = {s.subject: s for s in samples}
    if not wall_time and not {subject, over} <= set(by_name):
        return None
    spread = compute_process_spread(samples)
    speedup = compute_speedup(by_name[subject], by_name[over], spread=spread, seed=seed)
    if wall_time:
        return speedup
    is_stable = speedup.high <= MAX_PROCESSOR_INTERVAL * speedup.low
    return speedup.model_copy(update={"clock": "processor"}) if is_stable else None


def compute_speedup(
    subject: Samples,
    over: Samples,
    *,
    spread: ProcessSpread | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Speedup:
    """Compare two subjects that ran in the same rounds. Raises ValueError if they did not.

    The ratio is that of the medians (or other `quantile`) of all runs, which are reported too. Its interval
    combines, as independent errors, a paired bootstrap over rounds and Student's t over processes, whose
    `spread` is by default that of these two subjects.
    """
    from scipy.stats import t

    processes, rounds = subject.processes, len(subject.blocks)
    same_rounds = rounds == len(over.blocks) and processes == over.processes
    if subject.threads != over.threads or not same_rounds:
        raise ValueError(f"{subject.subject} and {over.subject} did not run in the same rounds")
    middle = math.log(over.compared_ms / subject.compared_ms)
    low, high = _bootstrap_rounds(subject, over, np.random.default_rng(seed), resamples)
    spread = spread or compute_process_spread([subject, over])
    # In logs, of the difference between two subjects; Student's t is normal at infinite degrees of freedom.
    quantile = t.ppf((1 + CONFIDENCE_LEVEL) / 2, spread.freedom or math.inf)
    half = float(quantile * spread.std * math.sqrt(2 / processes))
    return Speedup(
        subject=subject.subject,
        over=over.subject,
        threads=subject.threads,
        ratio=math.exp(middle),
        low=math.exp(middle - math.hypot(middle - low, half)),
        high=math.exp(middle + math.hypot(high - middle, half)),
    )


def _bootstrap_rounds(
    subject: Samples, over: Samples, rng: np.random.Generator, resamples: int
) -> tuple[float, float]:
    """Return the interval of the log of the ratio, resampling the rounds of both together.

    Circular block bootstrap (Politis and Romano, 1992) of cycles, in which each process runs once, with
    blocks of the cube root of the number of cycles; expanded percentile interval (Hesterberg, 2014), which
    widens the percentiles for few cycles.
    """
    from scipy.stats import norm, t

    rounds = len(subject.blocks)
    cycles = math.ceil(rounds / subject.processes)
    if cycles < 2:
        return -math.inf, math.inf
    length = max(1, round(cycles ** (1 / 3)))
    starts = rng.integers(0, cycles, (resamples, math.ceil(cycles / length)))
    indices = (starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :cycles] % cycles
    drawn = np.zeros((resamples, cycles))
    np.add.at(drawn, (np.arange(resamples)[:, None], indices), 1)
    weights = np.repeat(drawn, subject.processes, axis=1)[:, :rounds]
    ratios = np.log(_weighted_quantiles(over, weights) / _weighted_quantiles(subject, weights))
    tail = norm.cdf(t.ppf((1 - CONFIDENCE_LEVEL) / 2, cycles - 1) * math.sqrt(cycles / (cycles - 1)))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def _weighted_quantiles(samples: Samples, weights: np.ndarray) -> np.ndarray:
    """Return the `quantile` of all runs for each row of `weights` [resamples, rounds], from a grid."""
    grid = np.quantile(samples.ms, _GRID)
    below = np.stack([np.searchsorted(np.sort(block), grid, side="right") for block in samples.blocks])
    sizes = np.array([len(block) for block in samples.blocks])
    fractions = weights @ below / (weights @ sizes)[:, None]
    return np.array([np.interp(samples.quantile, row, grid) for row in fractions])
