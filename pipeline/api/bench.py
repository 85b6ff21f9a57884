"""`compress bench`: latency of run folders, artifact folders and .onnx files on this machine."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...export.errors import ExportError
from ...export.files import temporary_folder
from ...export.latency.machine import check_runtime
from ...export.runtime import ArtifactError, Size, default_threads, open_model
from ..config.limits import MAX_INTEGER, MAX_THREADS
from ..errors import UsageError
from ..evaluation import latency
from ..runs.artifacts import BenchFile, BenchFiles, find_bench_files, find_run_images
from ..runs.console import Display
from ..runs.files import atomic_write, check_writable, command_line, write_text
from ..runs.folder import RunFolder
from ..runs.hashes import sha256
from ..runs.record import with_checksum
from ..runs.results import Bench, TimedFile

FOLDER = Path("bench-results")
"""Default output folder for files that are not one run's."""

RESULTS, SAMPLES = "bench.json", "bench.npz"

NORMAL = latency.Protocol(seconds=10.0, samples=662, processes=3, threads=())
QUICK = replace(
    NORMAL, seconds=3.0, samples=64, processes=2, cold_starts=3, end_to_end_seconds=1.0, batch_seconds=0.2
)


def bench(
    paths: str | Path | Sequence[str | Path],
    *,
    seconds: float | None = None,
    quick: bool = False,
    threads: Sequence[int] | None = None,
    seed: int = 0,
    runtimes: Sequence[str] = ("onnxruntime",),
    images: Sequence[str | Path] = (),
    image_size: Size | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Bench:
    """Measure inference latency on this machine; the method is described in `docs/bench.md`.

    Args:
        paths: run folders, artifact folders and .onnx files, timed in the same rounds.
        seconds: minimum time for each file and thread count; default 10, with ``quick`` 3.
        quick: measure for a few seconds; p99 is reported only if there were 662 runs.
        threads: thread counts; default 1, and the number of allowed cores up to 4.
        seed: seed of the order of rounds, of random inputs, and of the bootstrap.
        runtimes: ``onnxruntime``, ``openvino``, or both.
        images: image files or folders, for files that contain their preprocessing; default the run's data,
            or synthetic images.
        image_size: input size for files with a dynamic one.
        out: folder for ``bench.json`` and ``bench.npz``; default ``bench/`` in the run folder if ``paths`` is
            one, whose report is then updated, otherwise ``bench-results/``.
        quiet: show no progress on standard error.

    Returns:
        The content of ``bench.json``.

    Raises:
        UsageError: a path or an option is wrong; nothing was started.
        ExportError: a file cannot be timed.
        JobError: the results cannot be written, or another process uses the run folder.
    """
    sources = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    display = Display(quiet=quiet)
    protocol = _choose_protocol(seconds, quick, threads, seed)
    for name in runtimes:
        try:
            check_runtime(name)
        except ExportError as error:
            raise UsageError(f"--runtime {name}: {error}.") from error
    folder = results_folder(sources, out)
    updates_run = out is None and folder != FOLDER
    lock = RunFolder(folder.parent).locked() if updates_run else nullcontext()
    with lock, temporary_folder() as temporary:
        files = find_bench_files(sources, temporary, image_size)
        available = _choose_images([Path(image) for image in images], files, seed)
        check_writable(folder)
        distinct = list(dict.fromkeys(runtimes))
        subjects = [s for file in files.files for s in _open_subjects(file, distinct, available, seed)]
        for note in files.notes:
            display.note(note)
        if image_size is not None and not any(file.input.any_size for file in files.files):
            display.note("--image-size has no effect: all files have a fixed input size")
        if images and not any(subject.classifies for subject in subjects):
            display.note("--images has no effect: no file contains its preprocessing")
        with display.stage("bench") as progress:
            result, samples = latency.measure(
                subjects,
                protocol,
                images=available,
                command=command_line(),
                notes=files.notes,
                progress=lambda fraction, step: progress.update("timing", fraction, 1.0, more=step),
            )
        result = with_checksum(result.model_copy(update={"samples_file": SAMPLES}))
        with atomic_write(folder / SAMPLES) as part, part.open("wb") as stream:
            np.savez_compressed(stream, **samples)  # type: ignore[arg-type]
        write_text(folder / RESULTS, result.model_dump_json(indent=2) + "\n")
        if updates_run:
            from ..report.run_report import write

            write(RunFolder.read(folder.parent))
    return result


def results_folder(paths: Sequence[Path], out: str | Path | None) -> Path:
    """Return ``out``, or ``bench/`` in the run folder if ``paths`` is one, otherwise ``bench-results/``."""
    if out is not None:
        return Path(out)
    return paths[0] / "bench" if len(paths) == 1 and (paths[0] / "run.json").is_file() else FOLDER


def _choose_protocol(
    seconds: float | None, quick: bool, threads: Sequence[int] | None, seed: int
) -> latency.Protocol:
    if seconds is not None and not 0 < seconds < math.inf:
        raise UsageError(f"--seconds must be greater than 0 and finite, got {seconds:g}.")
    if threads is not None and (not threads or not 1 <= min(threads) <= max(threads) <= MAX_THREADS):
        counts = ",".join(map(str, threads))
        raise UsageError(f"--threads must be 1 to {MAX_THREADS}, got {counts}.")
    if not 0 <= seed <= MAX_INTEGER:
        raise UsageError(f"--seed must be 0 to {MAX_INTEGER}, got {seed}.")
    protocol = QUICK if quick else NORMAL
    return replace(
        protocol,
        seconds=protocol.seconds if seconds is None else seconds,
        threads=tuple(sorted({1, default_threads()} if threads is None else set(threads))),
        seed=seed,
    )


def _choose_images(paths: Sequence[Path], files: BenchFiles, seed: int) -> latency.Images:
    """Return the images named, or those of the run's data, or synthetic ones; none if no file classifies."""
    if paths:
        contents = latency.read_images(latency.find_images(paths))
        return latency.Images(contents, f"{len(contents)} images from --images")
    if not any(file.input.has_metadata for file in files.files):
        return latency.NO_IMAGES
    for run in files.runs:
        data = find_run_images(run)
        if data is not None:
            try:
                contents = latency.read_images(latency.find_images([data]))
            except UsageError:  # a data set that is not a folder of image files
                continue
            return latency.Images(contents, f"{len(contents)} images of the run's data")
    return latency.synthesize_images(seed)


def _open_subjects(
    file: BenchFile, runtimes: Sequence[str], images: latency.Images, seed: int
) -> list[latency.BenchCase]:
    inputs, source, classifies = None, images.description, file.input.has_metadata
    if classifies:
        try:
            inputs = latency.render_inputs(open_model(file.path, threads=1), images.contents)
        except ArtifactError:  # a teacher without a head has no labels
            classifies = False
    if inputs is None:
        inputs = latency.random_inputs(file.input.shape, file.input.kind, seed)
        source = f"{len(inputs)} random inputs"
    digest = sha256(file.path)
    return [
        latency.BenchCase(
            TimedFile(
                name=file.name if len(runtimes) == 1 else f"{file.name} ({runtime})",
                key=file.key if runtime == runtimes[0] else None,
                file=file.shown,
                sha256=digest,
                bytes=file.input.bytes,
                runtime=runtime,
                input=str(file.input),
                inputs=source,
            ),
            file.path,
            inputs,
            any_batch=file.input.any_batch,
            classifies=classifies,
        )
        for runtime in runtimes
    ]
