"""From an image file to an answer: decode, resize, normalise, run, each step for itself and all together.

What ships is `runtime.Classifier`, so that is what is timed, in a process for each file, in the same rounds.
Pillow decodes and resizes on one thread, whatever the network has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bench_process import Worker
from .cores import pinned
from .files import scratch
from .latency.end_to_end_worker import STEPS
from .latency.statistics import Latency, summarise

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
    with scratch() as folder, ExitStack() as resident:
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
