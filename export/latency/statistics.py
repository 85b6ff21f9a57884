"""Percentiles and speed-ups with 95 % intervals, and checks for disturbances.

A percentile's interval is distribution-free: two order statistics, chosen by the binomial distribution (Hahn
and Meeker, Statistical Intervals, section 5.2). Runs of one round are correlated, so the number of samples is
divided by the design effect with rounds as clusters.

A disturbance raises a flag with a name, a sentence and its figures. A flag removes no result; it marks
results that may be unreliable.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .. import runtime
from ..results import Flag, Latency, Percentile, Speedup

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

LIMITS = {
    # Fraction of the pinned cores' time used by other processes. An idle Linux uses about 1 % of a core for
    # itself; from 10 % on, p90 is that of the other process.
    "neighbor": 0.05,
    # Fraction of the whole machine used by others on other cores, which shares caches, memory and turbo.
    "machine": 0.10,
    # Fraction of the pinned cores' time that the host of a virtual machine gave to others.
    "steal": 0.01,
    # Number of times that the cgroup exceeded its CPU quota; each stops all threads for up to 0.1 s.
    "throttled": 0.0,
    # Middle 80 % of the sentinel's readings over their median: 2 to 7 % in quiet benches on two cores of a
    # Xeon (`benchmarks/latency/noise.py`), 10 % and more in disturbed ones.
    "sentinel": 0.10,
    # Change of the median from the first to the last third of the rounds.
    "drift": 0.03,
    # Fastest to slowest process of the same file: 0.1 to 3.4 % in the same quiet benches.
    "repeat": 0.05,
}
"""A flag is raised above these limits, which are relative except for `throttled`."""


@dataclass(frozen=True)
class Samples:
    """Run times of one subject at one thread count: a block for each round, float64 [runs], milliseconds.

    The subject's processes take turns: round r was run by process r mod `processes`. `settled` is False if
    the warm-up reached its limit before two windows agreed within 2 %.
    """

    subject: str
    threads: int
    blocks: Sequence[np.ndarray]
    processes: int = 1
    settled: bool = True

    @cached_property
    def ms(self) -> np.ndarray:
        """All run times in order, float64 [n]."""
        return np.concatenate(self.blocks)

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
    from scipy.stats import t

    processes, rounds = subject.processes, len(subject.blocks)
    same_rounds = rounds == len(over.blocks) and processes == over.processes
    if subject.threads != over.threads or not same_rounds:
        raise ValueError(f"{subject.subject} and {over.subject} did not run in the same rounds")
    ratios = np.log(over.medians) - np.log(subject.medians)
    ratios = ratios[: rounds // processes * processes].reshape(-1, processes)
    middle = float(np.median(ratios, axis=0).mean())
    low, high = _bootstrap_rounds(ratios, np.random.default_rng(seed), resamples)
    spread = spread or compute_process_spread([subject, over])
    # In logs, of the difference between two subjects; Student's t is normal at infinite degrees of freedom.
    quantile = t.ppf(1 - (1 - SPEEDUP_LEVEL) / 2, spread.freedom or math.inf)
    half = float(quantile * spread.std * math.sqrt(2 / processes))
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


@dataclass(frozen=True)
class Counters:
    """The system's counters at one time, in seconds by core; None if the system does not report them.

    `parent_seconds` is the processor time of this process, which is not pinned.
    """

    time: float
    busy: Mapping[int, float] | None
    stolen: Mapping[int, float] | None
    throttled: int | None
    parent_seconds: float = 0.0


def read_counters(proc: Path = Path("/proc")) -> Counters:
    """Read the counters as they are now."""
    cores = _read_stat(proc / "stat")
    busy = {core: busy for core, (busy, _) in cores.items()} or None
    stolen = {core: stolen for core, (_, stolen) in cores.items()} or None
    return Counters(time.monotonic(), busy, stolen, count_throttled(), time.process_time())


def _read_stat(file: Path) -> dict[int, tuple[float, float]]:
    """Return the busy and stolen seconds of each core since boot (proc_stat(5))."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, ValueError):
        return {}
    ticks = os.sysconf("SC_CLK_TCK")
    cores = {}
    for line in lines:
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and len(counts) >= 8:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, counts[:8])
            cores[int(name[3:])] = ((user + nice + system + irq + softirq) / ticks, steal / ticks)
    return cores


def count_throttled(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return how often the CPU quota of this process's cgroups (v1 or v2) stopped it, None if unknown."""
    counts = []
    for folder, _ in runtime.cgroup_folders(proc, root):
        try:
            lines = (folder / "cpu.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        counts += [int(line.split()[1]) for line in lines if line.startswith("nr_throttled ")]
    return max(counts, default=None)


def list_unchecked(before: Counters, cores: Sequence[int]) -> list[str]:
    """Return the flags that this system has no counters for."""
    missing = []
    if before.busy is None or not set(cores) <= set(before.busy):
        missing += ["neighbor", "machine", "steal"]
    if before.throttled is None:
        missing.append("throttled")
    return missing


def check_counters(
    before: Counters, after: Counters, bench_seconds: float, cores: Sequence[int], threads: int
) -> list[Flag]:
    """Compare the counters before and after a bench.

    Its processes used `bench_seconds` of processor time on `cores`.
    """
    findings: dict[str, tuple[float, str]] = {}
    wall = max(after.time - before.time, 1e-9)
    used = _difference(before.busy, after.busy)
    pinned = [core for core in cores or used if core in used]
    if pinned:
        parent, elsewhere = after.parent_seconds - before.parent_seconds, set(used) - set(pinned)
        own = bench_seconds + (0.0 if elsewhere else parent)
        others = max(0.0, sum(used[core] for core in pinned) - own) / (wall * len(pinned))
        findings["neighbor"] = others, f"Other processes used {_percent(others)} of the cores under test."
        others = max(0.0, sum(used[core] for core in elsewhere) - parent) / (wall * len(used))
        findings["machine"] = (
            others,
            f"Other processes used {_percent(others)} of the machine, on cores that were not under test.",
        )
        stolen = _difference(before.stolen, after.stolen)
        fraction = sum(stolen[core] for core in pinned) / (wall * len(pinned))
        sentence = f"The host gave {_percent(fraction)} of this virtual machine's cores to others."
        findings["steal"] = fraction, sentence
    if before.throttled is not None and after.throttled is not None:
        times = after.throttled - before.throttled
        findings["throttled"] = times, f"The container's CPU quota stopped its processes {times} times."
    return _raise_flags(findings, threads)


def check_sentinel(readings: np.ndarray, threads: int) -> list[Flag]:
    """Check the spread of the sentinel's `readings`, float64 [rounds], milliseconds."""
    low, middle, high = np.quantile(readings, [0.1, 0.5, 0.9])
    sentence = (
        f"A fixed computation took {low:.3g} to {high:.3g} ms: the clock speed changed, or other processes "
        "used the cores."
    )
    return _raise_flags({"sentinel": ((high - low) / middle, sentence)}, threads)


def check_samples(samples: Sequence[Samples], readings: np.ndarray, threads: int) -> list[Flag]:
    """Check for drift of subjects and sentinel, differing processes, and warm-ups that did not settle."""
    drifts = {subject.subject: compute_drift(subject.medians) for subject in samples}
    drifts["the sentinel"] = compute_drift(readings)
    name = max(drifts, key=lambda name: abs(drifts[name]))
    drift = drifts[name]
    drift_sentence = (
        f"In the last third of the rounds {name} was {_percent(abs(drift))} "
        f"{'slower' if drift > 0 else 'faster'} than in the first."
    )
    spreads = {subject.subject: float(np.ptp(subject.process_medians)) for subject in samples}
    name = max(spreads, key=lambda name: spreads[name])
    spread = float(np.expm1(spreads[name]))
    spread_sentence = (
        f"Processes of the same file ({name}) differ by {_percent(spread)}, which widens the intervals of "
        "the speed-ups."
    )
    findings = {"drift": (abs(drift), drift_sentence), "repeat": (spread, spread_sentence)}
    flags = _raise_flags(findings, threads)
    unsettled = [subject.subject for subject in samples if not subject.settled]
    if unsettled:
        sentence = f"The warm-up of {', '.join(unsettled)} did not settle within 2 %."
        flags.append(Flag(name="unsettled", threads=threads, sentence=sentence))
    return flags


def compute_drift(medians: np.ndarray) -> float:
    """Return by how much the last third of the rounds is slower than the first, relative.

    0 if the difference is not significant.
    """
    third = len(medians) // 3
    if third < 2:
        return 0.0
    logs = np.log(medians)
    first, last = logs[:third], logs[-third:]
    change = float(np.median(last) - np.median(first))
    # Standard error of the difference of two medians of independent rounds.
    error = 1.2533 * float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / third))
    return float(np.expm1(change)) if abs(change) > 3 * error else 0.0


def _raise_flags(findings: Mapping[str, tuple[float, str]], threads: int) -> list[Flag]:
    """Return the flags whose value is above its limit, from value and sentence by name."""
    return [
        Flag(name=name, threads=threads, sentence=sentence, figures={"value": float(value), "limit": limit})
        for name, (value, sentence) in findings.items()
        if value > (limit := LIMITS[name])
    ]


def _difference(before: Mapping[int, float] | None, after: Mapping[int, float] | None) -> dict[int, float]:
    if before is None or after is None:
        return {}
    return {core: after[core] - seconds for core, seconds in before.items() if core in after}


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 0.095 else f"{100 * fraction:.0f} %"
