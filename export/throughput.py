"""How many images a second a file answers, by the number it is given at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from .bench_process import Worker
from .cores import pinned
from .files import scratch
from .latency.runner import Subject, saved

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
    with scratch() as folder:
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
