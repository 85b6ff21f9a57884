"""Latency of model files on this machine, measured so that it can be believed.

One resident worker process a subject, explicit threads, batch 1, different inputs in turn, warm-up until it
has settled, then rounds in which every subject runs one block, in seeded random order. No outlier is dropped.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bench_process import Worker
from .errors import ExportError
from .machine import Environment, environment

# A percentile needs this many samples to mean something.
MINIMUM_SAMPLES = {50: 11, 90: 64, 95: 130, 99: 662}
_LEAST_ROUNDS = 3
_WARM_RUNS, _WARM_SECONDS, _WARM_AGREEMENT = 50, 1.0, 0.02

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
class Latency:
    """One subject at one thread count, in milliseconds; a percentile is None where too few runs carry it.

    `samples` float64 [n] are all runs in order, `rounds` int64 [n] the round each belongs to. `settled` is
    False where warm-up ended at its limit before two windows agreed within 2 %.
    """

    subject: str
    threads: int
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    mean: float
    n: int
    settled: bool
    samples: np.ndarray
    rounds: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """All but the samples, for JSON."""
        return {name: value for name, value in self.__dict__.items() if name not in ("samples", "rounds")}


@dataclass(frozen=True)
class Speedup:
    """How many times faster than `baseline` a subject is: the median over rounds of the ratio of the two
    blocks' medians, with a paired bootstrap 95 % interval over rounds.
    """

    subject: str
    baseline: str
    threads: int
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """'faster', 'slower', or 'no difference' where the interval holds 1."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference"


@dataclass(frozen=True)
class BenchResult:
    latencies: tuple[Latency, ...]
    environment: Environment
    seed: int

    def latency(self, subject: str, threads: int) -> Latency:
        """Raises KeyError for what wasn't measured."""
        for latency in self.latencies:
            if (latency.subject, latency.threads) == (subject, threads):
                return latency
        raise KeyError((subject, threads))

    def speedup(self, subject: str, baseline: str, threads: int) -> Speedup:
        return speedup(self.latency(subject, threads), self.latency(baseline, threads), seed=self.seed)

    def raw(self) -> dict[str, np.ndarray]:
        """Every sample, to be kept with `numpy.savez`: 'NAME/THREADS/ms' and 'NAME/THREADS/round'."""
        arrays = {}
        for latency in self.latencies:
            arrays[f"{latency.subject}/{latency.threads}/ms"] = latency.samples
            arrays[f"{latency.subject}/{latency.threads}/round"] = latency.rounds
        return arrays

    def to_dict(self) -> dict[str, Any]:
        return {
            "environment": asdict(self.environment),
            "seed": self.seed,
            "latencies": [latency.to_dict() for latency in self.latencies],
        }


def bench(
    subjects: Sequence[Subject],
    *,
    threads: Sequence[int],
    seconds: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchResult:
    """Time every subject at every thread count for at least `seconds` each. Raises ExportError."""
    names = [subject.name for subject in subjects]
    if not subjects or len(set(names)) != len(names):
        raise ExportError(f"a bench needs subjects with names of their own, not {names}")
    if seconds <= 0 or not threads or min(threads) < 1:
        raise ExportError(f"a bench needs some time and threads, not {seconds} s on {list(threads)} threads")
    for subject in subjects:
        if subject.inputs.ndim != 4 or not len(subject.inputs):
            raise ExportError(f"{subject.name} needs inputs [n, 3, S, S], not {list(subject.inputs.shape)}")
    tell = progress or _untold
    counts = list(dict.fromkeys(threads))
    here = environment()
    latencies: list[Latency] = []
    with tempfile.TemporaryDirectory(prefix="questpress-bench-") as folder:
        inputs = []
        for index, subject in enumerate(subjects):
            inputs.append(Path(folder) / f"{index}.npy")
            kind = np.uint8 if subject.inputs.dtype == np.uint8 else np.float32
            np.save(inputs[-1], np.ascontiguousarray(subject.inputs, dtype=kind))
        for index, count in enumerate(counts):

            def part(fraction: float, what: str, index: int = index) -> None:
                tell((index + min(fraction, 1)) / len(counts), what)

            with ExitStack() as resident:
                workers = [
                    resident.enter_context(Worker(subject.name, subject.path, file, count, subject.script))
                    for subject, file in zip(subjects, inputs, strict=True)
                ]
                latencies += _measure(workers, seconds, np.random.default_rng([seed, count]), part)
    tell(1.0, "done")
    return BenchResult(tuple(latencies), here, seed)


def _untold(_fraction: float, _what: str) -> None:
    pass


def _measure(
    workers: Sequence[Worker], seconds: float, rng: np.random.Generator, tell: Progress
) -> list[Latency]:
    settled, slowest = [], 0.0
    for index, worker in enumerate(workers):
        tell(index / len(workers) * 0.3, f"warming up {worker.name} on {worker.threads} threads")
        done, median = _warm_up(worker, seconds)
        settled.append(done)
        slowest = max(slowest, median / 1000)
    # A block holds a run of the slowest, so that no subject gets more than a round's share of the time.
    block = max(min(max(seconds / 20, 0.1), 1.0), slowest)
    blocks: list[list[np.ndarray]] = [[] for _ in workers]
    spent = np.zeros(len(workers))
    while spent.min() < seconds or len(blocks[0]) < _LEAST_ROUNDS:
        tell(0.3 + 0.7 * spent.min() / seconds, f"timing on {workers[0].threads} threads")
        for index in rng.permutation(len(workers)):
            samples = workers[index].block(block)
            blocks[index].append(samples)
            spent[index] += samples.sum() / 1000
    return [
        summarise(worker.name, worker.threads, of_worker, done)
        for worker, of_worker, done in zip(workers, blocks, settled, strict=True)
    ]


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


def summarise(subject: str, threads: int, blocks: Sequence[np.ndarray], settled: bool = True) -> Latency:
    """The figures of a subject's blocks, float64 milliseconds each; percentiles interpolate linearly."""
    samples = np.concatenate(blocks)
    given = {
        p: float(np.percentile(samples, p)) if len(samples) >= least else None
        for p, least in MINIMUM_SAMPLES.items()
    }
    return Latency(
        subject,
        threads,
        p50=given[50],
        p90=given[90],
        p95=given[95],
        p99=given[99],
        mean=float(samples.mean()),
        n=len(samples),
        settled=settled,
        samples=samples,
        rounds=np.repeat(np.arange(len(blocks)), [len(block) for block in blocks]),
    )


def speedup(subject: Latency, baseline: Latency, *, seed: int = 0, resamples: int = 2000) -> Speedup:
    """Compare two subjects that ran in the same rounds. Raises ValueError where they did not."""
    if subject.threads != baseline.threads or subject.rounds.max() != baseline.rounds.max():
        raise ValueError(f"{subject.subject} and {baseline.subject} did not run in the same rounds")
    ratios = _medians(baseline) / _medians(subject)
    rng = np.random.default_rng(seed)
    drawn = np.median(ratios[rng.integers(0, len(ratios), (resamples, len(ratios)))], axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Speedup(
        subject.subject,
        baseline.subject,
        subject.threads,
        float(np.median(ratios)),
        float(low),
        float(high),
    )


def _medians(latency: Latency) -> np.ndarray:
    return np.array(
        [np.median(latency.samples[latency.rounds == r]) for r in range(latency.rounds.max() + 1)]
    )
