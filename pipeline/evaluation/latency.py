"""The complete bench, for a run's stage and for `compress bench`, and the inputs that files are timed on."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ...export.device.bench import PHOTOS, describe_photos, synthesize_photos
from ...export.latency import extras, noise, runner
from ...export.latency.machine import SESSION_OPTIONS, choose_cores
from ...export.latency.runner import BenchResult, worker_command
from ...export.results import EndToEnd, Speedup
from ...export.runtime import ImageError, Model, decode_image, height_width, render
from ..data.sources.folders import EXTENSIONS
from ..errors import UsageError
from ..runs.results import Bench, TimedFile

Progress = Callable[[float, str], None]

MAX_ALL_PAIRS = 6
"""Up to this number of subjects, each is compared with every other; more are compared with the first only."""
INPUTS = 64
"""Number of different inputs that a subject is run on in turn."""
MAX_INPUT_BYTES = 256 * 1024 * 1024
"""Of one subject's inputs; fewer are used if they are larger."""


@dataclass(frozen=True)
class BenchCase:
    """A file to time, and its inputs, float32 [n, 3, H, W] or uint8 [n, H, W, 3]."""

    file: TimedFile
    path: Path
    inputs: np.ndarray
    any_batch: bool
    """True if the file takes batches of any size."""
    classifies: bool
    """True if the file contains its preprocessing and labels, and can classify image files."""

    @property
    def for_runner(self) -> runner.Subject:
        """The subject as `export.latency` takes it."""
        command = worker_command("run", self.file.runtime)
        return runner.Subject(self.file.name, self.path, self.inputs, command)


@dataclass(frozen=True)
class Images:
    """Encoded images that can be decoded, and their number and source in words."""

    contents: Sequence[bytes]
    description: str


NO_IMAGES = Images((), "no images")


@dataclass(frozen=True)
class Protocol:
    """How long and how often each subject is timed; 0 leaves a part out."""

    seconds: float
    samples: int
    processes: int
    threads: tuple[int, ...]
    seed: int = 0
    cold_starts: int = 5
    """New processes of each file."""
    end_to_end_seconds: float = 3.0
    """For each file."""
    batch_seconds: float = 0.6
    """For each file and batch size."""
    batches: tuple[int, ...] = extras.BATCHES


def measure(
    subjects: Sequence[BenchCase],
    protocol: Protocol,
    *,
    images: Images = NO_IMAGES,
    command: str,
    notes: Sequence[str] = (),
    progress: Progress,
) -> tuple[Bench, dict[str, np.ndarray]]:
    """Run the complete bench; return its result and all samples by name.

    Everything but the latencies is measured at the largest thread count; if disturbed, it is not reported.
    """
    result = runner.bench(
        [subject.for_runner for subject in subjects],
        threads=protocol.threads,
        seconds=protocol.seconds,
        samples=protocol.samples,
        processes=protocol.processes,
        seed=protocol.seed,
        progress=_part(progress, 0.0, 0.8),
    )
    arrays = result.to_arrays()
    threads, counters = max(protocol.threads), noise.read_counters()
    end_to_end = _measure_end_to_end(subjects, images, protocol, threads, _part(progress, 0.8, 0.87))
    for row, steps in end_to_end:
        arrays[f"{row.subject}/{threads}/from image file/ms"] = steps
    cold_starts = extras.measure_cold_starts(
        [(subject.for_runner, subject.file.runtime) for subject in subjects if protocol.cold_starts],
        threads=threads,
        processes=protocol.cold_starts,
        progress=_part(progress, 0.87, 0.94),
    )
    throughput = extras.measure_throughput(
        [subject.for_runner for subject in subjects if subject.any_batch and protocol.batch_seconds],
        threads=threads,
        seconds=protocol.batch_seconds,
        batches=protocol.batches,
        seed=protocol.seed,
        progress=_part(progress, 0.94, 1.0),
    )
    flags = list(result.flags)
    if end_to_end or cold_starts or throughput:
        later_flags, wall_time = noise.check_since(counters, choose_cores(threads), threads)
        flags += later_flags
        if not wall_time:
            end_to_end, cold_starts, throughput = [], [], []
            disturbed = "end-to-end latency, cold start and throughput are not reported: they were disturbed"
            notes = [*notes, disturbed]
    machine = result.environment
    bench = Bench(
        command=command,
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        seconds=protocol.seconds,
        samples=protocol.samples,
        seed=protocol.seed,
        subjects=[subject.file for subject in subjects],
        latencies=list(result.latencies),
        speedups=_compare(result, [subject.file.name for subject in subjects]),
        images=images.description if end_to_end else None,
        end_to_end=[row for row, _ in end_to_end],
        cold_starts=cold_starts,
        throughput=throughput,
        conditions=list(result.conditions),
        flags=list({(flag.name, flag.threads): flag for flag in reversed(flags)}.values())[::-1],
        notes=list(notes),
        session=SESSION_OPTIONS,
        environment={
            "cpu": machine.cpu,
            "machine": machine.machine,
            "instruction sets": ", ".join(machine.flags),
            "cores allowed": str(machine.cores),
            "onnxruntime": machine.onnxruntime,
            "load average at start": "" if machine.load is None else f"{machine.load:.2f}",
            **{subject.file.runtime: version(subject.file.runtime) for subject in subjects},
        },
    )
    return bench, arrays


def _part(progress: Progress, begin: float, end: float) -> Progress:
    return lambda fraction, step: progress(begin + (end - begin) * min(fraction, 1.0), step)


def _measure_end_to_end(
    subjects: Sequence[BenchCase], images: Images, protocol: Protocol, threads: int, progress: Progress
) -> list[tuple[EndToEnd, np.ndarray]]:
    files = [(s.file.name, s.path) for s in subjects if s.classifies and s.file.runtime == "onnxruntime"]
    seconds = protocol.end_to_end_seconds
    if not (files and images.contents and seconds):
        return []
    return extras.measure_end_to_end(
        files, images.contents, threads=threads, seconds=seconds, seed=protocol.seed, progress=progress
    )


def _compare(result: BenchResult, names: Sequence[str]) -> list[Speedup]:
    """Compare each subject with every one before it; with the first only, if there are many."""
    speedups = [
        result.speedup(name, over, conditions.threads)
        for index, name in enumerate(names)
        for over in (names[:index] if len(names) <= MAX_ALL_PAIRS else names[: min(index, 1)])
        for conditions in result.conditions
    ]
    return [speedup for speedup in speedups if speedup is not None]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the image files among files and folders, at most `INPUTS`, evenly spaced.

    Raises:
        UsageError: a path does not exist, or there is no image.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"--images: {path} does not exist.")
        files += sorted(filter(_is_image, path.rglob("*"))) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"--images: no image files in {', '.join(map(str, paths))}.")
    return [files[i * len(files) // INPUTS] for i in range(INPUTS)] if len(files) > INPUTS else files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()


def read_images(files: Sequence[Path]) -> list[bytes]:
    """Return the contents of the files that can be decoded; fail if none can."""
    contents, errors = [], []
    for file in files:
        try:
            decode_image(file)
            contents.append(file.read_bytes())
        except ImageError as error:
            errors.append(str(error))
    if not contents:
        raise UsageError(f"--images: none of the images can be read. {errors[0]}.")
    return contents


def synthesize_images(seed: int, count: int = PHOTOS) -> Images:
    """Make images that take about as long to decode as photos, the same for the same seed."""
    return Images(synthesize_photos(seed, count), describe_photos(count))


def render_inputs(model: Model, images: Sequence[bytes]) -> np.ndarray:
    """Return images as a file's inputs."""
    size = height_width(model.preprocessing.size)
    count = _count_inputs((3, *size), np.dtype(np.uint8 if model.takes_pixels else np.float32))
    decoded = [model.decode(image) for image in images[:count]]
    rendered = np.stack([render(image, model.preprocessing) for image in decoded])
    return model.to_input(repeat_shifted(rendered, count))


def repeat_shifted(rendered: np.ndarray, count: int) -> np.ndarray:
    """Return `count` different images, uint8 [count, H, W, 3]; repeated ones are shifted sideways."""
    n = len(rendered)
    return np.stack([np.roll(rendered[i % n], i // n, axis=1) for i in range(count)])


def random_inputs(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """Return noise [n, *shape]: uniform for uint8, otherwise standard normal."""
    rng = np.random.default_rng(seed)
    count = _count_inputs(shape, dtype)
    if dtype == np.uint8:
        return rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return rng.standard_normal((count, *shape), dtype=np.float32)


def _count_inputs(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return max(2, min(INPUTS, MAX_INPUT_BYTES // (int(np.prod(shape)) * dtype.itemsize)))
