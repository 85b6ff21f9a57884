"""What a report says in tables, as text: the HTML and the Markdown page show the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..runs.results import Report, Subject
from ..runs.scores import Proportion, Score
from . import format
from .summary import in_words
from .networks import every, paces, threads


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
    rows += score_rows([network.score for network in networks])
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


def _percent(score: Score | Proportion | None) -> str | None:
    return format.percent(score.percent, score.n) if score else None


def _interval(score: Score | Proportion | None) -> str | None:
    return format.percent_interval(score.low, score.high, score.n) if score else None


def score_rows(scores: Sequence[Score | None]) -> list[list[str]]:
    """Return rows for a score, its interval and its details, with a column for each network."""
    known = [score for score in scores if score is not None]

    def row(name: str, value: Callable[[Score], str | None]) -> list[list[str]]:
        values = [value(score) if score is not None else None for score in scores]
        return [[name, *(one or format.MISSING for one in values)]] if any(values) else []

    def detail(name: str) -> list[list[str]]:
        def percent(score: Score) -> str | None:
            one = score.details.get(name)
            return format.percent(one.percent, score.n) if one else None

        def interval(score: Score) -> str | None:
            one = score.details.get(name)
            return _interval_of(one.low, one.high, score.n) if one else None

        return [*row(f"{name[:1].upper()}{name[1:]}", percent), *row("… 95 % interval", interval)]

    rows = row(format.title(known[0].metric), _percent) if known else []
    rows += row("95 % interval", _interval)
    rows += row("Correct images", lambda s: None if s.correct is None else f"{s.correct:,} of {s.n:,}")
    names = dict.fromkeys(name for score in known for name in score.details)
    return [*rows, *(line for name in names for line in detail(name))]


def _interval_of(low: float | None, high: float | None, n: int) -> str | None:
    return None if low is None or high is None else format.percent_interval(low, high, n)


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
                values = (*(measured.value(name) for name in ("p50", "p90", "p95", "p99")), measured.mean)
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
