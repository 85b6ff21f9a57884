"""What a report says in tables, as text: the HTML and the Markdown page show the same."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..runs.results import Report, Subject
from ..runs.scores import Accuracy, ClassResult, Score
from . import format
from .summary import in_words
from .networks import every, measure, paces, threads


@dataclass(frozen=True)
class Table:
    """``rows`` of text under ``columns``. ``code``: the columns of names, hashes and the like."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    code: frozenset[int] = frozenset()
    note: str = ""
    text: bool = False
    """All cells are words, not numbers: aligned to the left."""
    left: int = 1
    """Otherwise: so many columns of words, before those of numbers."""

    def first(self, most: int, where: str = "report.json") -> "Table":
        """The table cut to so many rows, which its note then says; all are in the file ``where``."""
        if len(self.rows) <= most:
            return self
        cut = f"The first {most:,} of {len(self.rows):,}; all are in {where}."
        return replace(self, rows=self.rows[:most], note=f"{self.note} {cut}".strip())


def comparison(report: Report) -> Table:
    """Measures down, networks across; a measure nobody has is left out."""
    columns = every(report)
    networks = [column.subject for column in columns]

    def row(name: str, value: Callable[[Subject], str | None]) -> list[list[str]]:
        values = [value(network) for network in networks]
        return [[name, *(one or format.MISSING for one in values)]] if any(values) else []

    def latency(count: str) -> Callable[[Subject], str | None]:
        def p50(network: Subject) -> str | None:
            measured = network.latency_ms.get(count)
            return format.milliseconds(measured.p50) if measured else None

        return p50

    rows = [["Network", *(network.name for network in networks)]]
    rows += row("mAP" if measure(report) == "mAP" else "Accuracy", lambda s: _percent(s.score))
    rows += row("95 % interval", lambda s: _interval(s.score))
    rows += row("F1 of all labels", lambda s: _of_labels(s, "micro_f1"))
    rows += row("F1, mean over classes", lambda s: _of_labels(s, "macro_f1"))
    rows += row("Test images, correct", lambda s: _counts(s.accuracy))
    rows += row("Mean over classes", lambda s: _balanced(s.accuracy))
    rows += row("Top-5 accuracy", lambda s: _top5(s.accuracy))
    rows += row("Agreement with the teacher", lambda s: _percent(s.agreement))
    rows += row("… 95 % interval", lambda s: _interval(s.agreement))
    rows += row("Val images, before export", lambda s: _percent(s.val_score))
    rows += row("… 95 % interval", lambda s: _interval(s.val_score))
    rows += row("ONNX file", lambda s: format.megabytes(s.bytes) if s.bytes is not None else None)
    for count in threads(report):
        rows += row(f"Median latency, {format.threads(count)}", latency(count))
    rows += row("Parameters", lambda s: format.millions(s.parameters) if s.parameters is not None else None)
    rows += row(
        "Multiply-adds", lambda s: f"{format.significant(s.gmacs)} G" if s.gmacs is not None else None
    )
    rows += row("Export against torch", lambda s: format.tiny(s.parity.max_abs) if s.parity else None)
    rows += row("… by the logits’ spread", lambda s: format.tiny(s.parity.max_rel) if s.parity else None)
    return Table("Comparison", ["", *(column.role for column in columns)], rows if columns else [])


def _percent(score: Score | None) -> str | None:
    return format.percent(score.percent, score.n) if score else None


def _interval(score: Score | None) -> str | None:
    return format.percent_interval(score.low, score.high, score.n) if score else None


def _counts(accuracy: Accuracy | None) -> str | None:
    return f"{accuracy.correct:,} of {accuracy.n:,}" if accuracy else None


def _of_labels(subject: Subject, measured: str) -> str | None:
    """Where images have several labels."""
    score = subject.multi_label
    return format.percent(getattr(score, measured), score.n) if score else None


def _balanced(accuracy: Accuracy | None) -> str | None:
    return (
        format.percent(accuracy.balanced, accuracy.n) if accuracy and accuracy.balanced is not None else None
    )


def _top5(accuracy: Accuracy | None) -> str | None:
    return format.percent(accuracy.top5, accuracy.n) if accuracy and accuracy.top5 is not None else None


def speedups(report: Report) -> Table:
    """A row per pair of networks, a column per thread count."""
    counts, measured = threads(report), paces(report)
    rows: dict[str, list[str]] = {}
    for one in measured:
        name = f"{one.column.role} against {one.over.role.lower()}"
        row = rows.setdefault(name, [name, *[format.MISSING] * len(counts)])
        row[1 + counts.index(one.threads)] = in_words(one)
    return Table(
        "Speed against each other",
        ["", *(format.threads(count) for count in counts)],
        list(rows.values()),
        note="Ratio of the median latencies, with its 95 % interval where one was measured.",
    )


def latency(report: Report) -> Table:
    """Of reports that hold no bench of their own; see ``latency.py`` for that."""
    rows: list[list[str]] = []
    if report.bench is not None:
        return Table("Latency of one image", [], [])
    for column in every(report):
        for count in threads(report):
            measured = column.subject.latency_ms.get(count)
            if measured is not None:
                values = (measured.p50, measured.p90, measured.p95, measured.p99, measured.mean)
                rows.append(
                    [
                        column.role,
                        count,
                        *(format.milliseconds(v) for v in values),
                        format.count(measured.n),
                    ]
                )
    return Table(
        "Latency of one image",
        ["", "threads", "p50", "p90", "p95", "p99", "mean", "runs"],
        rows,
        note="Batch 1, the model alone. A percentile is left out where too few runs were measured for it.",
    )


def classes(report: Report) -> Table:
    """A row per class: images by role, and each network's accuracy on the test images."""
    columns = [column for column in every(report) if column.subject.per_class]
    roles = report.data.per_class if report.data else {}
    roles = {role: roles[role] for role in ("train", "val", "test") if role in roles}
    names = _labels(report, [column.subject.per_class for column in columns])
    if not roles and not columns:
        return Table("Classes", [], [])
    results = [{one.label: one for one in column.subject.per_class} for column in columns]
    rows = [
        [
            name,
            *(format.count(counts.get(name, 0)) for counts in roles.values()),
            *(_of_class(result.get(name)) for result in results),
        ]
        for name in names
    ]
    return Table("By class", ["class", *roles, *(column.role for column in columns)], rows)


def _labels(report: Report, given: Iterable[list[ClassResult]]) -> list[str]:
    known = report.data.classes if report.data else []
    return list(dict.fromkeys([*known, *(one.label for results in given for one in results)]))


def _of_class(result: ClassResult | None) -> str:
    if result is None or result.n == 0:
        return format.MISSING
    return format.percent(100 * result.correct / result.n)


def confused(report: Report, most: int = 20) -> Table:
    """The pairs of classes confused most often: (true class, answer), by number of images."""
    if report.confusion is None:
        return Table("Most confused", [], [])
    names = class_names(report, len(report.confusion))
    pairs = [
        (count, truth, answer)
        for truth, row in enumerate(report.confusion)
        for answer, count in enumerate(row)
        if count and truth != answer
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = [
        [
            names[truth],
            names[answer],
            f"{count:,}",
            format.percent(100 * count / sum(report.confusion[truth])),
        ]
        for count, truth, answer in pairs[:most]
    ]
    note = f"The {most} most frequent of {len(pairs):,} confused pairs." if len(pairs) > most else ""
    return Table("Most confused", ["true class", "answer", "images", "of the class"], rows, note=note, left=2)


def class_names(report: Report, n: int) -> list[str]:
    known = report.data.classes if report.data else []
    return [known[i] if i < len(known) else f"class {i}" for i in range(n)]
