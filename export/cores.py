"""Which cores a timed process is pinned to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

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
