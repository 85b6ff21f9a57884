"""`compress bench`: latency of run folders, artifact folders and .onnx files on this machine."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...export.errors import ExportError
from ...export.files import temporary_folder
from ...export.latency.machine import runtime_named
from ...export.runtime import ArtifactError, Classifier, default_threads
from ..config.limits import MOST_THREADS, MOST_WHOLE
from ..errors import UsageError
from ..evaluation.latency import (
    SYNTHETIC_SIZE,
    Protocol,
    Subject,
    image_files,
    inputs_of_images,
    measure,
    random_inputs,
    readable,
    synthetic,
)
from ..runs.artifacts import Files, Found, find, images_of_run
from ..runs.bench_results import Bench, TimedFile
from ..runs.console import Display
from ..runs.files import atomic_write, check_writable, command, sha256, write_text
from ..runs.folder import RunFolder
from ..runs.record import with_checksum

FOLDER = Path("bench-results")
"""Where results go that belong to no single run."""

RESULTS, SAMPLES = "bench.json", "bench.npz"

NORMAL = Protocol(seconds=10.0, samples=662, processes=3, threads=())
QUICK = Protocol(
    seconds=3.0, samples=64, processes=2, threads=(), starts=3, whole_seconds=1.0, batch_seconds=0.2
)
MLPERF = replace(NORMAL, seconds=600.0, mlperf=True)


@dataclass(frozen=True)
class Pictures:
    """Encoded images that can be read, and what they are in words."""

    contents: list[bytes]
    told: str


def bench(
    paths: str | Path | Sequence[str | Path],
    *,
    seconds: float | None = None,
    quick: bool = False,
    mlperf: bool = False,
    threads: Sequence[int] | None = None,
    seed: int = 0,
    runtimes: Sequence[str] = ("onnxruntime",),
    images: Sequence[str | Path] = (),
    image_size: int | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Bench:
    """Measure how fast files are on this machine; `docs/bench.md` says how.

    Args:
        paths: run folders, artifact folders and .onnx files, timed together in the same rounds.
        seconds: at least so many for each file and thread count; 10, or 3 with ``quick``, or 600 with
            ``mlperf``.
        quick: a few seconds, and a p99 only where these gave 662 runs.
        mlperf: as long as MLPerf's single stream, with its early-stopping estimates of p90 and p99.
        threads: thread counts; 1 and the cores allowed, at most 4.
        seed: of the rounds' order, the inputs, and the bootstrap.
        runtimes: ``onnxruntime``, ``openvino``, or both.
        images: image files or folders of them, for files that carry their preprocessing; by default those of
            the run's own data, or pictures made up.
        image_size: the side of the input where a file leaves it open.
        out: the folder for ``bench.json`` and ``bench.npz``; by default ``bench/`` in the one run folder that
            was named, whose report is then written anew, else ``bench-results/``.
        quiet: no progress on standard error.

    Returns:
        What ``bench.json`` holds.

    Raises:
        UsageError: a path or an option is wrong; nothing was started.
        ExportError: a file cannot be timed.
        JobError: the results cannot be written, or another process works on the run.
    """
    named = [Path(one) for one in ([paths] if isinstance(paths, str | Path) else paths)]
    display = Display(quiet=quiet)
    protocol = _protocol(seconds, quick, mlperf, threads, seed)
    for name in runtimes:
        try:
            runtime_named(name)
        except ExportError as error:
            raise UsageError(f"--runtime {name}: {error}.") from error
    folder = results_folder(named, out)
    of_run = out is None and folder != FOLDER
    alone = RunFolder(folder.parent).locked() if of_run else nullcontext()
    with alone, temporary_folder() as aside:
        files = find(named, aside, image_size)
        pictures = _pictures([Path(one) for one in images], files, seed)
        check_writable(folder)
        subjects = [
            subject
            for one in files.found
            for subject in _subjects(one, list(dict.fromkeys(runtimes)), pictures, seed)
        ]
        for note in files.notes:
            display.note(note)
        if image_size is not None and not any(one.takes.any_size for one in files.found):
            display.note("--image-size is of no use: every file here says itself how large its images are")
        if images and not any(subject.classifies for subject in subjects):
            display.note("--images is of no use: no file here says how images are prepared for it")
        with display.stage("bench") as progress:
            found, raw = measure(
                subjects,
                protocol,
                images=pictures.contents,
                images_told=pictures.told,
                command=command(),
                notes=files.notes,
                progress=lambda share, what: progress.update("timing", share, 1.0, more=what),
            )
        found = with_checksum(found.model_copy(update={"samples_file": SAMPLES}))
        save(found, raw, folder)
        if of_run:
            from ..report.assemble import report_anew

            report_anew(folder.parent)
    return found


def results_folder(paths: Sequence[Path], out: str | Path | None) -> Path:
    """Where results go: ``out``, or ``bench/`` of the one run folder, or ``bench-results/``."""
    if out is not None:
        return Path(out)
    single = paths[0] if len(paths) == 1 else None
    return FOLDER if single is None or not (single / "run.json").is_file() else single / "bench"


def thread_counts(text: str) -> list[int]:
    """``1,2`` as numbers.

    Raises:
        UsageError: they are none.
    """
    try:
        return [int(count) for count in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--threads {text} are no numbers; write them as in --threads 1,2.") from error


def save(found: Bench, raw: dict[str, np.ndarray], folder: Path) -> None:
    """
    Raises:
        JobError: the folder cannot be written or the disk is full.
    """
    with atomic_write(folder / SAMPLES) as part, part.open("wb") as file:
        np.savez_compressed(file, **raw)  # type: ignore[arg-type]
    write_text(folder / RESULTS, found.model_dump_json(indent=2) + "\n")


def _protocol(
    seconds: float | None, quick: bool, mlperf: bool, threads: Sequence[int] | None, seed: int
) -> Protocol:
    if quick and mlperf:
        raise UsageError("--quick and --mlperf exclude each other; leave one out.")
    if seconds is not None and not 0 < seconds < math.inf:
        raise UsageError(f"--seconds {seconds:g} is no time; name more than 0.")
    if threads is not None and (not threads or not 1 <= min(threads) <= max(threads) <= MOST_THREADS):
        counts = ",".join(map(str, threads))
        raise UsageError(f"--threads {counts}: a thread count is 1 to {MOST_THREADS}.")
    if not 0 <= seed <= MOST_WHOLE:
        raise UsageError(f"--seed {seed}: a seed is 0 to {MOST_WHOLE}.")
    chosen = QUICK if quick else MLPERF if mlperf else NORMAL
    wanted = {1, default_threads()} if threads is None else set(threads)
    return replace(
        chosen,
        seconds=chosen.seconds if seconds is None else seconds,
        threads=tuple(sorted(wanted)),
        seed=seed,
    )


def _pictures(given: Sequence[Path], files: Files, seed: int) -> Pictures:
    """Those named, or of the run's own data, or made up; none where no file could be asked about them."""
    if not given and not any(one.takes.ours for one in files.found):
        return Pictures([], "no images")
    if given:
        contents = readable(image_files(given))
        return Pictures(contents, f"{len(contents)} images named with --images")
    for run in files.runs:
        data = images_of_run(run)
        if data is not None:
            try:
                contents = readable(image_files([data]))
            except UsageError:  # a data set in another form than a folder of image files
                continue
            return Pictures(contents, f"{len(contents)} images of the run's data")
    width, height = SYNTHETIC_SIZE
    contents = synthetic(seed)
    return Pictures(contents, f"{len(contents)} made-up photos, JPEG of {width} × {height} pixels")


def _subjects(one: Found, runtimes: Sequence[str], pictures: Pictures, seed: int) -> list[Subject]:
    """A file in every runtime."""
    takes = one.takes
    if takes.ours:
        try:
            inputs = inputs_of_images(Classifier.load(one.path, threads=1), pictures.contents)
            told, classifies = pictures.told, True
        except ArtifactError:  # a teacher without a head has no labels, and can be timed for all that
            takes = replace(takes, ours=False)
    if not takes.ours:
        inputs, classifies = random_inputs(takes.shape, takes.kind, seed), False
        told = f"{len(inputs)} inputs of random numbers"
    hashed = sha256(one.path)
    return [
        Subject(
            TimedFile(
                name=one.name if len(runtimes) == 1 else f"{one.name} ({runtime})",
                key=one.key if runtime == runtimes[0] else None,
                file=one.shown,
                sha256=hashed,
                bytes=takes.bytes,
                runtime=runtime,
                input=takes.told,
                inputs=told,
            ),
            one.path,
            inputs,
            any_batch=takes.any_batch,
            classifies=classifies,
        )
        for runtime in runtimes
    ]

