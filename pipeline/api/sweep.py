"""`compress resolutions`: a student for each image size from one teacher, and what each gives and costs.

As in CQKD (Čuk et al., 2023): the teacher sees the full size, each student the same crops scaled down. The
teacher is trained or tuned once, in a run folder of its own; every student has one too. At the end all files
are timed once more, together, since figures of different hours do not compare.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...export.latency import runner as latency
from ...export.runtime import Classifier, allowed_cores
from ...models.build import check_size
from ...models.catalogue import multiply_adds
from ...models.names import resolve as resolve_name
from ..data.dataset import ImageSet
from ..data.decode import rendered
from ..errors import UsageError
from ..evaluation.latency import INPUTS
from ..report.format import counted
from ..report.sizes import write
from ..runs import main_process
from ..runs.console import Display
from ..runs.files import digest, write_text
from ..runs.record import read_sealed, with_checksum
from ..runs.results import Latency, Report, Resolutions, Size, Speedup, Subject
from ..stages.bench import MOST_THREADS
from .options import read_options
from .resolve import own_image_size, resolve
from .run import compress

FILE = "resolutions.json"
NOT_HERE = ("student_size", "until", "dry_run")
"""Options of a run that have no meaning for several."""


def resolutions(sizes: Sequence[int], **given: Any) -> Resolutions:
    """A run for each size; the same call does only what is missing.

    Args:
        sizes: sides of the students' input in pixels.
        given: options of a run, as for ``compress``.

    Raises:
        UsageError: an option or a size is wrong; JobError and others as in ``compress``.
    """
    for name in NOT_HERE:
        if given.get(name):
            raise UsageError(f"--{name.replace('_', '-')} belongs to a single run; leave it out here.")
    if not main_process.alone():
        raise UsageError("Several sizes are trained by one process alone; start it without torchrun.")
    if not sizes:
        raise UsageError("--sizes names no size; write them as in --sizes 64,96,128.")
    asked = read_options({name: value for name, value in given.items() if value is not None})
    if asked.image_size is None:
        resolve_name(asked.student)
        asked.image_size = max(own_image_size(asked), *sizes)
    chosen, images = resolve(asked)
    assert chosen.image_size is not None and chosen.out is not None
    largest_first = sorted(set(sizes), reverse=True)
    for size in largest_first:
        if size > chosen.image_size:
            raise UsageError(
                f"--sizes {size} is larger than the teacher's --image-size {chosen.image_size}: students see "
                "its crops scaled down."
            )
        check_size(chosen.student, size)
    out = Path(given["out"]) if given.get("out") else Path(f"{chosen.out}-sizes")
    common = {**given, "image_size": chosen.image_size}
    ends = None if asked.time_limit is None else time.monotonic() + asked.time_limit

    def run(folder: str, **more: Any) -> Report:
        left = None if ends is None else max(1.0, ends - time.monotonic())
        return compress(**{**common, "time_limit": left, **more, "out": out / folder})

    display = Display(quiet=asked.quiet, verbose=asked.verbose)
    display.say(f"The teacher, at {chosen.image_size} px")
    run("teacher", until="teacher")
    weights = [out / "teacher" / file for file in _teacher_files(len(chosen.teacher))]
    with_teacher = {
        "teacher": chosen.teacher,
        "teachers_from_seeds": 1,
        "teacher_epochs": None,  # it has learned
        "teacher_weights": [str(file) for file in weights],
        "teacher_head": [head if head == "none" else "keep" for head in chosen.teacher_head],
    }
    reports = {}
    for size in largest_first:
        display.say(f"A student of {size} px")
        reports[size] = run(str(size), student_size=size, **with_teacher)
    found = _together(out, reports, images, chosen.bench_seconds, chosen.seed, display)
    write(found, out)
    return found


def whole_numbers(sizes: str) -> list[int]:
    """``64,96,128`` as numbers.

    Raises:
        UsageError: they are not of this form, or too small.
    """
    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError as error:
        raise UsageError(f"--sizes {sizes} are no numbers; write them as in --sizes 64,96,128.") from error
    if min(numbers) < 8:
        raise UsageError(f"--sizes {sizes}: {min(numbers)} pixels are too few; take 8 or more.")
    return numbers


def _teacher_files(count: int) -> list[str]:
    return ["teacher.safetensors"] if count == 1 else [f"teacher.{t}.safetensors" for t in range(count)]


def _together(
    out: Path,
    reports: Mapping[int, Report],
    images: ImageSet,
    seconds: float,
    seed: int,
    display: Display,
) -> Resolutions:
    """All files timed in one bench, or as they were where nothing has changed since."""
    threads = sorted({1, min(allowed_cores(), MOST_THREADS)})
    files = {
        f"{kind} {size}": out / str(size) / subject.file
        for size, report in reports.items()
        for kind, subject in _timed_here(report).items()
        if subject is not None and subject.file is not None
    }
    hashes = {
        size: [subject.sha256 for subject in (report.student, report.student_int8) if subject]
        for size, report in reports.items()
    }
    timed = digest({"files": hashes, "threads": threads, "seconds": seconds})
    before = _before(out / FILE)
    if before is not None and before.timed == timed:
        return before
    first = next(iter(reports.values()))
    assert first.teacher is not None and first.teacher_image_size is not None
    subjects = [_subject(name, file, images) for name, file in files.items()]
    with display.stage("bench") as progress:
        result = latency.bench(
            subjects,
            threads=threads,
            seconds=seconds,
            seed=seed,
            progress=lambda share, what: progress.update("timing", share, 1.0, more=what),
        )
    for flag in result.flags:
        display.note(flag.sentence)
    largest = max(reports)
    machine = result.environment
    found = Resolutions(
        title=f"{first.student.name if first.student else ''} from {first.teacher.name} at "
        f"{counted(len(reports), 'image size')}",
        folder=str(out),
        command=first.command,
        method=first.method,
        teacher=first.teacher,
        teacher_image_size=first.teacher_image_size,
        sizes=[
            Size(
                size=size,
                folder=str(size),
                gmacs=_gmacs(report, size),
                student=_timed(_exported(report), "student", size, largest, threads, result),
                student_int8=None
                if report.student_int8 is None
                else _timed(report.student_int8, "student_int8", size, largest, threads, result),
            )
            for size, report in reports.items()
        ],
        threads=threads,
        environment={
            "cpu": machine.cpu,
            "machine": machine.machine,
            "instruction sets": ", ".join(machine.flags),
            "cores allowed": str(machine.cores),
            "onnxruntime": machine.onnxruntime,
        },
        timed=timed,
    )
    found = with_checksum(found)
    write_text(out / FILE, found.model_dump_json(indent=2) + "\n")
    return found


def _subject(name: str, file: Path, images: ImageSet) -> latency.Subject:
    classifier = Classifier.load(file)
    pixels = rendered(images.test[:INPUTS], classifier.preprocessing).pixels.stacked().numpy()
    return latency.Subject(name, file, classifier.feed(pixels))


def _gmacs(report: Report, size: int) -> float | None:
    assert report.student is not None and report.data is not None
    return multiply_adds(report.student.name, size, len(report.data.classes))


def _exported(report: Report) -> Subject:
    assert report.student is not None
    return report.student


def _timed_here(report: Report) -> dict[str, Subject | None]:
    """A run's files, without one that is made for another family's processors."""
    int8 = None if report.int8 and report.int8[0].not_timed is not None else report.student_int8
    return {"student": report.student, "student_int8": int8}


def _timed(
    subject: Subject,
    kind: str,
    size: int,
    largest: int,
    threads: Sequence[int],
    result: latency.BenchResult,
) -> Subject:
    """A run's subject with its latency and its speed-up over the largest size, both of this bench."""
    name, over = f"{kind} {size}", f"{kind} {largest}"
    timed = {one.subject for one in result.latencies}
    measured = {n: result.latency(name, n) for n in threads if name in timed}
    both = size != largest and {name, over} <= timed
    speedups = [result.speedup(name, over, n) for n in threads] if both else []
    return subject.model_copy(
        update={
            "latency_ms": {
                str(n): Latency(p50=one.p50, p90=one.p90, p95=one.p95, p99=one.p99, mean=one.mean, n=one.n)
                for n, one in measured.items()
            },
            "speedups": [
                Speedup(over=over, threads=one.threads, ratio=one.ratio, low=one.low, high=one.high)
                for one in speedups
            ],
        }
    )


def _before(file: Path) -> Resolutions | None:
    """What was found the last time; None where there is none, a damaged one, or one of another version."""
    try:
        return Resolutions.model_validate(read_sealed(file))
    except (OSError, ValueError, ValidationError):
        return None
