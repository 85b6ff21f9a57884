"""Which networks a report compares, and how fast they are against each other."""

from dataclasses import dataclass
from typing import Literal

from ..runs.results import Report, Subject
from ..tasks import task_of

Verdict = Literal["faster", "no difference", "slower"]


@dataclass(frozen=True)
class Column:
    """One network of the report. ``key`` names it in `Speedup.over` and in the style sheet."""

    key: str
    role: str
    subject: Subject

    @property
    def short(self) -> str:
        """The role where there is little room: Teacher, fp32, int8."""
        return self.role.removeprefix("Student ")


def measure(report: Report) -> str:
    """What the networks are compared by."""
    return task_of(report.data).metric if report.data is not None else "accuracy"


def compared(report: Report) -> list[Column]:
    """Teacher (the one, or the ensemble), student fp32, student int8: those that are known by now."""
    teacher = report.teacher or (report.teachers[0] if len(report.teachers) == 1 else None)
    ensemble = len(report.teachers) > 1
    found = [
        ("teacher", "All teachers" if ensemble else "Teacher", teacher),
        ("student", "Student fp32", report.student),
        ("student_int8", "Student int8", report.student_int8),
    ]
    return [Column(key, role, subject) for key, role, subject in found if subject is not None]


def every(report: Report) -> list[Column]:
    """As `compared`, with each single teacher before the ensemble where there are several."""
    singles = report.teachers if len(report.teachers) > 1 else []
    each = [Column(f"teacher {i}", f"Teacher {i}", subject) for i, subject in enumerate(singles)]
    return each + compared(report)


def of(report: Report, key: str) -> Column | None:
    return next((column for column in compared(report) if column.key == key), None)


def shipped(report: Report) -> Column | None:
    """The int8 file; the fp32 student as long as there is no other."""
    return of(report, "student_int8") or of(report, "student")


def threads(report: Report) -> list[str]:
    """Every thread count a latency was measured at, the smallest first."""
    counts = {count for column in every(report) for count in column.subject.latency_ms}
    return sorted(counts, key=lambda count: (len(count), count))


@dataclass(frozen=True)
class Pace:
    """``column`` against ``over``: how many times faster, with the paired interval where one was measured."""

    column: Column
    over: Column
    threads: str
    ratio: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> Verdict | None:
        """None without an interval: two medians alone do not tell a difference from noise."""
        if self.low is None or self.high is None:
            return None
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"


def pace(column: Column | None, over: Column | None, count: str) -> Pace | None:
    """The measured `Speedup` of ``column`` over ``over`` at ``count`` threads, else the ratio of medians."""
    if column is None or over is None:
        return None
    for name in (over.key, over.subject.name):
        for speedup in column.subject.speedups:
            if speedup.over == name and str(speedup.threads) == count:
                return Pace(column, over, count, speedup.ratio, speedup.low, speedup.high)
    own, other = column.subject.latency_ms.get(count), over.subject.latency_ms.get(count)
    if own is None or other is None or not own.p50 or not other.p50:
        return None
    return Pace(column, over, count, other.p50 / own.p50)


def paces(report: Report) -> list[Pace]:
    """int8 over each teacher, int8 over fp32, fp32 over each teacher, at every thread count."""
    teachers = [column for column in every(report) if column.key.startswith("teacher")]
    int8, student = of(report, "student_int8"), of(report, "student")
    pairs = [*((int8, teacher) for teacher in teachers), (int8, student)]
    pairs += [(student, teacher) for teacher in teachers]
    found = [pace(column, over, count) for column, over in pairs for count in threads(report)]
    return [one for one in found if one is not None]
