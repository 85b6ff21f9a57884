"""Cold start: what a process that has done nothing yet waits for until its first answer, and the memory.

Each figure is of fresh processes, one after another, the subjects in turn. The files are in the system's
cache, since the bench has just read them: a first start after power-on adds the time to read them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ..cores import pinned
from ..errors import ExportError
from ..runtimes import RUNTIMES

_SECONDS = 300.0


@dataclass(frozen=True)
class Start:
    """A file to start with: `inputs` is a .npy file whose first row is the first image."""

    name: str
    path: Path | str
    inputs: Path
    runtime: str = "onnxruntime"


@dataclass(frozen=True)
class ColdStart:
    """Medians over `processes`, in milliseconds and bytes; `session_ms_each` holds every one.

    `import_ms` is importing the runtime and numpy, `session_ms` opening the file, `first_run_ms` the first
    image. `peak_bytes` is the most memory in use up to then, and `runtime_bytes` that before the file was
    opened; None where the system does not tell.
    """

    subject: str
    threads: int
    processes: int
    import_ms: float
    session_ms: float
    first_run_ms: float
    session_ms_each: tuple[float, ...]
    peak_bytes: int | None
    runtime_bytes: int | None


def cold_starts(
    starts: Sequence[Start],
    *,
    threads: int,
    processes: int,
    progress: Callable[[float, str], None],
) -> list[ColdStart]:
    """So many fresh processes for each. Raises ExportError."""
    found: list[list[dict[str, float]]] = [[] for _ in starts]
    cores = pinned(threads)
    for turn in range(processes):
        for index, start in enumerate(starts):
            progress((turn * len(starts) + index) / (processes * len(starts)), f"starting {start.name}")
            found[index].append(_once(start, threads, cores))
    return [
        _summarize_cold_start(start.name, threads, each) for start, each in zip(starts, found, strict=True)
    ]


def _once(start: Start, threads: int, cores: Sequence[int]) -> dict[str, float]:
    request = {
        "loader": RUNTIMES[start.runtime].loader,
        "model": str(start.path),
        "inputs": str(start.inputs),
        "threads": threads,
        "cores": list(cores),
    }
    search = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", f"{__package__}.cold_start_worker"],
            input=json.dumps(request) + "\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
            env=os.environ | {"PYTHONPATH": search},
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{start.name} did not start within {_SECONDS:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ExportError(f"{start.name} cannot be started: {lines[-1] if lines else done.returncode}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def _summarize_cold_start(name: str, threads: int, each: Sequence[dict[str, float]]) -> ColdStart:
    def middle(key: str) -> float:
        return float(median(one[key] for one in each))

    known = all(one["peak_bytes"] is not None for one in each)
    return ColdStart(
        name,
        threads,
        len(each),
        middle("import_ms"),
        middle("session_ms"),
        middle("first_run_ms"),
        tuple(one["session_ms"] for one in each),
        int(middle("peak_bytes")) if known else None,
        int(middle("runtime_bytes")) if known else None,
    )
