"""Find runs and read their reports."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ...config import stages
from ...errors import UsageError
from ...evaluation.results import ComparedFile, ComparedRun, Kind
from ...report.assemble import assemble
from ...report.format import join_names
from ...report.networks import Column, find_network
from ...report.summary import describe_machine, list_missing
from ...runs.files import shorten_paths
from ...runs.folder import RunFolder
from ...runs.predictions import PREDICTIONS_FILE, Predictions, read_predictions
from ...runs.record import RECORD, read_checked
from ...runs.results import Report

REPORT = "report.json"

TEACHER = "teacher"
"""Folder of a sweep's teacher, a run without a student."""

STUDENT_STAGES = ("prepare", "student", "qat", stages.ROUND)

KINDS: dict[str, Kind] = {"student_int8": "int8", "student": "fp32", "teacher": "teacher"}


@dataclass(frozen=True)
class Run:
    """A run with a unique name; ``path`` is its folder, or a report.json on its own."""

    name: str
    path: Path
    report: Report


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Return every run once in the order given; those in a folder of runs by name.

    Raises:
        UsageError: a path is not a run, a folder of runs or a report.
    """
    unique = {run.resolve(): run for path in paths for run in _expand(path)}
    names = shorten_paths([path.parent if path.name == REPORT else path for path in unique])
    return [Run(name, path, _read_report(path)) for name, path in zip(names, unique.values(), strict=True)]


def _expand(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path.parent if path.name == REPORT and (path.parent / RECORD).is_file() else path
    elif _is_run(path):
        yield path
    elif path.is_dir():
        children = [child for child in sorted(path.iterdir()) if child.name != TEACHER and _is_run(child)]
        if not children:
            raise UsageError(f"{path} is not a run folder and does not contain any.")
        yield from children
    else:
        raise UsageError(f"{path} does not exist. Set it to a run folder, a folder of runs or a report.json.")


def _is_run(path: Path) -> bool:
    return (path / RECORD).is_file() or (path / REPORT).is_file()


def _read_report(path: Path) -> Report:
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():  # no stage is finished
        return assemble(RunFolder.read(path))
    try:
        return Report.model_validate(read_checked(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        reason = f"is not a report or is damaged ({error})"
        if isinstance(error, ValidationError):
            reason = "was written by another version of questpress"
        raise UsageError(f"{file} {reason}. Run compress report to write it again.") from error


def read_run_predictions(run: Run) -> Predictions | None:
    """Return a run's predictions on its test images, or None if there are none.

    Raises:
        JobError: the file was modified.
    """
    if not run.path.is_dir():
        return None
    if (run.path / RECORD).is_file():
        RunFolder.read(run.path).check_output(PREDICTIONS_FILE)
    return read_predictions(run.path / PREDICTIONS_FILE)


def list_thread_counts(report: Report) -> list[int]:
    """Return the numbers of threads at which the run's exported files were timed."""
    files = (report.student, report.student_int8)
    return sorted({int(count) for file in files if file is not None for count in file.latency_ms})


def summarize_run(run: Run, threads: int | None) -> ComparedRun:
    """Return the results of a run that are compared, with latencies at a number of threads."""
    report = run.report
    files = {kind: _summarize_file(find_network(report, key), kind, threads) for key, kind in KINDS.items()}
    student = report.student or report.student_int8
    seconds = [stage.seconds for stage in report.stages if stages.get_kind(stage.stage) in STUDENT_STAGES]
    seed, teacher = report.config.get("seed"), report.config.get("teacher", [])
    teachers = [str(name) for name in (teacher if isinstance(teacher, list) else [teacher])]
    return ComparedRun(
        name=run.name,
        source=str(run.path),
        method=report.method,
        teacher=join_names([network.name for network in report.teachers] or teachers),
        student=student.name if student is not None else str(report.config.get("student", "")),
        image_size=report.image_size,
        parameters=student.parameters if student else None,
        int8=files["int8"],
        fp32=files["fp32"],
        teacher_file=files["teacher"],
        training_seconds=sum(seconds) if seconds else None,
        seed=seed if isinstance(seed, int) else None,
        data=report.data.name if report.data else None,
        fingerprint=report.data.fingerprint if report.data else None,
        machine=describe_machine(report.environment) if list_thread_counts(report) else None,
        missing=list_missing(report),
    )


def _summarize_file(column: Column | None, kind: Kind, threads: int | None) -> ComparedFile | None:
    if column is None or (kind == "teacher" and column.subject.score is None):
        return None
    subject = column.subject
    latency = subject.latency_ms.get(str(threads))
    median = None if latency is None else latency.percentiles.get("p50")
    return ComparedFile(
        kind=kind,
        network=subject.name,
        bytes=subject.bytes,
        score=subject.score.model_copy(update={"classes": []}) if subject.score else None,
        ece=subject.calibration.ece if subject.calibration else None,
        p50=median.value if median else None,
        p50_low=median.low if median else None,
        p50_high=median.high if median else None,
        speedup=next((s for s in subject.speedups if s.over == "teacher" and s.threads == threads), None),
    )
