"""The processor, its cores, and the runtimes that are installed."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnxruntime as ort

from .. import runtime
from ..errors import ExportError
from ..runtime.processor import processor_name


@dataclass(frozen=True)
class Environment:
    """Where a latency was measured; `load` is the one-minute load average at the start."""

    cpu: str
    machine: str
    flags: tuple[str, ...]
    cores: int
    onnxruntime: str
    load: float | None


def environment() -> Environment:
    """Describe this machine."""
    return Environment(
        cpu=processor_name(),
        machine=f"{platform.system()} {platform.machine()}",
        flags=runtime.int8_flags(),
        cores=runtime.allowed_cores(),
        onnxruntime=ort.__version__,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


_SYSTEM = Path("/sys/devices/system/cpu")


def choose_cores(
    threads: int, *, system: Path = _SYSTEM, allowed: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Return the cores to pin `threads` threads to.

    One hardware thread of each physical core comes first, then the fastest kind of core; core 0, which serves
    most interrupts, comes last. Empty if the system cannot pin processes (macOS, Windows), or has fewer cores
    than threads: two threads pinned to one core would wait for each other.
    """
    if allowed is None:
        if not hasattr(os, "sched_setaffinity"):
            return ()
        allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)
    if threads > len(cores):
        return ()
    order = sorted(
        cores, key=lambda core: (_sibling_index(core, cores, system), -_speed(core, system), -core)
    )
    return tuple(sorted(order[:threads]))


def read_governor(cores: Iterable[int], *, system: Path = _SYSTEM) -> str | None:
    """Return what sets the frequency of these cores, such as 'performance'; None if it is not reported."""
    governors = [_read(system / f"cpu{core}" / "cpufreq" / "scaling_governor") for core in cores]
    return ", ".join(dict.fromkeys(governor for governor in governors if governor)) or None


def _speed(core: int, system: Path) -> int:
    """Return Linux's capacity of a core on Arm, otherwise its highest frequency."""
    for file in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        text = _read(system / f"cpu{core}" / file)
        if text is not None and text.isdigit():
            return int(text)
    return 0


def _sibling_index(core: int, cores: list[int], system: Path) -> int:
    """Return the position of a core among the allowed hardware threads of its physical core."""
    text = _read(system / f"cpu{core}" / "topology" / "thread_siblings_list") or ""
    return sum(sibling < core for sibling in _parse_core_list(text) if sibling in cores)


def _parse_core_list(text: str) -> list[int]:
    """Parse Linux's lists of cores, such as '0-3,8'."""
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            cores += range(int(first), int(last or first) + 1)
    return cores


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return None


RUNTIMES = {"onnxruntime": "1.27", "openvino": "2025.0"}
"""Python packages of the runtimes that the bench can time, and their oldest supported versions."""

SESSION_OPTIONS = [
    "CPUExecutionProvider",
    "intra_op_num_threads = threads, inter_op_num_threads = 1",
    "execution_mode = sequential, graph_optimization_level = all (without Pad_Fusion)",
    "intra-op threads spin within a run and stop between runs",
]
"""What `runtime.open_session` sets."""


def check_runtime(name: str) -> None:
    """Raise ExportError if a runtime is unknown or not installed."""
    if name not in RUNTIMES:
        raise ExportError(f"unknown runtime {name!r}, choose from {', '.join(RUNTIMES)}")
    if find_spec(name) is None:
        raise ExportError(f"{name} is not installed. Run pip install '{name}>={RUNTIMES[name]}'")
