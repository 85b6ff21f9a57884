"""Latency of model files on this machine, measured so that it can be believed.

Resident worker processes for every subject, pinned to as many cores as they have threads; batch 1, different
inputs in turn, warm-up until it has settled, then rounds in which every subject runs one block, in seeded
random order. A subject's processes take turns, a round each. No outlier is dropped. Beside the subjects a
sentinel runs a fixed computation once a round, and the machine's counters are read before and after: what
they tell are the flags of `noise`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import ExportError
from ..files import temporary_folder
from . import noise
from .machine import Environment, environment
from .noise import Flag, governor, pinned
from .statistics import Latency, Speedup, Spread, process_spread, speedup, summarise

_LOAD_SECONDS = 300.0
_BLOCK_TIMEOUT_SECONDS = (
    120.0  # beyond the block itself: room for one run of a slow network on a busy machine
)


class Worker:
    """A process that holds one network and times it on request; ends with the `with` block.

    It is started at once, and is ready when the block is entered. `script`, a Python program and its
    arguments, serves requests as `bench_worker` does, for another runtime than ONNX Runtime. `cores` are
    those it is pinned to, if any.
    """

    def __init__(
        self,
        name: str,
        model: Path | str,
        inputs: Path,
        threads: int,
        script: Sequence[str] = (),
        cores: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.threads = threads
        self.cpu_seconds = 0.0
        """Processor time it has used, as of its last answer."""
        self._request = {
            "model": str(model),
            "inputs": str(inputs),
            "threads": threads,
            "cores": list(cores),
        }
        self._ready = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        # The child finds what the parent found, and nothing of the folder the user happens to be in.
        search = os.pathsep.join(entry for entry in sys.path if entry)
        served_by = script or ("-m", f"{__package__}.bench_worker")
        self._process = subprocess.Popen(
            [sys.executable, "-P", *served_by],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": search},
        )

    def ready(self) -> None:
        """Wait until it has loaded its network. Raises ExportError."""
        if not self._ready:
            self._ask(self._request, _LOAD_SECONDS)
            self._ready = True

    def block(self, seconds: float, batch: int = 1) -> np.ndarray:
        """Times of runs over at least `seconds`, float64 [runs], milliseconds; `batch` images a run. Raises
        ExportError.
        """
        return self._ask({"seconds": seconds, "batch": batch}, seconds + _BLOCK_TIMEOUT_SECONDS)

    def _ask(self, request: dict[str, Any], limit: float) -> np.ndarray:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None and pipe_out is not None
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            self._process.kill()

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            pipe_in.write(json.dumps(request).encode() + b"\n")
            pipe_in.flush()
            head = json.loads(pipe_out.readline())
            body = pipe_out.read(head.get("bytes", 0))
        except (OSError, ValueError) as error:  # a broken pipe, or an answer cut short
            raise ExportError(self._obituary(overdue.is_set(), limit)) from error
        finally:
            timer.cancel()
        if "error" in head:
            told = str(head["error"]).replace(str(self._request["model"]), self.name)
            raise ExportError(f"{self.name} cannot be timed: {told}")
        if len(body) != head.get("bytes", 0):
            raise ExportError(self._obituary(overdue.is_set(), limit))
        self.cpu_seconds = head.get("cpu", self.cpu_seconds)
        return np.frombuffer(body, dtype=np.float64)

    def _obituary(self, overdue: bool, limit: float) -> str:
        if overdue:
            return f"{self.name} cannot be timed: no answer within {limit:.0f} s on {self.threads} threads"
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"{self.name} cannot be timed: its process ended with {code}" + (
            f" ({lines[-1]})" if lines else ""
        )

    def close(self) -> None:
        """End the process, kindly first."""
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was left to write has no reader any more
                pass
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Worker:
        try:
            self.ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


LEAST_ROUNDS = 20
"""Of fewer rounds no interval means much."""

_BLOCK_SECONDS = 0.1
_WARM_RUNS, _WARM_SECONDS, _WARM_AGREEMENT = 50, 1.0, 0.02
_SENTINEL = ("-m", f"{__package__}.sentinel")

Progress = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and what is going on."""


@dataclass(frozen=True)
class Subject:
    """What is timed: a model file, run on one input at a time, float32 [n, 3, S, S] or uint8 [n, S, S, 3]; in
    ONNX Runtime, or in another runtime by the program `script` that serves `bench_worker`'s requests.
    """

    name: str
    path: Path | str
    inputs: np.ndarray
    script: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conditions:
    """How one thread count was measured: the cores that everything was pinned to (none where the system has
    no such thing) and their governor, the sentinel's readings, float64 [rounds] in milliseconds, by how much
    processes of one file differ, what disturbed it, and the flags that this system gives no figures for.
    """

    threads: int
    rounds: int
    processes: int
    block_seconds: float
    cores: tuple[int, ...]
    governor: str | None
    sentinel: np.ndarray
    spread: Spread
    flags: tuple[Flag, ...]
    unchecked: tuple[str, ...]


@dataclass(frozen=True)
class BenchResult:
    latencies: tuple[Latency, ...]
    environment: Environment
    seed: int
    conditions: tuple[Conditions, ...] = ()

    @property
    def flags(self) -> list[Flag]:
        """Of all thread counts."""
        return [flag for one in self.conditions for flag in one.flags]

    def latency(self, subject: str, threads: int) -> Latency:
        """Raises KeyError for what wasn't measured."""
        for latency in self.latencies:
            if (latency.subject, latency.threads) == (subject, threads):
                return latency
        raise KeyError((subject, threads))

    def speedup(self, subject: str, baseline: str, threads: int) -> Speedup:
        """Raises KeyError for what wasn't measured."""
        one, other = self.latency(subject, threads), self.latency(baseline, threads)
        spread = next((c.spread for c in self.conditions if c.threads == threads), None)
        return speedup(one, other, spread=spread, seed=self.seed)

    def raw(self) -> dict[str, np.ndarray]:
        """Every sample, to be kept with `numpy.savez`: 'NAME/THREADS/ms' and 'NAME/THREADS/round', and the
        sentinel's as 'sentinel/THREADS/ms'.
        """
        arrays = {}
        for latency in self.latencies:
            arrays[f"{latency.subject}/{latency.threads}/ms"] = latency.samples
            arrays[f"{latency.subject}/{latency.threads}/round"] = latency.rounds
        for one in self.conditions:
            arrays[f"sentinel/{one.threads}/ms"] = one.sentinel
        return arrays

    def to_dict(self) -> dict[str, Any]:
        return {
            "environment": asdict(self.environment),
            "seed": self.seed,
            "latencies": [latency.to_dict() for latency in self.latencies],
            "flags": [asdict(flag) for flag in self.flags],
        }


def bench(
    subjects: Sequence[Subject],
    *,
    threads: Sequence[int],
    seconds: float,
    samples: int = 0,
    processes: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchResult:
    """Time every subject at every thread count for at least `seconds` and `samples` runs, divided among so
    many `processes` of each. Raises ExportError.
    """
    names = [subject.name for subject in subjects]
    if not subjects or len(set(names)) != len(names):
        raise ExportError(f"a bench needs subjects with names of their own, not {names}")
    if seconds <= 0 or not threads or min(threads) < 1 or processes < 1:
        raise ExportError(
            f"a bench needs some time, threads and processes, not {seconds} s on {list(threads)} threads in "
            f"{processes} processes"
        )
    for subject in subjects:
        if subject.inputs.ndim != 4 or not len(subject.inputs):
            raise ExportError(f"{subject.name} needs inputs [n, 3, S, S], not {list(subject.inputs.shape)}")
    tell = progress or _untold
    counts = list(dict.fromkeys(threads))
    here = environment()
    latencies: list[Latency] = []
    conditions: list[Conditions] = []
    with temporary_folder() as folder:
        files = [saved(subject.inputs, folder / f"{index}.npy") for index, subject in enumerate(subjects)]
        for index, count in enumerate(counts):

            def part(fraction: float, what: str, index: int = index) -> None:
                tell((index + min(fraction, 1)) / len(counts), what)

            cores = pinned(count)
            with ExitStack() as resident:
                sentinel = Worker("the sentinel", "", Path(), 1, _SENTINEL, cores[:1])
                resident.callback(sentinel.close)
                teams = [
                    [
                        Worker(subject.name, subject.path, file, count, subject.script, cores)
                        for _ in range(processes)
                    ]
                    for subject, file in zip(subjects, files, strict=True)
                ]
                for worker in (worker for team in teams for worker in team):
                    resident.callback(worker.close)
                plan = _Plan(count, seconds, samples, cores, np.random.default_rng([seed, count]), part)
                found, under = plan.measure(teams, sentinel)
            latencies += found
            conditions.append(under)
    tell(1.0, "done")
    return BenchResult(tuple(latencies), here, seed, tuple(conditions))


def saved(inputs: np.ndarray, file: Path) -> Path:
    """Write a subject's inputs where its processes read them."""
    kind = np.uint8 if inputs.dtype == np.uint8 else np.float32
    np.save(file, np.ascontiguousarray(inputs, dtype=kind))
    return file


def _untold(_fraction: float, _what: str) -> None:
    pass


@dataclass(frozen=True)
class _Plan:
    """One thread count: for how long, where, and in which order."""

    threads: int
    seconds: float
    samples: int
    cores: tuple[int, ...]
    rng: np.random.Generator
    tell: Progress

    def measure(
        self, teams: Sequence[Sequence[Worker]], sentinel: Worker
    ) -> tuple[list[Latency], Conditions]:
        workers = [worker for team in teams for worker in team]
        self.tell(0.0, f"loading on {_counted(self.threads)}")
        for worker in (sentinel, *workers):
            worker.ready()
        settled, slowest = self._warm_up(teams)
        # A block holds a run of the slowest, so that no subject gets more than a round's share of the time.
        least = self.seconds / LEAST_ROUNDS
        block = max(min(_BLOCK_SECONDS, least), min(slowest, least))
        before, used = noise.read(), _cpu_seconds([sentinel, *workers])
        blocks, readings = self._rounds(teams, sentinel, block)
        after, used = noise.read(), _cpu_seconds([sentinel, *workers]) - used
        processes = len(teams[0])
        latencies = [
            summarise(team[0].name, self.threads, of_team, done, processes)
            for team, of_team, done in zip(teams, blocks, settled, strict=True)
        ]
        flags = [
            *noise.of_machine(before, after, used, self.cores, self.threads),
            *noise.of_sentinel(readings, self.threads),
            *noise.of_latencies(latencies, readings, self.threads),
        ]
        return latencies, Conditions(
            self.threads,
            rounds=len(readings),
            processes=processes,
            block_seconds=block,
            cores=self.cores,
            governor=governor(self.cores),
            sentinel=readings,
            spread=process_spread(latencies),
            flags=tuple(flags),
            unchecked=tuple(noise.unchecked(before, self.cores)),
        )

    def _warm_up(self, teams: Sequence[Sequence[Worker]]) -> tuple[list[bool], float]:
        """Which subjects settled, and the slowest one's median in seconds."""
        settled, slowest = [], 0.0
        for index, team in enumerate(teams):
            self.tell(index / len(teams) * 0.3, f"warming up {team[0].name} on {_counted(self.threads)}")
            warmed = [_warm_up(worker, self.seconds / len(team)) for worker in team]
            settled.append(all(done for done, _ in warmed))
            slowest = max(slowest, *(median / 1000 for _, median in warmed))
        return settled, slowest

    def _rounds(
        self, teams: Sequence[Sequence[Worker]], sentinel: Worker, block: float
    ) -> tuple[list[list[np.ndarray]], np.ndarray]:
        blocks: list[list[np.ndarray]] = [[] for _ in teams]
        readings: list[float] = []
        spent, runs = np.zeros(len(teams)), np.zeros(len(teams))
        while not self._enough(len(readings), len(teams[0]), spent, runs):
            self.tell(0.3 + 0.7 * self._share(spent, runs), f"timing on {_counted(self.threads)}")
            turn = len(readings) % len(teams[0])
            readings.append(float(sentinel.block(0.0)[0]))
            for index in self.rng.permutation(len(teams)):
                samples = teams[index][turn].block(block)
                blocks[index].append(samples)
                spent[index] += samples.sum() / 1000
                runs[index] += len(samples)
        return blocks, np.array(readings)

    def _enough(self, rounds: int, processes: int, spent: np.ndarray, runs: np.ndarray) -> bool:
        if rounds < LEAST_ROUNDS or rounds % processes:
            return False
        return bool(spent.min() >= self.seconds and runs.min() >= self.samples)

    def _share(self, spent: np.ndarray, runs: np.ndarray) -> float:
        of_runs = runs.min() / self.samples if self.samples else 1.0
        return float(min(1.0, spent.min() / self.seconds, of_runs))


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _cpu_seconds(workers: Sequence[Worker]) -> float:
    return sum(worker.cpu_seconds for worker in workers)


def _warm_up(worker: Worker, seconds: float) -> tuple[bool, float]:
    """Run until two windows agree: whether they did within the time, and the last window's median in ms."""
    window = min(max(seconds / 10, 0.05), 0.5)
    least, most = min(_WARM_SECONDS, seconds / 2), max(seconds, 4 * window)
    runs, spent, last = 0, 0.0, math.inf
    while True:
        samples = worker.block(window)
        runs, spent = runs + len(samples), spent + float(samples.sum()) / 1000
        median = float(np.median(samples))
        agree = abs(median - last) <= _WARM_AGREEMENT * min(median, last)
        if agree and runs >= _WARM_RUNS and spent >= least:
            return True, median
        if spent >= most:
            return agree, median
        last = median
