"""The machine that this runs on: its processor, and which instructions for int8 it has."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from . import runtime

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})


@dataclass(frozen=True)
class Environment:
    """Where a latency was measured; `load` is the machine's one-minute load average when it began."""

    cpu: str
    machine: str
    flags: tuple[str, ...]
    cores: int
    onnxruntime: str
    load: float | None


def environment() -> Environment:
    """The machine as it is now."""
    known = _cpuinfo()
    return Environment(
        cpu=known.get("model name") or _apple_cpu() or platform.processor() or platform.machine(),
        machine=f"{platform.system()} {platform.machine()}",
        flags=int8_flags(),
        cores=runtime.allowed_cores(),
        onnxruntime=ort.__version__,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def int8_flags() -> tuple[str, ...]:
    """Which of the instruction sets that decide int8's speed the processor has, by Linux's names for them;
    empty where the system does not tell."""
    known = _cpuinfo()
    flags = (known.get("flags") or known.get("Features") or "").split()
    return tuple(flag for flag in _FLAGS if flag in flags)


def is_arm() -> bool:
    """Whether it is a 64-bit Arm."""
    return platform.machine().lower() in ("aarch64", "arm64")


def has_vnni() -> bool:
    """Whether products of int8 are summed in 32 bits by one instruction (x86's VNNI)."""
    return not _VNNI.isdisjoint(int8_flags())


def _cpuinfo() -> dict[str, str]:
    known: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            known.setdefault(key.strip(), value.strip())
    except OSError:  # not Linux
        pass
    return known


def _apple_cpu() -> str:
    if platform.system() != "Darwin":
        return ""
    asked = subprocess.run(
        ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()
