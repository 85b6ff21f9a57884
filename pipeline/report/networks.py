"""The networks that a report compares: scores, speed-ups, and the section that shows them side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

from ...export.results import Speedup
from ..runs.results import SHIPPING_ORDER, Report, Subject
from ..runs.scores import Score
from ..tasks import load_task, task_of
from ..tasks.base import Task
from . import format
from .charts import Chart
from .page import Section
from .scatter import Point, scatter
from .tables import Attribute, Table, attribute_rows

ROLES = {"teacher": "Teacher", "student": "Student fp32", "student_int8": "Student int8"}


@dataclass(frozen=True)
class Column:
    """A network of the report. ``key`` is its name in `Speedup.over` and in the style sheet."""

    key: str
    role: str
    subject: Subject

    @property
    def short_role(self) -> str:
        """Teacher, fp32, int8."""
        return self.role.removeprefix("Student ")

    @property
    def role_in_sentence(self) -> str:
        return self.role[:1].lower() + self.role[1:]


def find_task(report: Report) -> Task:
    """Return the task of the run; classification before its data is read."""
    return load_task("classification") if report.data is None else task_of(report.data)


def score_name(report: Report) -> str:
    """Return the name of the score that networks are compared by: accuracy, mAP or AP."""
    return find_task(report).metric


def compared_networks(report: Report) -> list[Column]:
    """Return the teacher or the ensemble, the fp32 student and the int8 student, as far as they exist."""
    teacher = report.teacher or (report.teachers[0] if len(report.teachers) == 1 else None)
    subjects = {"teacher": teacher, "student": report.student, "student_int8": report.student_int8}
    roles = ROLES | ({"teacher": "Teacher ensemble"} if len(report.teachers) > 1 else {})
    return [Column(key, roles[key], subject) for key, subject in subjects.items() if subject is not None]


def all_networks(report: Report) -> list[Column]:
    """Return the compared networks, and before an ensemble each of its teachers."""
    teachers = report.teachers if len(report.teachers) > 1 else []
    members = [Column(f"teacher {i}", f"Teacher {i}", subject) for i, subject in enumerate(teachers)]
    return members + compared_networks(report)


def find_network(report: Report, key: str) -> Column | None:
    return next((column for column in compared_networks(report) if column.key == key), None)


def shipped_network(report: Report) -> Column | None:
    """Return the int8 file if there is one, else the fp32 student."""
    return next(filter(None, (find_network(report, key) for key in SHIPPING_ORDER)), None)


def thread_counts(report: Report) -> list[str]:
    """Return the numbers of threads at which latency was measured, the smallest first."""
    counts = {count for column in all_networks(report) for count in column.subject.latency_ms}
    return sorted(counts, key=int)


def median_latency(subject: Subject, threads: str) -> float | None:
    measured = subject.latency_ms.get(threads)
    return measured.p50 if measured is not None else None


def latency_measure(report: Report, threads: str) -> tuple[str, Callable[[Subject], float | None]]:
    """Return the name and the reader of the median latency, or of the processor time of a disturbed bench."""
    if report.bench is None or int(threads) not in report.bench.disturbed_threads:
        return "median latency", partial(median_latency, threads=threads)
    return "processor time", partial(processor_time, threads=threads)


def processor_time(subject: Subject, threads: str) -> float | None:
    """Return the processor time of a run on one thread; that of several threads does not measure latency."""
    measured = subject.latency_ms.get(threads)
    return measured.processor_ms if measured is not None and threads == "1" else None


@dataclass(frozen=True)
class SpeedRatio:
    """A network is ``ratio`` times as fast as another, with the paired 95 % interval if it was measured.

    With another ``clock`` than wall time, it needs that much less processor time.
    """

    threads: str
    ratio: float
    low: float | None = None
    high: float | None = None
    clock: Literal["wall", "processor"] = "wall"

    @classmethod
    def from_speedup(cls, speedup: Speedup) -> Self:
        return cls(str(speedup.threads), speedup.ratio, speedup.low, speedup.high, speedup.clock)

    @property
    def verdict(self) -> Literal["faster", "no difference", "slower"] | None:
        """None without an interval: two medians alone cannot separate a difference from noise."""
        if self.low is None or self.high is None:
            return None
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"

    @property
    def is_faster(self) -> bool:
        return self.ratio > 1 if self.verdict is None else self.verdict == "faster"

    @property
    def headline(self) -> tuple[str, str]:
        """The ratio and its meaning; of a slower network, how many times slower it is."""
        in_wall_time = self.clock == "wall"
        if self.verdict == "no difference":
            measure = "speed" if in_wall_time else "processor time"
            return format.times(self.ratio), f"no significant difference in {measure} from"
        if self.ratio < 1:
            return format.times(1 / self.ratio), "slower than" if in_wall_time else "more processor time than"
        return format.times(self.ratio), "faster than" if in_wall_time else "less processor time than"

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        if self.verdict == "slower":
            return format.times_interval(1 / self.high, 1 / self.low)
        return format.times_interval(self.low, self.high)

    @property
    def text(self) -> str:
        """8.40× faster (8.21–8.62×); no significant difference (0.98–1.03×); 1.10× slower, no interval."""
        if self.verdict == "no difference":
            measure = "" if self.clock == "wall" else " in processor time"
            return f"no significant difference{measure} ({self.interval})"
        value, meaning = self.headline
        word = meaning.removesuffix(" than")
        return f"{value} {word}" + (f" ({self.interval})" if self.interval else ", no interval")


def compare_speed(column: Column | None, over: Column | None, threads: str) -> SpeedRatio | None:
    """Return the measured speed-up of ``column`` over ``over``, else the ratio of their median latencies."""
    if column is None or over is None:
        return None
    for name in (over.key, over.subject.name):
        for speedup in column.subject.speedups:
            if speedup.over == name and str(speedup.threads) == threads:
                return SpeedRatio.from_speedup(speedup)
    p50, other = median_latency(column.subject, threads), median_latency(over.subject, threads)
    return SpeedRatio(threads, other / p50) if p50 and other else None


def speed_ratios(report: Report, column: Column | None, over: Column | None) -> list[SpeedRatio]:
    """Return the measured ratios, the smallest thread count first."""
    return [ratio for n in thread_counts(report) if (ratio := compare_speed(column, over, n))]


def score_rows(scores: Sequence[Score | None], details: int | None = None) -> list[list[str]]:
    """Return rows for a score, its interval and its further metrics, with a column for each network.

    ``details`` limits the number of further metrics.
    """
    measured = [score for score in scores if score is not None]
    if not measured:
        return []
    attributes: dict[str, Attribute] = {
        format.title(measured[0].metric): (lambda score: score, format.score_percent),
        "95 % interval": (lambda score: score, format.score_interval),
        "Correct images": (
            lambda score: score if score is not None and score.correct is not None else None,
            lambda score: f"{score.correct:,} of {score.n:,}",
        ),
    }
    for name in list(dict.fromkeys(name for score in measured for name in score.details))[:details]:
        attributes[format.capitalize(name)] = (partial(_format_detail, name), str)
    return attribute_rows(scores, attributes)


def _format_detail(name: str, score: Score | None) -> str | None:
    measure = score.details.get(name) if score is not None else None
    if score is None or measure is None:
        return None
    percent = format.percent(measure.percent, score.n)
    if measure.low is None or measure.high is None:
        return percent
    return f"{percent} ({format.percent_interval(measure.low, measure.high, score.n)})"


def comparison_section(report: Report) -> Section:
    table, measures = comparison_tables(report)
    figures = [accuracy_over_latency(report)]
    return Section("Comparison", "comparison", figures=figures, tables=[table], folded=[measures])


def accuracy_over_latency(report: Report) -> Chart | None:
    """Draw the networks at the smallest thread count; None unless two of them were measured."""
    threads = next(iter(thread_counts(report)), "0")
    points = [
        Point.from_score(column.short_role, column.key, score, p50, column.subject.bytes, column.short_role)
        for column in all_networks(report)
        if (score := column.subject.score) and (p50 := median_latency(column.subject, threads)) is not None
    ]
    title = f"{format.title(score_name(report))} over latency"
    x_name = f"median latency in ms, {format.threads(threads)}"
    return scatter(title, points, x_name=x_name) if len(points) > 1 else None


def comparison_tables(report: Report) -> tuple[Table, Table]:
    """Return score, size and latency of each network, and its other measures, with a column for each."""
    columns = all_networks(report)
    costs: dict[str, Attribute] = {"ONNX file": (lambda s: s.bytes, format.megabytes)}
    for threads in thread_counts(report):
        name, read = latency_measure(report, threads)
        costs[f"{format.capitalize(name)}, {format.threads(threads)}"] = (read, format.milliseconds)
    others: dict[str, Attribute] = {
        "Agreement with teacher": (lambda s: s.agreement, format.score),
        f"Validation {score_name(report)} (PyTorch)": (lambda s: s.val_score, format.score),
        "Parameters": (lambda s: s.parameters, format.millions),
        "Multiply-adds": (lambda s: s.gmacs, lambda gmacs: f"{format.significant(gmacs)} G"),
        "Max. logit difference to PyTorch": (lambda s: s.parity, lambda p: format.scientific(p.max_abs)),
        "Max. logit difference / logit range": (lambda s: s.parity, lambda p: format.scientific(p.max_rel)),
    }
    networks = [column.subject for column in columns]
    heads, scores = ["", *(column.role for column in columns)], score_rows([n.score for n in networks])
    names = [["Network", *(network.name for network in networks)]] if columns else []
    return (
        Table("Comparison", heads, [*names, *scores[:2], *attribute_rows(networks, costs)]),
        Table("More measures", heads, [*scores[2:], *attribute_rows(networks, others)]),
    )
