"""The machine that this runs on."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import onnxruntime as ort

from .. import runtime
from ..errors import ExportError


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
        flags=runtime.int8_flags(),
        cores=runtime.allowed_cores(),
        onnxruntime=ort.__version__,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


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


def is_arm() -> bool:
    """Whether it is a 64-bit Arm."""
    return platform.machine().lower() in ("aarch64", "arm64")


def has_vnni() -> bool:
    """Whether products of int8 are summed in 32 bits by one instruction (x86's VNNI)."""
    return runtime.target_of_this_machine() == "x86-vnni"


def session_options() -> list[str]:
    """What `runtime.session` sets, as text."""
    return [
        "CPUExecutionProvider",
        "intra_op_num_threads = the threads told, inter_op_num_threads = 1",
        "execution_mode = sequential, graph_optimization_level = all (without Pad_Fusion)",
        "intra-op threads spin within a run and stop between runs",
    ]


@dataclass(frozen=True)
class Runtime:
    """`worker` is the module that serves `bench_worker`'s requests, `load` the function in it that opens a
    file, and `package` what must be installed.
    """

    name: str
    worker: str
    load: str
    package: str
    least: str

    @property
    def script(self) -> tuple[str, ...]:
        return ("-m", f"{__package__}.{self.worker}")

    @property
    def loader(self) -> str:
        """As MODULE:NAME."""
        return f"{__package__}.{self.worker}:{self.load}"

    @property
    def version(self) -> str:
        return version(self.package)


RUNTIMES = {
    one.name: one
    for one in (
        Runtime("onnxruntime", "bench_worker", "in_onnxruntime", "onnxruntime", "1.27"),
        Runtime("openvino", "openvino_worker", "in_openvino", "openvino", "2025.0"),
    )
}


def runtime_named(name: str) -> Runtime:
    """Raises ExportError where there is none of this name, or its package is not installed."""
    if name not in RUNTIMES:
        raise ExportError(f"there is no runtime {name!r}; there are {', '.join(RUNTIMES)}")
    found = RUNTIMES[name]
    if find_spec(found.package) is None:
        raise ExportError(
            f"the runtime {name} is not installed; pip install '{found.package}>={found.least}' brings it"
        )
    return found
