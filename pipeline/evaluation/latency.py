"""The bench itself, for a run's stage and for `compress bench`: latencies, then what stands beside them."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ...export.files import temporary_folder
from ...export.latency import extras, statistics
from ...export.latency import runner as latency
from ...export.latency.extras import BATCHES, EndToEnd, end_to_end, throughput
from ...export.latency.machine import RUNTIMES, session_options
from ...export.latency.statistics import Latency
from ...export.runtime import Classifier, ImageError, decode_image, render
from ..data.sources.folders import EXTENSIONS
from ..errors import UsageError
from ..runs.bench_results import (
    Bench,
    Conditions,
    Early,
    NoiseFlag,
    Percentile,
    Rate,
    Start,
    TimedFile,
    TimedLatency,
    TimedSpeedup,
    Whole,
)

Progress = Callable[[float, str], None]

MOST_PAIRS = 6
"""Of more subjects than these, each is compared with the first alone."""


@dataclass(frozen=True)
class Subject:
    """A file to be timed, and what is told of it; ``path`` is where it is."""

    told: TimedFile
    path: Path
    inputs: np.ndarray
    any_batch: bool
    """Whether it takes batches of any size."""
    classifies: bool
    """Whether it carries its preprocessing and labels, so that it can be asked about an image file."""


@dataclass(frozen=True)
class Protocol:
    """How long and how often; 0 leaves a part out."""

    seconds: float
    samples: int
    processes: int
    threads: tuple[int, ...]
    seed: int = 0
    starts: int = 5
    """Fresh processes of each file."""
    whole_seconds: float = 3.0
    """From image file to answer, for each file."""
    batch_seconds: float = 0.6
    """Of each file at each batch."""
    batches: tuple[int, ...] = BATCHES
    mlperf: bool = False


def measure(
    subjects: Sequence[Subject],
    protocol: Protocol,
    *,
    images: Sequence[bytes] = (),
    images_told: str | None = None,
    command: str,
    notes: Sequence[str] = (),
    progress: Progress,
) -> tuple[Bench, dict[str, np.ndarray]]:
    """The whole bench, and all raw samples by name.

    ``images`` are encoded pictures that can be read. What stands beside the latencies is measured at the
    largest thread count.

    Raises:
        ExportError: a file cannot be timed.
    """
    found = latency.bench(
        [_timed(one) for one in subjects],
        threads=protocol.threads,
        seconds=protocol.seconds,
        samples=protocol.samples,
        processes=protocol.processes,
        seed=protocol.seed,
        progress=_part(progress, 0.0, 0.8),
    )
    raw = found.raw()
    most = max(protocol.threads)
    whole = _whole(subjects, images, protocol, most, _part(progress, 0.8, 0.87))
    for one in whole:
        raw[f"{one.subject}/{most}/from image file/ms"] = one.samples
    starts = _starts(subjects, protocol, most, _part(progress, 0.87, 0.94))
    rates = throughput(
        [_timed(one) for one in subjects if one.any_batch] if protocol.batch_seconds else [],
        threads=most,
        seconds=protocol.batch_seconds,
        batches=protocol.batches,
        seed=protocol.seed,
        progress=_part(progress, 0.94, 1.0),
    )
    machine = found.environment
    bench = Bench(
        command=command,
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        seconds=protocol.seconds,
        samples=protocol.samples,
        seed=protocol.seed,
        subjects=[one.told for one in subjects],
        latencies=[timed_latency(one) for one in found.latencies],
        speedups=_speedups(found, [one.told.name for one in subjects]),
        images=images_told if whole else None,
        end_to_end=[_way(one) for one in whole],
        cold_starts=[Start(**{**vars(one), "session_ms_each": list(one.session_ms_each)}) for one in starts],
        throughput=[
            Rate(**{name: value for name, value in vars(one).items() if name != "n"}) for one in rates
        ],
        mlperf=[_early(one) for one in found.latencies] if protocol.mlperf else [],
        conditions=[_conditions(one) for one in found.conditions],
        flags=[NoiseFlag(**vars(flag)) for flag in found.flags],
        notes=list(notes),
        session=session_options(),
        environment={**told_environment(machine), **_versions(subjects)},
    )
    return bench, raw


def told_environment(machine: latency.Environment) -> dict[str, str]:
    """The machine as reports tell it."""
    return {
        "cpu": machine.cpu,
        "machine": machine.machine,
        "instruction sets": ", ".join(machine.flags),
        "cores allowed": str(machine.cores),
        "onnxruntime": machine.onnxruntime,
        "load when timing began": "" if machine.load is None else f"{machine.load:.2f}",
    }


def _versions(subjects: Sequence[Subject]) -> dict[str, str]:
    return {name: RUNTIMES[name].version for name in dict.fromkeys(one.told.runtime for one in subjects)}


def _timed(one: Subject) -> latency.Subject:
    return latency.Subject(one.told.name, one.path, one.inputs, RUNTIMES[one.told.runtime].script)


def _part(progress: Progress, begin: float, end: float) -> Progress:
    return lambda share, what: progress(begin + (end - begin) * min(share, 1.0), what)


def _whole(
    subjects: Sequence[Subject], images: Sequence[bytes], protocol: Protocol, threads: int, tell: Progress
) -> list[EndToEnd]:
    """Of files that classify, in the runtime that ships."""
    files = [
        (one.told.name, one.path) for one in subjects if one.classifies and one.told.runtime == "onnxruntime"
    ]
    if not files or not images or not protocol.whole_seconds:
        return []
    seconds = protocol.whole_seconds
    return end_to_end(files, images, threads=threads, seconds=seconds, seed=protocol.seed, progress=tell)


def _starts(
    subjects: Sequence[Subject], protocol: Protocol, threads: int, tell: Progress
) -> list[extras.ColdStart]:
    if not protocol.starts:
        return []
    with _inputs_of(subjects) as files:
        starts = [
            extras.Start(one.told.name, one.path, file, one.told.runtime)
            for one, file in zip(subjects, files, strict=True)
        ]
        return extras.cold_starts(starts, threads=threads, processes=protocol.starts, progress=tell)


@contextmanager
def _inputs_of(subjects: Sequence[Subject]) -> Any:
    with temporary_folder() as folder:
        yield [latency.saved(one.inputs[:1], folder / f"{index}.npy") for index, one in enumerate(subjects)]


def percentiles(one: Latency) -> dict[str, Percentile]:
    """Those that enough runs carry, with their intervals."""
    values = {name: getattr(one, name) for name in one.intervals}
    return {
        name: Percentile(value=value, low=one.intervals[name].low, high=one.intervals[name].high)
        for name, value in values.items()
    }


def timed_latency(one: Latency) -> TimedLatency:
    return TimedLatency(
        subject=one.subject,
        threads=one.threads,
        percentiles=percentiles(one),
        mean=one.mean,
        n=one.n,
        settled=one.settled,
        quantiles=[float(f"{value:.5g}") for value in np.quantile(one.samples, np.arange(101) / 100)],
    )


def _speedups(found: latency.BenchResult, names: Sequence[str]) -> list[TimedSpeedup]:
    """Each against every one before it; of many subjects, against the first."""
    pairs = [
        (name, over)
        for index, name in enumerate(names)
        for over in (names[:index] if len(names) <= MOST_PAIRS else names[: min(index, 1)])
    ]
    return [
        TimedSpeedup(
            subject=name,
            over=over,
            threads=one.threads,
            ratio=one.ratio,
            low=one.low,
            high=one.high,
            verdict=_word(one.verdict),
        )
        for name, over in pairs
        for threads in (condition.threads for condition in found.conditions)
        for one in [found.speedup(name, over, threads)]
    ]


def _word(verdict: str) -> Literal["faster", "no difference", "slower"]:
    return "faster" if verdict == "faster" else "slower" if verdict == "slower" else "no difference"


def _way(one: EndToEnd) -> Whole:
    total = percentiles(one.total)
    return Whole(subject=one.subject, threads=one.threads, **one.steps, total=total, n=one.total.n)


def _early(one: Latency) -> Early:
    p90, p99 = (statistics.estimate(one.samples, p) for p in (0.9, 0.99))
    return Early(subject=one.subject, threads=one.threads, n=one.n, p90=p90, p99=p99)


def _conditions(one: latency.Conditions) -> Conditions:
    low, middle, high = (float(value) for value in np.quantile(one.sentinel, [0.1, 0.5, 0.9]))
    return Conditions(
        threads=one.threads,
        rounds=one.rounds,
        processes=one.processes,
        block_ms=1000 * one.block_seconds,
        cores=list(one.cores),
        governor=one.governor,
        sentinel_ms=(low, middle, high),
        process_spread=100 * one.spread.deviation,
        process_spread_measured=one.spread.freedom > 0,
        unchecked=list(one.unchecked),
    )


INPUTS = 64
"""Different inputs that a subject sees in turn."""

MOST_BYTES = 256 * 1024 * 1024
"""Of inputs of one subject; larger ones are fewer."""

SYNTHETIC = 8
SYNTHETIC_SIZE = (1024, 768)


def image_files(given: Sequence[Path], most: int = INPUTS) -> list[Path]:
    """The images among files and folders, at most so many, evenly spread.

    Raises:
        UsageError: a path does not exist, or there is no image.
    """
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise UsageError(f"There is no {path}; --images takes image files and folders of them.")
        found += sorted(_below(path)) if path.is_dir() else [path]
    if not found:
        raise UsageError(f"{', '.join(map(str, given))} holds no image file; --images takes some.")
    return [found[i * len(found) // most] for i in range(most)] if len(found) > most else found


def _below(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file():
            yield file


def readable(files: Sequence[Path]) -> list[bytes]:
    """The contents of those that can be decoded.

    Raises:
        UsageError: none can; the sentence says why of the first.
    """
    contents, refused = [], []
    for file in files:
        try:
            decode_image(file)
        except ImageError as error:
            refused.append(str(error))
        else:
            contents.append(file.read_bytes())
    if not contents:
        raise UsageError(f"None of the images can be read: {refused[0]}.")
    return contents


def synthetic(seed: int, count: int = SYNTHETIC) -> list[bytes]:
    """Pictures as large and as rough as photos, JPEG of quality 90, the same for the same seed.

    Noise of every size, each twice as fine as the one before and .6 times as strong: decoding takes about as
    long as that of a photo does, and resizing depends on the size alone.
    """
    width, height = SYNTHETIC_SIZE
    pictures = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        picture, strength = np.zeros((height, width, 3)), 1.0
        for scale in (256, 128, 64, 32, 16, 8, 4, 2):
            coarse = rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), dtype=np.uint8)
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture += strength * (np.asarray(smooth, dtype=np.float64) - 128)
            strength *= 0.6
        file = io.BytesIO()
        Image.fromarray((128 + picture).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    return pictures


def inputs_of_images(classifier: Classifier, images: Sequence[bytes]) -> np.ndarray:
    """As the file takes them; few pictures give more inputs when they are shifted around."""
    size = classifier.preprocessing.size
    count = fitting((3, size, size), np.dtype(np.uint8 if classifier.takes_pixels else np.float32))
    rendered = np.stack([render(decode_image(image), classifier.preprocessing) for image in images[:count]])
    return classifier.feed(different(rendered, count))


def different(rendered: np.ndarray, count: int) -> np.ndarray:
    """So many different pictures, uint8 [count, S, S, 3], of perhaps fewer: those again, moved sideways."""
    shifts = [np.roll(rendered[i % len(rendered)], i // len(rendered), axis=1) for i in range(count)]
    return np.stack(shifts)


def random_inputs(shape: tuple[int, ...], kind: np.dtype, seed: int) -> np.ndarray:
    """Noise in the place of pictures, [n, *shape]: standard normal, or of pixels whole numbers."""
    rng = np.random.default_rng(seed)
    count = fitting(shape, kind)
    if kind == np.uint8:
        return rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return rng.standard_normal((count, *shape), dtype=np.float32)


def fitting(shape: tuple[int, ...], kind: np.dtype) -> int:
    """How many inputs: 64, or of very large ones as many as fit, two at least."""
    return max(2, min(INPUTS, MOST_BYTES // (int(np.prod(shape)) * kind.itemsize)))
