"""What the report says of honest probabilities: the diagrams, the table, and sentences that read them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...runs.results import Report
from ...runs.scores import Calibration, Proportion, ReliabilityBin
from .. import format
from ..charts import WIDTH, Tick
from ..networks import Column, compared, every, shipped
from ..tables import Table

LEFT, TOP, SIDE = 46, 8, 236
STRIP_TOP, STRIP = TOP + SIDE + 12, 34
"""Under the square a strip shows how many answers each bin has."""
HEIGHT = STRIP_TOP + STRIP + 34
INSET = 6
"""Room between the square's edges and 0 and 100 %."""


@dataclass(frozen=True)
class Dot:
    """A bin's answers: mean confidence across, accuracy up, with its interval; ``text`` says them."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Pillar:
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram. ``before``: the dots without the temperature that was folded in."""

    title: str
    note: str
    key: str
    description: str
    dots: list[Dot]
    before: list[Dot]
    pillars: list[Pillar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    diagonal: tuple[float, float, float, float]
    axis: str
    height: int = HEIGHT
    width: int = WIDTH


@dataclass(frozen=True)
class Section:
    text: str
    diagrams: list[Reliability]
    caption: str
    table: Table


def section(report: Report) -> Section:
    """Empty where nothing was measured."""
    diagrams = [
        diagram(column, measured)
        for column in compared(report)
        if (measured := column.subject.calibration) is not None
    ]
    return Section(" ".join(sentences(report)), diagrams, caption(diagrams), table(report))


def caption(diagrams: list[Reliability]) -> str:
    told = (
        "A dot: the test images’ answers in one range of confidence, as high as the percentage of them that "
        "is right. On the dashed line they are right as often as they say, below it less often. "
        "Upright line: 95 % interval. "
    )
    told += "Ring: the same file without its temperature. " if any(one.before for one in diagrams) else ""
    return told + "Bars: how many answers."


def sentences(report: Report) -> list[str]:
    """Each network's probabilities read aloud, and what the temperature has changed."""
    found = [
        reading(column, measured)
        for column in compared(report)
        if (measured := column.subject.calibration) is not None
    ]
    fit, ships = report.temperature, shipped(report)
    measured = ships.subject.calibration if ships is not None else None
    if fit is None:
        return found
    told = f"The files’ logits are divided by a temperature of {fit.value:.2f}, fitted on "
    told += format.counted(fit.n, "val image")
    if fit.low is not None and fit.high is not None:
        told += f" (95 % interval {fit.low:.2f}–{fit.high:.2f})"
    if ships is not None and measured is not None and measured.before is not None:
        before = measured.before
        told += (
            f"; without it the {_named(ships)} file would say {format.percent(before.confidence, before.n)}"
            f", with an ECE of {format.percent(before.ece, before.n)}"
        )
    return [*found, f"{told}."]


def reading(column: Column, measured: Calibration) -> str:
    """Says 92.0 % where it is right 88.0 % of the time: over-confident by 4.0 points."""
    confidence, accuracy = (format.percent(one, measured.n) for one in (measured.confidence, measured.accuracy))
    return (
        f"The {_named(column)}’s predictions have a mean probability of {confidence}, and {accuracy} are "
        f"correct: {verdict(measured)}."
    )


def verdict(measured: Calibration) -> str:
    gap = measured.confidence - measured.accuracy
    size = format.points(abs(gap), measured.n)[1:]
    if measured.gap_low > 0:
        return f"over-confident by {size}"
    if measured.gap_high < 0:
        return f"under-confident by {size}"
    return f"honest on average, as far as {format.counted(measured.n, 'image')} can tell"


def line(report: Report) -> str | None:
    """For the terminal: each network's ECE, and what it was without the temperature."""
    parts = []
    for column in compared(report):
        measured = column.subject.calibration
        if measured is not None:
            before = f"{format.percent(measured.before.ece, measured.n)} → " if measured.before else ""
            parts.append(f"{_named(column)} {before}{format.percent(measured.ece, measured.n)}")
    return f"ECE: {', '.join(parts)}" if parts else None


def table(report: Report) -> Table:
    """A row for each network, and another for each file as it would be without the temperature."""
    told = "The teacher’s figures are those of its weights in torch, the students’ those of the files."
    return table_of(every(report), told)


def table_of(columns: Sequence[Column], told: str = "") -> Table:
    """The same of any networks; ``told`` ends its note."""
    rows = []
    for column in columns:
        measured = column.subject.calibration
        if measured is not None:
            rows.append(_row(column.role, measured))
            if measured.before is not None:
                rows.append(_row(f"{column.role}, without temperature", measured.before))
    note = (
        "ECE: expected calibration error over 15 bins of confidence; its interval is a bootstrap over the "
        "images, and begins at 0 where an honest network would often show as much. Entropy and NLL in nats."
    )
    names = ["", "ECE", "95 % interval", "says", "is right", "entropy", "NLL", "images"]
    return Table("Calibration", names, rows, note=f"{note} {told}".strip())


def _row(name: str, measured: Calibration) -> list[str]:
    n = measured.n
    return [
        name,
        format.percent(measured.ece, n),
        format.percent_interval(measured.ece_low, measured.ece_high, n),
        format.percent(measured.confidence, n),
        format.percent(measured.accuracy, n),
        format.significant(measured.entropy),
        format.significant(measured.nll),
        format.count(n),
    ]


def _named(column: Column) -> str:
    return column.role[:1].lower() + column.role[1:]


def diagram(column: Column, measured: Calibration) -> Reliability:
    n = measured.n
    note = f"ECE {format.percent(measured.ece, n)} "
    note += f"({format.percent_interval(measured.ece_low, measured.ece_high, n)})"
    bins = [one for one in measured.bins if one.n]
    told = "; ".join(_told(one) for one in bins)
    before = measured.before.bins if measured.before is not None else []
    ends = (0.0, 25.0, 50.0, 75.0, 100.0)
    return Reliability(
        title=column.role,
        note=note,
        key=column.key,
        description=f"Reliability of the {_named(column)}, {note}. {told}.",
        dots=[_dot(one) for one in bins],
        before=[_dot(one) for one in before if one.n],
        pillars=_pillars(measured.bins),
        x_ticks=[Tick(across(value), f"{value:g}") for value in ends],
        y_ticks=[Tick(up(value), f"{value:g}") for value in ends],
        diagonal=(across(0), up(0), across(100), up(100)),
        axis="mean predicted probability, %",
    )


def _share(value: float) -> float:
    return INSET + (SIDE - 2 * INSET) * value / 100


def across(confidence: float) -> float:
    return round(LEFT + _share(confidence), 1)


def up(accuracy: float) -> float:
    return round(TOP + SIDE - _share(accuracy), 1)


def _told(one: ReliabilityBin) -> str:
    assert one.confidence is not None and one.accuracy is not None
    answers = format.counted(one.n, "answer")
    return f"{answers} at {format.percent(one.confidence)}, right {format.percent(one.accuracy)}"


def _dot(one: ReliabilityBin) -> Dot:
    assert one.confidence is not None and one.accuracy is not None
    interval = Proportion.from_counts(round(one.n * one.accuracy / 100), one.n)
    return Dot(across(one.confidence), up(one.accuracy), up(interval.low), up(interval.high), _told(one))


def _pillars(bins: list[ReliabilityBin]) -> list[Pillar]:
    most = max(one.n for one in bins)
    found = []
    for one in bins:
        if one.n:
            left, right, height = across(one.low) + 1, across(one.high) - 1, max(STRIP * one.n / most, 1)
            found.append(Pillar(left, STRIP_TOP + STRIP - height, right - left, height))
    return found
