"""What a run's report tells of its files."""

from ..config import stages
from ..evaluation.results import ComparedFile, ComparedRun, Kind
from ..report.format import together
from ..report.headline import machine, missing
from ..report.subjects import Column, of
from ..runs.results import Report
from ..runs.scores import Speedup
from .runs import Run

OF_THE_STUDENT = ("prepare", "student", "qat", stages.ROUND)
"""Stages in which it is made."""

KINDS: dict[str, Kind] = {"student_int8": "int8", "student": "fp32", "teacher": "teacher"}


def measured(run: Run, threads: int | None) -> ComparedRun:
    """A run as it is compared."""
    report = run.report
    files = {kind: _file(of(report, key), kind, threads) for key, kind in KINDS.items()}
    student = report.student or report.student_int8
    seconds = [one.seconds for one in report.stages if stages.kind(one.stage) in OF_THE_STUDENT]
    seed = report.config.get("seed")
    return ComparedRun(
        name=run.name,
        source=str(run.source),
        method=report.method,
        teacher=together([one.name for one in report.teachers] or _teachers(report)),
        student=student.name if student is not None else str(report.config.get("student", "")),
        image_size=report.image_size,
        parameters=student.parameters if student is not None else None,
        int8=files["int8"],
        fp32=files["fp32"],
        of_teacher=files["teacher"],
        training_seconds=sum(seconds) if seconds else None,
        seed=seed if isinstance(seed, int) else None,
        data=report.data.name if report.data is not None else None,
        fingerprint=report.data.fingerprint if report.data is not None else None,
        machine=machine(report) if _timed(report) else None,
        missing=missing(report),
    )


def _teachers(report: Report) -> list[str]:
    named = report.config.get("teacher", [])
    return [str(one) for one in named] if isinstance(named, list) else [str(named)]


def _timed(report: Report) -> bool:
    return any(one is not None and one.latency_ms for one in (report.student, report.student_int8))


def thread_counts(report: Report) -> set[int]:
    """At which its files that ship were timed."""
    files = (report.student, report.student_int8)
    return {int(count) for one in files if one is not None for count in one.latency_ms}


def _file(column: Column | None, kind: Kind, threads: int | None) -> ComparedFile | None:
    if column is None or (kind == "teacher" and column.subject.score is None):
        return None
    subject = column.subject
    latency = subject.latency_ms.get(str(threads))
    low = high = None
    if latency is not None and latency.p50 is not None:
        low, high = latency.intervals.get("p50", (None, None))
    return ComparedFile(
        kind=kind,
        network=subject.name,
        bytes=subject.bytes,
        accuracy=subject.accuracy,
        multi_label=subject.multi_label,
        ece=subject.calibration.ece if subject.calibration is not None else None,
        p50=latency.p50 if latency is not None else None,
        p50_low=low,
        p50_high=high,
        speedup=_speedup(subject.speedups, threads),
    )


def _speedup(speedups: list[Speedup], threads: int | None) -> Speedup | None:
    return next((one for one in speedups if one.over == "teacher" and one.threads == threads), None)
