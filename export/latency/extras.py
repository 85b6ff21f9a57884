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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ..errors import ExportError
from ..files import temporary_folder
from .end_to_end_worker import STEPS
from .machine import RUNTIMES
from .noise import pinned
from .runner import Subject, Worker, saved
from .statistics import Latency, summarise

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


_SCRIPT = ("-m", f"{__package__}.end_to_end_worker")
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class EndToEnd:
    """Milliseconds of one image: the steps' medians by name, and `total`, of their sums run by run."""

    subject: str
    threads: int
    steps: dict[str, float]
    total: Latency
    samples: np.ndarray
    """float64 [n, 4], the steps of each run."""


def end_to_end(
    files: Sequence[tuple[str, Path]],
    images: Sequence[bytes],
    *,
    threads: int,
    seconds: float,
    seed: int = 0,
    progress: Callable[[float, str], None],
) -> list[EndToEnd]:
    """`files` are names and .onnx files with questpress's metadata; `images` encoded pictures that can be
    read, seen in turn. Raises ExportError.
    """
    cores = pinned(threads)
    rng = np.random.default_rng(seed)
    blocks: list[list[np.ndarray]] = [[] for _ in files]
    with temporary_folder() as folder, ExitStack() as resident:
        for index, image in enumerate(images):
            (folder / f"{index:04d}").write_bytes(image)
        workers = [Worker(name, file, folder, threads, _SCRIPT, cores) for name, file in files]
        for worker in workers:
            resident.callback(worker.close)
        for worker in workers:
            worker.ready()
            worker.block(seconds / 4)  # warm-up
        block, spent = seconds / max(_LEAST_ROUNDS, round(seconds / 0.25)), np.zeros(len(files))
        while spent.min() < seconds or len(blocks[0]) < _LEAST_ROUNDS:
            progress(float(min(1.0, spent.min() / seconds)), "from image file to answer")
            for index in rng.permutation(len(files)):
                blocks[index].append(workers[index].block(block).reshape(-1, len(STEPS)))
                spent[index] += blocks[index][-1].sum() / 1000
    return [
        EndToEnd(
            name,
            threads,
            dict(zip(STEPS, (float(one) for one in np.median(np.concatenate(rows), axis=0)), strict=True)),
            summarise(name, threads, [row.sum(axis=1) for row in rows]),
            np.concatenate(rows),
        )
        for (name, _), rows in zip(files, blocks, strict=True)
    ]


BATCHES = (1, 2, 4, 8, 16, 32)
_ROUNDS = 3
_SLOWEST = 5.0
"""Larger batches are left out once one takes so many seconds."""


@dataclass(frozen=True)
class Throughput:
    """`images_per_second` is the batch over the median time of one; `low` and `high` are the rounds' slowest
    and fastest.
    """

    subject: str
    threads: int
    batch: int
    images_per_second: float
    low: float
    high: float
    n: int


def throughput(
    subjects: Sequence[Subject],
    *,
    threads: int,
    seconds: float,
    batches: Sequence[int] = BATCHES,
    seed: int = 0,
    progress: Callable[[float, str], None],
) -> list[Throughput]:
    """Every subject at every batch for at least `seconds`, in rounds of seeded random order, one subject
    after another. Its file must take any batch. Raises ExportError.
    """
    found = []
    cores = pinned(threads)
    rng = np.random.default_rng(seed)
    with temporary_folder() as folder:
        for index, subject in enumerate(subjects):
            file = saved(subject.inputs, folder / f"{index}.npy")
            with ExitStack() as resident:
                worker = resident.enter_context(
                    Worker(subject.name, subject.path, file, threads, subject.script, cores)
                )

                def tell(share: float, index: int = index, name: str = subject.name) -> None:
                    progress((index + share) / len(subjects), f"batches of {name}")

                found += _of_one(worker, batches, seconds, rng, tell)
    return found


def _of_one(
    worker: Worker,
    batches: Sequence[int],
    seconds: float,
    rng: np.random.Generator,
    tell: Callable[[float], None],
) -> list[Throughput]:
    taken = []
    for batch in batches:
        taken.append(batch)
        worker.block(0.0, batch)
        if worker.block(0.0, batch)[0] > 1000 * _SLOWEST:
            break
    times: dict[int, list[np.ndarray]] = {batch: [] for batch in taken}
    for turn in range(_ROUNDS):
        tell(turn / _ROUNDS)
        for index in rng.permutation(len(taken)):
            batch = taken[index]
            worker.block(0.0, batch)  # the first after another batch makes room for it
            times[batch].append(worker.block(seconds / _ROUNDS, batch))
    return [_summarize_throughput(worker, batch, blocks) for batch, blocks in times.items()]


def _summarize_throughput(worker: Worker, batch: int, blocks: Sequence[np.ndarray]) -> Throughput:
    rates = sorted(1000 * batch / float(np.median(block)) for block in blocks)
    samples = np.concatenate(blocks)
    return Throughput(
        worker.name,
        worker.threads,
        batch,
        1000 * batch / float(np.median(samples)),
        rates[0],
        rates[-1],
        len(samples),
    )
