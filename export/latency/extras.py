"""Measurements in addition to latency: cold start, the whole path from an image file, throughput."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..files import temporary_folder
from ..results import ColdStart, EndToEnd, Throughput
from .machine import choose_cores
from .runner import Progress, Subject, Worker, save_inputs, worker_command
from .statistics import Samples, compute_percentiles
from .worker import COLD_START, STEPS

BATCHES = (1, 2, 4, 8, 16, 32)

_THROUGHPUT_ROUNDS = 3
_MAX_BATCH_SECONDS = 5.0  # once a batch takes longer, larger ones are left out
_MIN_END_TO_END_ROUNDS = 5


def measure_cold_starts(
    subjects: Sequence[tuple[Subject, str]], *, threads: int, processes: int, progress: Progress
) -> list[ColdStart]:
    """Start `processes` new processes for each subject and its runtime, in turn. Raises ExportError.

    The files are in the system's page cache; a first start after booting also reads them from the disk.
    """
    figures: list[list[np.ndarray]] = [[] for _ in subjects]
    cores = choose_cores(threads)
    with temporary_folder() as folder:
        for turn in range(processes):
            for index, (subject, runtime) in enumerate(subjects):
                progress(
                    (turn * len(subjects) + index) / (processes * len(subjects)),
                    f"cold start of {subject.name}",
                )
                file = save_inputs(subject.inputs[:1], folder / f"{index}.npy")
                command = worker_command("cold-start", runtime)
                with Worker(subject.name, subject.path, file, threads, command, cores) as worker:
                    figures[index].append(worker.time_block(0.0))
    results = []
    for (subject, _), starts in zip(subjects, figures, strict=True):
        columns = dict(zip(COLD_START, np.stack(starts, axis=1).tolist(), strict=True))
        values: dict[str, Any] = {key: median(column) for key, column in columns.items()}
        for key in ("peak_bytes", "runtime_bytes"):
            values[key] = None if np.isnan(columns[key]).any() else int(values[key])
        values |= {"subject": subject.name, "threads": threads, "processes": processes}
        results.append(ColdStart(session_ms_each=columns["session_ms"], **values))
    return results


def measure_end_to_end(
    files: Sequence[tuple[str, Path]],
    images: Sequence[bytes],
    *,
    threads: int,
    seconds: float,
    seed: int = 0,
    progress: Progress,
) -> list[tuple[EndToEnd, np.ndarray]]:
    """Time classifying encoded images with .onnx files that carry questpress metadata, given as (name, path).

    Returns with each result its samples, float64 [n, 4], milliseconds of the steps. Raises ExportError.
    """
    cores = choose_cores(threads)
    rng = np.random.default_rng(seed)
    blocks: list[list[np.ndarray]] = [[] for _ in files]
    with temporary_folder() as folder, ExitStack() as stack:
        for index, image in enumerate(images):
            (folder / f"{index:04d}").write_bytes(image)
        command = worker_command("end-to-end")
        workers = [Worker(name, file, folder, threads, command, cores) for name, file in files]
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:
            worker.wait_until_ready()
            worker.time_block(seconds / 4)  # warm-up
        block, spent = seconds / max(_MIN_END_TO_END_ROUNDS, round(seconds / 0.25)), np.zeros(len(files))
        while spent.min() < seconds or len(blocks[0]) < _MIN_END_TO_END_ROUNDS:
            progress(float(min(1.0, spent.min() / seconds)), "timing image files")
            for index in rng.permutation(len(files)):
                blocks[index].append(workers[index].time_block(block).reshape(-1, len(STEPS)))
                spent[index] += blocks[index][-1].sum() / 1000
    results = []
    for (name, _), rows in zip(files, blocks, strict=True):
        steps = np.concatenate(rows)
        totals = Samples(name, threads, [row.sum(axis=1) for row in rows])
        medians = dict(zip(STEPS, np.median(steps, axis=0).tolist(), strict=True))
        total = compute_percentiles(totals)
        result = EndToEnd(subject=name, threads=threads, total=total, n=len(steps), **medians)
        results.append((result, steps))
    return results


def measure_throughput(
    subjects: Sequence[Subject],
    *,
    threads: int,
    seconds: float,
    batches: Sequence[int] = BATCHES,
    seed: int = 0,
    progress: Progress,
) -> list[Throughput]:
    """Time each subject at each batch size for at least `seconds`, in rounds of seeded random order.

    The files must take any batch size. Raises ExportError.
    """
    results = []
    cores = choose_cores(threads)
    rng = np.random.default_rng(seed)
    with temporary_folder() as folder:
        for index, subject in enumerate(subjects):
            progress(index / len(subjects), f"throughput of {subject.name}")
            file = save_inputs(subject.inputs, folder / f"{index}.npy")
            with Worker(subject.name, subject.path, file, threads, subject.command, cores) as worker:
                results += _measure_batches(worker, batches, seconds, rng)
    return results


def _measure_batches(
    worker: Worker, batches: Sequence[int], seconds: float, rng: np.random.Generator
) -> list[Throughput]:
    times: dict[int, list[np.ndarray]] = {}
    for batch in batches:
        times[batch] = []
        worker.time_block(0.0, batch)
        if worker.time_block(0.0, batch)[0] > 1000 * _MAX_BATCH_SECONDS:
            break
    sizes = list(times)
    for _ in range(_THROUGHPUT_ROUNDS):
        for index in rng.permutation(len(sizes)):
            worker.time_block(0.0, sizes[index])  # the first run at another batch size allocates memory
            times[sizes[index]].append(worker.time_block(seconds / _THROUGHPUT_ROUNDS, sizes[index]))
    return [
        Throughput(
            subject=worker.name,
            threads=worker.threads,
            batch=batch,
            images_per_second=1000 * batch / float(np.median(np.concatenate(blocks))),
            low=min(1000 * batch / float(np.median(block)) for block in blocks),
            high=max(1000 * batch / float(np.median(block)) for block in blocks),
        )
        for batch, blocks in times.items()
    ]
