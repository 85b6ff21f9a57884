"""Latency of model files on this machine.

Every subject has separate worker processes, pinned to as many cores as they have threads. After a warm-up
they run in rounds: in each, every subject runs one block at batch size 1 on different inputs, in seeded
random order, and a subject's processes take turns. No outlier is dropped. A sentinel times a fixed
computation once a round, and the system's counters are read before and after, for the checks in `noise`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError
from ..files import temporary_folder
from ..results import Conditions, Flag, Latency, Speedup
from . import noise, statistics
from .machine import Environment, choose_cores, environment, read_governor
from .statistics import Samples, compute_process_spread, summarize

MIN_ROUNDS = 20
"""Intervals of fewer rounds are not reliable."""

_LOAD_TIMEOUT = 300.0  # seconds
_BLOCK_TIMEOUT = 120.0  # seconds in addition to the block's own, for one run of a slow network
_BLOCK_SECONDS = 0.1
_WARM_RUNS, _WARM_SECONDS, _WARM_AGREEMENT = 50, 1.0, 0.02

Progress = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and a description of the current step."""


def worker_command(mode: str, *arguments: str) -> tuple[str, ...]:
    """Return the arguments of Python that start `worker` in a mode."""
    return ("-m", f"{__package__}.worker", mode, *arguments)


class Worker:
    """A process that holds one model and times it on request; ends with the `with` block.

    The process starts with the object and is ready when the block is entered. `command` are Python's
    arguments for a program that serves the requests described in `worker`; `cores` are those to pin it to.
    """

    def __init__(
        self,
        name: str,
        model: Path | str,
        inputs: Path,
        threads: int,
        command: Sequence[str] = (),
        cores: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.threads = threads
        self.cpu_seconds = 0.0
        """Processor time of the process, as of its last reply."""
        self.processor_ms: np.ndarray | None = None
        """Processor time of each run of the last block, all threads together; None if not measured."""
        self._request = {"model": str(model), "inputs": str(inputs), "threads": threads, "cores": list(cores)}
        self._ready = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        # The child imports what the parent does, and nothing from the current folder.
        search = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-P", *(command or worker_command("run", "onnxruntime"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": search},
        )

    def wait_until_ready(self) -> None:
        """Wait until the process has loaded its model. Raises ExportError."""
        if not self._ready:
            self._send(self._request, _LOAD_TIMEOUT)
            self._ready = True

    def time_block(self, seconds: float, batch: int = 1) -> np.ndarray:
        """Run for at least `seconds` at a batch size; return the run times, float64 [runs], milliseconds.

        Raises ExportError.
        """
        ms, *processor_ms = self._send({"seconds": seconds, "batch": batch}, seconds + _BLOCK_TIMEOUT)
        self.processor_ms = processor_ms[0] if processor_ms else None
        return ms

    def _send(self, request: dict[str, Any], timeout: float) -> np.ndarray:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        timed_out = threading.Event()

        def kill() -> None:
            timed_out.set()
            self._process.kill()

        timer = threading.Timer(timeout, kill)
        timer.daemon = True
        timer.start()
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            head = json.loads(stdout.readline())
            body = stdout.read(head.get("bytes", 0))
        except (OSError, ValueError) as error:  # a broken pipe, or a truncated reply
            raise self._failure(timed_out.is_set(), timeout) from error
        finally:
            timer.cancel()
        if "error" in head:
            reason = str(head["error"]).replace(str(self._request["model"]), self.name)
            raise ExportError(f"{self.name} cannot be timed: {reason}")
        if len(body) != head.get("bytes", 0):
            raise self._failure(timed_out.is_set(), timeout)
        self.cpu_seconds = head.get("cpu", self.cpu_seconds)
        return np.frombuffer(body, dtype=np.float64).reshape(head.get("columns", 1), -1)

    def _failure(self, timed_out: bool, timeout: float) -> ExportError:
        if timed_out:
            reason = f"no reply within {timeout:.0f} s on {self.threads} threads"
        else:
            try:
                code = self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                code = None
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            reason = f"its process ended with {code}" + (f" ({lines[-1]})" if lines else "")
        return ExportError(f"{self.name} cannot be timed: {reason}")

    def close(self) -> None:
        """End the process: by closing its input, or by force after two seconds."""
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # unsent data has no reader any more
                pass
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Worker:
        try:
            self.wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Subject:
    """A model file to time, and its inputs, float32 [n, 3, H, W] or uint8 [n, H, W, 3].

    `command` starts a worker for another runtime than ONNX Runtime.
    """

    name: str
    path: Path | str
    inputs: np.ndarray
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchResult:
    """The samples of every subject at every thread count, and how they were measured.

    `sentinel` holds the sentinel's readings by thread count, float64 [rounds], milliseconds.
    """

    samples: tuple[Samples, ...]
    environment: Environment
    seed: int
    conditions: tuple[Conditions, ...] = ()
    flags: tuple[Flag, ...] = ()
    sentinel: Mapping[int, np.ndarray] = field(default_factory=dict)

    @cached_property
    def latencies(self) -> tuple[Latency, ...]:
        """The summary of each subject at each thread count."""
        return tuple(summarize(s, wall_time=self._has_wall_time(s.threads)) for s in self.samples)

    def latency(self, subject: str, threads: int) -> Latency:
        """Return one summary. Raises KeyError if it was not measured."""
        return {(row.subject, row.threads): row for row in self.latencies}[subject, threads]

    def speedup(self, subject: str, over: str, threads: int) -> Speedup | None:
        """Compare two measured subjects; None if the measurement was too disturbed."""
        samples = [samples for samples in self.samples if samples.threads == threads]
        wall_time = self._has_wall_time(threads)
        return statistics.compare(samples, subject, over, wall_time=wall_time, seed=self.seed)

    def _has_wall_time(self, threads: int) -> bool:
        return all(under.wall_time for under in self.conditions if under.threads == threads)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return all samples for `numpy.savez`.

        Their names are 'NAME/THREADS/ms', 'NAME/THREADS/processor ms', 'NAME/THREADS/round' and
        'sentinel/THREADS/ms'.
        """
        arrays = {}
        for samples in self.samples:
            arrays[f"{samples.subject}/{samples.threads}/ms"] = samples.ms
            sizes = [len(block) for block in samples.blocks]
            arrays[f"{samples.subject}/{samples.threads}/round"] = np.repeat(np.arange(len(sizes)), sizes)
            if samples.processor_blocks is not None:
                processor_ms = np.concatenate(samples.processor_blocks)
                arrays[f"{samples.subject}/{samples.threads}/processor ms"] = processor_ms
        return {**arrays, **{f"sentinel/{threads}/ms": ms for threads, ms in self.sentinel.items()}}


def bench(
    subjects: Sequence[Subject],
    *,
    threads: Sequence[int],
    seconds: float,
    samples: int = 0,
    processes: int = 1,
    seed: int = 0,
    progress: Progress = lambda _fraction, _step: None,
) -> BenchResult:
    """Time every subject at every thread count, in `processes` processes each.

    Together they run for at least `seconds` and `samples` runs. Raises ExportError.
    """
    names = [subject.name for subject in subjects]
    if not subjects or len(set(names)) != len(names):
        raise ExportError(f"a bench requires subjects with distinct names, got {names}")
    if seconds <= 0 or not threads or min(threads) < 1 or processes < 1:
        raise ExportError(
            f"seconds, threads and processes of a bench must be positive, got {seconds}, {list(threads)} and "
            f"{processes}"
        )
    for subject in subjects:
        if subject.inputs.ndim != 4 or not len(subject.inputs):
            raise ExportError(
                f"{subject.name} requires inputs [n, 3, H, W], got {list(subject.inputs.shape)}"
            )
    counts = list(dict.fromkeys(threads))
    machine = environment()
    plans: list[_Plan] = []
    with temporary_folder() as folder:
        files = [
            save_inputs(subject.inputs, folder / f"{index}.npy") for index, subject in enumerate(subjects)
        ]
        for index, count in enumerate(counts):

            def report(fraction: float, step: str, index: int = index) -> None:
                progress((index + min(fraction, 1)) / len(counts), step)

            cores = choose_cores(count)
            with ExitStack() as stack:
                sentinel = Worker("the sentinel", "", Path(), 1, worker_command("sentinel"), cores[:1])
                stack.callback(sentinel.close)
                teams = [
                    [
                        Worker(subject.name, subject.path, file, count, subject.command, cores)
                        for _ in range(processes)
                    ]
                    for subject, file in zip(subjects, files, strict=True)
                ]
                for worker in (worker for team in teams for worker in team):
                    stack.callback(worker.close)
                rng = np.random.default_rng([seed, count])
                plan = _Plan(count, seconds, samples, cores, rng, report, teams, sentinel)
                plan.measure()
            plans.append(plan)
    progress(1.0, "done")
    return BenchResult(
        tuple(subject for plan in plans for subject in plan.measured),
        machine,
        seed,
        tuple(plan.conditions for plan in plans),
        tuple(flag for plan in plans for flag in plan.flags),
        {plan.threads: plan.readings for plan in plans},
    )


def save_inputs(inputs: np.ndarray, file: Path) -> Path:
    """Write inputs to a .npy file for workers; return its path."""
    dtype = np.uint8 if inputs.dtype == np.uint8 else np.float32
    np.save(file, np.ascontiguousarray(inputs, dtype=dtype))
    return file


@dataclass
class _Plan:
    """The measurement at one thread count; `teams` are the processes of each subject."""

    threads: int
    seconds: float
    min_samples: int
    cores: tuple[int, ...]
    rng: np.random.Generator
    report: Progress
    teams: Sequence[Sequence[Worker]]
    sentinel: Worker

    def measure(self) -> None:
        """Set `measured`, `readings`, `conditions` and `flags`."""
        workers = [self.sentinel, *(worker for team in self.teams for worker in team)]
        count = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        self.report(0.0, f"loading, {count}")
        for worker in workers:
            worker.wait_until_ready()
        settled, slowest = self._warm_up(count)
        # A block holds one run of the slowest subject, so that none gets more than its part of the time.
        least = self.seconds / MIN_ROUNDS
        block = max(min(_BLOCK_SECONDS, least), min(slowest, least))
        before, used = noise.read_counters(), sum(worker.cpu_seconds for worker in workers)
        blocks, processor_blocks, self.readings = self._run_rounds(block, count)
        after, used = noise.read_counters(), sum(worker.cpu_seconds for worker in workers) - used
        after = noise.drop_implausible(before, after, used, self.cores)
        unchecked = noise.list_unchecked(after, self.cores)
        processes = len(self.teams[0])
        self.measured = [
            Samples(
                team[0].name, self.threads, blocks[index], processes, settled[index], processor_blocks[index]
            )
            for index, team in enumerate(self.teams)
        ]
        self.flags = [
            *noise.check_counters(before, after, used, self.cores, self.threads),
            *(noise.check_waiting(self.measured, self.threads) if "neighbor" in unchecked else ()),
            *noise.check_sentinel(self.readings, self.threads),
            *noise.check_samples(self.measured, self.readings, self.threads),
        ]
        spread = compute_process_spread(self.measured)
        low, middle, high = (float(value) for value in np.quantile(self.readings, [0.1, 0.5, 0.9]))
        self.conditions = Conditions(
            threads=self.threads,
            rounds=len(self.readings),
            processes=processes,
            block_ms=1000 * block,
            cores=list(self.cores),
            governor=read_governor(self.cores),
            sentinel_ms=(low, middle, high),
            process_spread=100 * spread.std,
            process_spread_measured=spread.freedom > 0,
            wall_time=noise.measures_wall_time(self.flags, after.time - before.time),
            unchecked=unchecked,
        )

    def _warm_up(self, count: str) -> tuple[list[bool], float]:
        """Return which subjects settled, and the slowest one's median in seconds."""
        settled, slowest = [], 0.0
        for index, team in enumerate(self.teams):
            self.report(index / len(self.teams) * 0.3, f"warming up {team[0].name}, {count}")
            results = [_warm_up(worker, self.seconds / len(team)) for worker in team]
            settled.append(all(is_settled for is_settled, _ in results))
            slowest = max(slowest, *(median / 1000 for _, median in results))
        return settled, slowest

    def _run_rounds(
        self, block: float, count: str
    ) -> tuple[list[list[np.ndarray]], list[list[np.ndarray] | None], np.ndarray]:
        """Return each subject's blocks, their runs in processor time, and the sentinel's readings."""
        teams, processes = self.teams, len(self.teams[0])
        blocks: list[list[np.ndarray]] = [[] for _ in teams]
        processor_blocks: list[list[np.ndarray]] = [[] for _ in teams]
        readings: list[float] = []
        spent, runs = np.zeros(len(teams)), np.zeros(len(teams))
        fraction = 0.0
        while fraction < 1 or len(readings) < MIN_ROUNDS or len(readings) % processes:
            self.report(0.3 + 0.7 * fraction, f"timing, {count}")
            turn = len(readings) % processes
            readings.append(float(self.sentinel.time_block(0.0)[0]))
            for index in self.rng.permutation(len(teams)):
                worker = teams[index][turn]
                ms = worker.time_block(block)
                blocks[index].append(ms)
                if worker.processor_ms is not None:
                    processor_blocks[index].append(worker.processor_ms)
                spent[index] += ms.sum() / 1000
                runs[index] += len(ms)
            of_samples = runs.min() / self.min_samples if self.min_samples else 1.0
            fraction = float(min(1.0, spent.min() / self.seconds, of_samples))
        return blocks, [processor or None for processor in processor_blocks], np.array(readings)


def _warm_up(worker: Worker, seconds: float) -> tuple[bool, float]:
    """Run until two windows agree; return whether they did in time, and the last window's median in ms."""
    window = min(max(seconds / 10, 0.05), 0.5)
    least, most = min(_WARM_SECONDS, seconds / 2), max(seconds, 4 * window)
    runs, spent, last = 0, 0.0, math.inf
    while True:
        samples = worker.time_block(window)
        runs, spent = runs + len(samples), spent + float(samples.sum()) / 1000
        median = float(np.median(samples))
        agree = abs(median - last) <= _WARM_AGREEMENT * min(median, last)
        if agree and runs >= _WARM_RUNS and spent >= least:
            return True, median
        if spent >= most:
            return agree, median
        last = median
