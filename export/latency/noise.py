"""Checks for disturbances of a bench: counters of the system, a reference workload, the samples.

A disturbance raises a flag with a name, a sentence and its figures. A flag marks results that may be
unreliable. If other processes took more than `MAX_TAKEN` of the cores, wall time is not reported: on one
thread, speed-ups are ratios of processor times, on several there are none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import runtime
from ..device.bench import compute_drift
from ..results import Flag
from .statistics import Samples

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

MAX_TAKEN = 0.05
"""Fraction of the pinned cores' time, taken by others, above which wall time is not reported."""

_QUOTA_PERIOD = 0.1
"""Seconds that a CPU quota stops a process for, at most, each time."""


@dataclass(frozen=True)
class Counters:
    """The system's counters at one time, in seconds by core; None if the system does not report them.

    `parent_seconds` is the processor time of this process, which may use `parent_cores`; all if empty.
    """

    time: float
    busy: Mapping[int, float] | None
    stolen: Mapping[int, float] | None
    throttled: int | None
    parent_seconds: float = 0.0
    parent_cores: frozenset[int] = frozenset()
    children_seconds: float = 0.0
    """Processor time of ended child processes."""


def read_counters(proc: Path = Path("/proc")) -> Counters:
    """Read the counters as they are now."""
    cores = _read_stat(proc / "stat")
    busy = {core: busy for core, (busy, _) in cores.items()} or None
    stolen = {core: stolen for core, (_, stolen) in cores.items()} or None
    allowed = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
    used = os.times()
    parent, children = used.user + used.system, used.children_user + used.children_system
    return Counters(time.monotonic(), busy, stolen, count_throttled(), parent, allowed, children)


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


def drop_implausible(
    before: Counters, after: Counters, bench_seconds: float, cores: Sequence[int]
) -> Counters:
    """Return `after` without the cores' times if they do not contain the bench's own processor time.

    Some containers report zeros, or the times of other cores.
    """
    used = _difference(before.busy, after.busy)
    counted = sum(used[core] for core in cores or used if core in used)
    return after if counted >= 0.8 * bench_seconds - 0.1 else replace(after, busy=None, stolen=None)


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
        if not elsewhere & (after.parent_cores or elsewhere):
            bench_seconds, parent = bench_seconds + parent, 0.0
        others = max(0.0, sum(used[core] for core in pinned) - bench_seconds) / (wall * len(pinned))
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


def check_since(before: Counters, cores: Sequence[int], threads: int) -> tuple[list[Flag], bool]:
    """Check the time since `before`, in which child processes began and ended.

    Returns the flags, and what `measures_wall_time` returns for them.
    """
    after = read_counters()
    own = after.children_seconds - before.children_seconds
    after = drop_implausible(before, after, own, cores)
    flags = check_counters(before, after, own, cores, threads)
    return flags, measures_wall_time(flags, after.time - before.time)


def check_waiting(samples: Sequence[Samples], threads: int) -> list[Flag]:
    """Compare processor time with wall time on one thread, if the system does not report the cores' times."""
    blocks = [subject.processor_blocks for subject in samples if subject.processor_blocks is not None]
    if threads > 1 or len(blocks) < len(samples):
        return []
    processor = sum(float(block.sum()) for of_subject in blocks for block in of_subject)
    waited = 1 - processor / sum(float(subject.ms.sum()) for subject in samples)
    sentence = f"The processes waited {_percent(waited)} of the time for the cores under test."
    return _raise_flags({"neighbor": (waited, sentence)}, threads)


def measures_wall_time(flags: Sequence[Flag], seconds: float) -> bool:
    """Return False if others took more than `MAX_TAKEN` of the cores during a bench of `seconds`."""
    values = {flag.name: flag.figures.get("value", 0.0) for flag in flags}
    stopped = _QUOTA_PERIOD * values.get("throttled", 0.0) / seconds
    return max(values.get("neighbor", 0.0), values.get("steal", 0.0), stopped) <= MAX_TAKEN


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
    spreads = {subject.subject: float(np.ptp(subject.process_logs)) for subject in samples}
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
