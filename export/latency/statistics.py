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


PROCESS_SPREAD = 0.006
"""Standard deviation of the latency of processes of the same file, relative, where a bench has only one
process of each. `benchmarks/bench_noise.py` prints what a machine shows: 0.4 percent, the median of 14
benches of an int8 MobileNetV2 on two cores of a Xeon; half as much again is assumed."""

COMPUTED_AT = 0.98
"""The level at which intervals are computed that are told as 95 %. Machines disturb in ways that no model
knows; so the same file twice is told apart in fewer than 1 of 20 benches on them as well.
"""

RESAMPLES = 2000


@dataclass(frozen=True)
class Speedup:
    """How many times faster than `baseline` a subject is: the ratio of per-round medians, with a 95 %
    interval.
    """

    subject: str
    baseline: str
    threads: int
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """'faster', 'slower', or 'no difference' where the interval holds 1."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference"


@dataclass(frozen=True)
class Spread:
    """How much processes of the same file differ: the relative standard deviation, and how many differences
    it was found from; 0 where it was not found here but is `PROCESS_SPREAD`.
    """

    deviation: float
    freedom: int


def process_spread(latencies: Sequence[Latency]) -> Spread:
    """From all subjects of one bench at one thread count, pooled."""
    squares, freedom = 0.0, 0
    for one in latencies:
        of_processes = one.of_processes
        squares += float(np.sum((of_processes - of_processes.mean()) ** 2))
        freedom += len(of_processes) - 1
    if not freedom:
        return Spread(PROCESS_SPREAD, 0)
    return Spread(math.sqrt(squares / freedom), freedom)


def speedup(
    subject: Latency,
    baseline: Latency,
    *,
    spread: Spread | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Speedup:
    """Compare two subjects that ran in the same rounds. Raises ValueError where they did not.

    The ratio is the mean over processes, in logarithms, of the median over their rounds. Its interval is put
    together of two, whose widths add as those of independent errors do: the paired bootstrap's over rounds,
    and Student's over processes, whose `spread` is that of the whole bench, or by default of these two.
    """
    turns, rounds = subject.processes, len(subject.blocks)
    in_step = rounds == len(baseline.blocks) and turns == baseline.processes
    if subject.threads != baseline.threads or not in_step:
        raise ValueError(f"{subject.subject} and {baseline.subject} did not run in the same rounds")
    ratios = np.log(baseline.medians) - np.log(subject.medians)
    ratios = ratios[: rounds // turns * turns].reshape(-1, turns)
    middle = float(np.median(ratios, axis=0).mean())
    low, high = _over_rounds(ratios, np.random.default_rng(seed), resamples)
    half = _over_processes(spread or process_spread([subject, baseline]), turns)
    return Speedup(
        subject.subject,
        baseline.subject,
        subject.threads,
        math.exp(middle),
        math.exp(middle - math.hypot(middle - low, half)),
        math.exp(middle + math.hypot(high - middle, half)),
    )


def _over_rounds(ratios: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
    """The bootstrap interval of the mean of the columns' medians; `ratios` [rounds, processes].

    Drawn are stretches of neighbouring rounds, in a circle, as long as the cube root of their number
    (Politis and Romano, 1992); and the percentiles lie further out than 2.5 and 97.5, as far as Student's
    distribution does for so few rounds (the "expanded percentile interval" of Hesterberg, 2014).
    """
    from scipy.stats import norm, t

    rounds = len(ratios)
    if rounds < 2:
        return -math.inf, math.inf
    length = max(1, round(rounds ** (1 / 3)))
    begins = rng.integers(0, rounds, (resamples, math.ceil(rounds / length)))
    places = (begins[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :rounds] % rounds
    drawn = np.median(ratios[places], axis=1).mean(axis=1)
    outer = norm.cdf(t.ppf((1 - COMPUTED_AT) / 2, rounds - 1) * math.sqrt(rounds / (rounds - 1)))
    low, high = np.quantile(drawn, [outer, 1 - outer])
    return float(low), float(high)


def _over_processes(spread: Spread, processes: int) -> float:
    """Half the interval's width, in logarithms, of the difference of two subjects."""
    from scipy.stats import norm, t

    upper = 1 - (1 - COMPUTED_AT) / 2
    factor = t.ppf(upper, spread.freedom) if spread.freedom else norm.ppf(upper)
    return float(factor * spread.deviation * math.sqrt(2 / processes))
