"""The processor: the cores that this process may use, and the int8 files that it computes exactly."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

MAX_THREADS = 1024


def allowed_cores() -> int:
    """Return the number of cores in this process's affinity, or its cgroup's CPU quota if that is less."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # Windows, macOS
        cores = os.cpu_count() or 1
    return max(1, int(min(cores, _cgroup_quota())))


def _cgroup_quota(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the CPUs granted by the tightest cgroup, at least 1; inf without a limit or outside Linux."""
    quotas = (_read_quota(folder, is_v1) for folder, is_v1 in cgroup_folders(proc, root))
    return max(1.0, min(quotas, default=math.inf))


def cgroup_folders(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the cgroups that limit this process's CPU time, and True for cgroups v1."""
    try:
        lines = proc.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / controllers if controllers else root
        # In a container the path may be that of the host while only the root is mounted.
        inner = mount / group.lstrip("/")
        for folder in (inner, *inner.parents):
            yield folder, bool(controllers)
            if folder == mount:
                break


def _read_quota(folder: Path, is_v1: bool) -> float:
    try:
        if is_v1:
            granted, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            granted, period = (folder / "cpu.max").read_text().split()
        unlimited = granted == "max" or int(granted) <= 0
        return math.inf if unlimited else int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


THREADS: int | None = None
"""Default number of a session's threads; None for min(allowed cores, 4)."""


def default_threads() -> int:
    """Return `THREADS` or min(allowed cores, 4): more threads seldom help a small network."""
    return THREADS or min(allowed_cores(), 4)


def check_threads(threads: int | None) -> int:
    """Return a number of threads, `default_threads` for None. Raises ValueError unless it is valid."""
    count = default_threads() if threads is None else threads
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"threads must be 1 to {MAX_THREADS}, got {threads}")
    return count


_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def int8_flags() -> tuple[str, ...]:
    """Return the processor's instruction sets that matter for int8, in Linux's names; empty elsewhere."""
    flags = _read_flags() or []
    return tuple(flag for flag in _FLAGS if flag in flags)


def lacks_dot_products() -> bool:
    """Return True on 64-bit ARM without instructions for int8 dot products, such as Cortex-A53 and A72."""
    flags = _read_flags()
    return detect_target() == "arm64" and flags is not None and "asimddp" not in flags


def _read_flags() -> list[str] | None:
    """Return the processor's instruction sets, None if they are unknown."""
    lines = (line.partition(":") for line in _read(Path("/proc/cpuinfo")).splitlines())
    return next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), None)


def detect_target() -> str:
    """Return the int8 target for this processor: 'arm64', 'x86-vnni' or 'x86'.

    'x86' is correct on every x86 processor, and is returned if the instruction sets are unknown.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "arm64"
    return "x86" if {"avx512_vnni", "avx_vnni"}.isdisjoint(int8_flags()) else "x86-vnni"


def runnable_targets() -> tuple[str | None, ...]:
    """Return the targets whose files this processor computes exactly, the best one first."""
    target = detect_target()
    return (target, "x86", None) if target == "x86-vnni" else (target, None)


def processor_name(proc: Path = Path("/proc")) -> str:
    """Return the processor's model; on boards that do not report it, such as Raspberry Pi, the board's."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    fields: dict[str, str] = {}
    for line in _read(proc / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    board = _read(proc / "device-tree" / "model").strip("\0 \n")
    name = fields.get("model name") or board or fields.get("hardware") or platform.processor()
    return name or platform.machine()


def bench_file_name(processor: str) -> str:
    """Return the name of the file with the results of `predict.py --bench` on a processor."""
    text = re.sub(r"\((r|tm)\)", "", processor.lower())
    return f"bench.{re.sub(r'[^a-z0-9]+', '-', text).strip('-')[:60] or 'device'}.json"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""
