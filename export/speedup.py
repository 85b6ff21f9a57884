"""How many times faster one subject is than another, with an interval that can be believed.

A round's ratio of medians cancels what both subjects suffered in it. Two things would make an interval over
rounds alone too narrow: rounds beside each other resemble each other, so whole stretches of rounds are drawn;
and two processes of the very same file differ by a little for as long as they live (where their memory lies,
how it was scheduled), which no number of rounds averages out. So every subject runs in several processes,
which take turns, and the interval is as wide as they differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .latency.statistics import Latency

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
    from scipy.stats import norm, t  # type: ignore[import-untyped]

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
