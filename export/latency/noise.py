"""What may have disturbed a bench: each finding is a flag with a name, a sentence and its figures.

A flag withdraws nothing: it says which figures to doubt, and why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import runtime
from .statistics import Latency

LIMITS = {
    # Share of the pinned cores' time that other processes used. An idle Linux uses about one percent of a
    # core for itself; from ten percent on, p90 belongs to the neighbour.
    "neighbour": 0.05,
    # Share of all the machine's cores that others used elsewhere: they take part in caches, memory and turbo.
    "machine": 0.10,
    # Share of the pinned cores' time that the host of a virtual machine gave to others.
    "steal": 0.01,
    # Times that the cgroup was out of its CPU quota: each stops all threads for up to a tenth of a second.
    "throttled": 0.0,
    # Middle 80 percent of the sentinel's readings, over their median: 2 to 7 percent in quiet benches on two
    # cores of a Xeon (`benchmarks/bench_noise.py`), 10 and more where something happened.
    "sentinel": 0.10,
    # Medians of the last third of the rounds against those of the first.
    "drift": 0.03,
    # Fastest against slowest process of the same file: 0.1 to 3.4 percent in the same quiet benches.
    "repeat": 0.05,
}
"""Above these a flag is raised; relative, but for `throttled`, which counts. `benchmarks/bench_noise.py`
prints what a quiet machine shows, and a busy one."""

NAMES = (*LIMITS, "unsettled")


@dataclass(frozen=True)
class Flag:
    """Something that makes figures doubtful: `figures` are what was found and the limit it is above."""

    name: str
    threads: int
    sentence: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """The machine's counters at a moment, in seconds, by core; None where the system tells nothing. `asking`
    is the processor time of this process, which asks the subjects and is pinned nowhere.
    """

    at: float
    busy: Mapping[int, float] | None
    stolen: Mapping[int, float] | None
    throttled: int | None
    asking: float = 0.0


def read(proc: Path = Path("/proc")) -> Reading:
    """The counters as they are now."""
    found = _stat(proc / "stat")
    busy = {core: one[0] for core, one in found.items()} or None
    stolen = {core: one[1] for core, one in found.items()} or None
    return Reading(time.monotonic(), busy, stolen, throttled(), time.process_time())


def _stat(file: Path) -> dict[int, tuple[float, float]]:
    """Each core's busy and stolen seconds since the system was started (proc_stat(5))."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, ValueError):
        return {}
    second = os.sysconf("SC_CLK_TCK")
    found = {}
    for line in lines:
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and len(counts) >= 8:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, counts[:8])
            found[int(name[3:])] = ((user + nice + system + irq + softirq) / second, steal / second)
    return found


def throttled(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How often this process's cgroups, v1 or v2, have been stopped by their CPU quota; None where no cgroup
    tells.
    """
    counts = []
    for folder, _ in runtime.cgroup_folders(proc, root):
        try:
            lines = (folder / "cpu.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        counts += [int(line.split()[1]) for line in lines if line.startswith("nr_throttled ")]
    return max(counts, default=None)


def unchecked(before: Reading, cores: Sequence[int]) -> list[str]:
    """Which flags cannot be raised on this machine, so that their absence says nothing."""
    missing = []
    if before.busy is None or not set(cores) <= set(before.busy):
        missing += ["neighbour", "machine", "steal"]
    if before.throttled is None:
        missing.append("throttled")
    return missing


def of_machine(
    before: Reading, after: Reading, own_seconds: float, cores: Sequence[int], threads: int
) -> list[Flag]:
    """What the counters say of the time between two readings, in which the subjects and the sentinel used
    `own_seconds` of processor time on `cores`.
    """
    flags = []
    wall = max(after.at - before.at, 1e-9)
    used = _between(before.busy, after.busy)
    here = [core for core in cores or used if core in used]
    if here:
        asking, beside = after.asking - before.asking, set(used) - set(here)
        own = own_seconds + (0.0 if beside else asking)
        others = max(0.0, sum(used[core] for core in here) - own) / (wall * len(here))
        flags += _above(
            "neighbour",
            others,
            threads,
            f"Other processes used {_percent(others)} of the cores that it ran on.",
        )
        elsewhere = max(0.0, sum(used[core] for core in beside) - asking) / (wall * len(used))
        flags += _above(
            "machine",
            elsewhere,
            threads,
            f"Other processes kept {_percent(elsewhere)} of the machine busy, on other cores than its own.",
        )
    stolen = _between(before.stolen, after.stolen)
    if here:
        share = sum(stolen[core] for core in here) / (wall * len(here))
        flags += _above(
            "steal",
            share,
            threads,
            f"The host gave {_percent(share)} of this virtual machine's cores to others.",
        )
    if before.throttled is not None and after.throttled is not None:
        times = after.throttled - before.throttled
        flags += _above(
            "throttled",
            times,
            threads,
            f"The container's CPU quota stopped its processes {times} times.",
        )
    return flags


def of_sentinel(readings: np.ndarray, threads: int) -> list[Flag]:
    """`readings` float64 [rounds], milliseconds."""
    low, middle, high = np.quantile(readings, [0.1, 0.5, 0.9])
    spread = float((high - low) / middle)
    return _above(
        "sentinel",
        spread,
        threads,
        f"A fixed computation took between {low:.3g} and {high:.3g} ms: the speed of the cores changed, or "
        "somebody else was on them.",
    )


def of_latencies(latencies: Sequence[Latency], readings: np.ndarray, threads: int) -> list[Flag]:
    """Drift of the subjects and of the sentinel, processes that differ, and warm-ups that did not settle."""
    moved = {one.subject: drift(one.medians) for one in latencies} | {"the sentinel": drift(readings)}
    furthest = max(moved, key=lambda name: abs(moved[name]))
    change = moved[furthest]
    flags = _above(
        "drift",
        abs(change),
        threads,
        f"In the last third of the rounds {furthest} was {_percent(abs(change))} "
        f"{'slower' if change > 0 else 'faster'} than in the first.",
    )
    apart = {one.subject: float(np.ptp(one.of_processes)) for one in latencies}
    widest = max(apart, key=lambda name: apart[name])
    differ = float(np.expm1(apart[widest]))
    flags += _above(
        "repeat",
        differ,
        threads,
        f"Processes of the very same file ({widest}) differ by {_percent(differ)}; the intervals of "
        "speed-ups are as wide as that.",
    )
    restless = [one.subject for one in latencies if not one.settled]
    if restless:
        flags.append(
            Flag("unsettled", threads, f"The warm-up of {', '.join(restless)} did not settle within 2 %.")
        )
    return flags


def drift(medians: np.ndarray) -> float:
    """By how much the last third of the rounds is slower than the first, relative; 0 where their scatter
    would often show as much.
    """
    third = len(medians) // 3
    if third < 2:
        return 0.0
    logs = np.log(medians)
    first, last = logs[:third], logs[-third:]
    change = float(np.median(last) - np.median(first))
    # Of the difference of two medians of independent rounds; three times as much is no chance.
    error = 1.2533 * float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / third))
    return float(np.expm1(change)) if abs(change) > 3 * error else 0.0


def _above(name: str, found: float, threads: int, sentence: str) -> list[Flag]:
    if not found > LIMITS[name]:
        return []
    return [Flag(name, threads, sentence, {"found": float(found), "limit": LIMITS[name]})]


def _between(before: Mapping[int, float] | None, after: Mapping[int, float] | None) -> dict[int, float]:
    if before is None or after is None:
        return {}
    return {core: after[core] - seconds for core, seconds in before.items() if core in after}


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.095 else f"{100 * share:.0f} %"


_SYSTEM = Path("/sys/devices/system/cpu")


def pinned(threads: int, *, system: Path = _SYSTEM, allowed: Iterable[int] | None = None) -> tuple[int, ...]:
    """The cores for so many threads, of those this process may use: the fastest kind first, a physical core
    for each thread as long as there are enough, and core 0, which serves most interrupts, last.

    Empty where the system pins no process (macOS, Windows), and where there are fewer cores than threads:
    two threads pinned to one core would wait for each other in turns.
    """
    if allowed is None:
        if not hasattr(os, "sched_setaffinity"):
            return ()
        allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)
    if threads > len(cores):
        return ()
    order = sorted(cores, key=lambda core: (_sibling(core, cores, system), -_capacity(core, system), -core))
    return tuple(sorted(order[:threads]))


def governor(cores: Iterable[int], *, system: Path = _SYSTEM) -> str | None:
    """What sets these cores' frequency, as in 'performance'; None where the system does not tell."""
    told = [_read(system / f"cpu{core}" / "cpufreq" / "scaling_governor") for core in cores]
    return ", ".join(dict.fromkeys(one for one in told if one)) or None


def _capacity(core: int, system: Path) -> int:
    """How fast a core is among the others: Linux's own measure on Arm, else its highest frequency."""
    folder = system / f"cpu{core}"
    for file in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        told = _read(folder / file)
        if told is not None and told.isdigit():
            return int(told)
    return 0


def _sibling(core: int, cores: list[int], system: Path) -> int:
    """Which of the allowed threads of its physical core this is, from 0."""
    told = _read(system / f"cpu{core}" / "topology" / "thread_siblings_list")
    if told is None:
        return 0
    return sum(other < core for other in _numbers(told) if other in cores)


def _numbers(text: str) -> list[int]:
    """Linux's lists of cores: '0-3,8' as numbers."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            found += range(int(first), int(last or first) + 1)
    return found


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except (OSError, ValueError):
        return None
