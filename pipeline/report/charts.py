"""The geometry of the report's pictures: numbers in, positions in a small SVG canvas out.

The canvas is as wide as a phone, so that its text keeps its size there; a wide screen shows several in a row.
Drawing itself is `charts.html.j2`; colours are those of the style sheet, by class name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10

Place = Callable[[float], float]
WIDTH = 340
LABEL = 92
"""Room for the names at the left of bars and dots."""
VALUE = 76
"""Room for the numbers at their right."""
ROW = 26
PLOT_HEIGHT = 150
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 30
MOST_POINTS = 40
"""Longer curves are drawn without a mark for every epoch."""


@dataclass(frozen=True)
class Mark:
    """One row of a bar or dot chart: ``value`` in the chart's unit, ``low`` and ``high`` end the whisker."""

    label: str
    key: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    group: str = ""


@dataclass(frozen=True)
class DrawnMark:
    mark: Mark
    y: float
    x: float
    low: float | None
    high: float | None
    text_x: float
    heading_y: float | None


@dataclass(frozen=True)
class Tick:
    position: float
    text: str


@dataclass(frozen=True)
class Rows:
    """Bars from zero, or dots on an axis of their own, one row per network."""

    title: str
    description: str
    kind: str
    height: float
    marks: list[DrawnMark]
    ticks: list[Tick] = field(default_factory=list)
    note: str = ""


def bars(title: str, marks: Sequence[Mark], note: str = "") -> Rows | None:
    """Horizontal bars from zero; a whisker reaches from the bar's end to ``high``."""
    marks = [mark for mark in marks if isfinite(mark.value)]
    if not marks:
        return None
    top = max(max(mark.value, mark.high or 0) for mark in marks) or 1

    def place(value: float) -> float:
        return round(LABEL + (WIDTH - LABEL - VALUE) * value / top, 1)

    drawn, height = _stack(marks, place, 2)
    return Rows(title, _told(title, marks), "bars", height, drawn, note=note)


def dots(title: str, marks: Sequence[Mark], note: str = "") -> Rows | None:
    """Dots with their intervals on a percent axis cut to where they lie: dots, unlike bars, need no zero."""
    marks = [mark for mark in marks if isfinite(mark.value)]
    if not marks:
        return None
    low = min(mark.value if mark.low is None else mark.low for mark in marks)
    high = max(mark.value if mark.high is None else mark.high for mark in marks)
    step = nice(max(high - low, 0.5) / 3)
    start, end = floor(low / step) * step, min(100.0, ceil(high / step) * step)
    if end <= start:
        start = end - step

    def place(value: float) -> float:
        return round(LABEL + 6 + (WIDTH - LABEL - VALUE - 12) * (value - start) / (end - start), 1)

    drawn, height = _stack(marks, place, 2, fixed_text=True)
    marked = [Tick(place(value), label) for value, label in ticks(start, end, step)]
    cut = "the axis does not start at 0" if start else ""
    told = "; ".join(one for one in (note, cut) if one)
    return Rows(title, _told(title, marks), "dots", height + 18, drawn, marked, told)


def _stack(
    marks: Sequence[Mark], place: Place, top: float, fixed_text: bool = False
) -> tuple[list[DrawnMark], float]:
    drawn: list[DrawnMark] = []
    y, group = top, ""
    for mark in marks:
        heading = None
        if mark.group != group:
            y += 20 if not drawn else 28
            heading, group = y - 8, mark.group
        x = place(mark.value)
        low = None if mark.low is None else place(mark.low)
        high = None if mark.high is None else place(mark.high)
        text_x = WIDTH - VALUE + 10 if fixed_text else max(x, high or 0) + 8
        drawn.append(DrawnMark(mark, y + ROW / 2, x, low, high, round(text_x, 1), heading))
        y += ROW
    return drawn, y + 2


def _told(title: str, marks: Sequence[Mark]) -> str:
    """The picture in words, for those who hear it."""
    rows = (f"{mark.group + ', ' if mark.group else ''}{mark.label}: {mark.text}" for mark in marks)
    return f"{title}. {'; '.join(rows)}."


@dataclass(frozen=True)
class Curve:
    """One line: ``values`` over ``epochs``; what is not finite leaves a gap."""

    label: str
    epochs: Sequence[int]
    values: Sequence[float | None]


@dataclass(frozen=True)
class DrawnCurve:
    label: str
    style: int
    pieces: list[str]
    """`points` of an SVG polyline each."""
    points: list[tuple[float, float, str]]
    last: str


@dataclass(frozen=True)
class Lines:
    title: str
    description: str
    height: float
    curves: list[DrawnCurve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    kind: str = "lines"
    note: str = ""
    x_name: str = "epoch"


def lines(
    title: str,
    curves: Sequence[Curve],
    *,
    from_zero: bool = True,
    top: float | None = None,
    x_name: str = "epoch",
) -> Lines | None:
    """Curves over epochs or what else ``x_name`` says, the axis from zero unless told otherwise; ``top`` is
    the highest it can reach.
    """
    finite = [(curve, [_finite(value) for value in curve.values]) for curve in curves]
    finite = [(curve, values) for curve, values in finite if any(v is not None for v in values)]
    if not finite:
        return None
    seen = [value for _, values in finite for value in values if value is not None]
    epochs = [epoch for curve, _ in finite for epoch in curve.epochs]
    low, high = min(seen), max(seen)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = nice((high - low) / 4)
    low, high = floor(low / step) * step, ceil(high / step) * step
    if top is not None:
        high = min(high, top)
    first, last = min(epochs), max(epochs)

    def across(epoch: float) -> float:
        share = 0.5 if last == first else (epoch - first) / (last - first)
        return round(LEFT + 4 + (WIDTH - LEFT - RIGHT - 8) * share, 1)

    def down(value: float) -> float:
        return round(TOP + PLOT_HEIGHT * (high - value) / (high - low), 1)

    drawn = [
        _draw(curve, values, style, across, down, x_name) for style, (curve, values) in enumerate(finite)
    ]
    told = "; ".join(
        f"{'' if curve.label == title else curve.label + ' '}from {_first(values)} to {_last(values)}"
        for curve, values in finite
    )
    stride = max(1, ceil(nice((last - first) / 5))) if last > first else 1
    marked = sorted({first, *(e for e in range(0, last + 1, stride) if first < e), last})
    if len(marked) > 2 and marked[-1] - marked[-2] < stride * 0.6:
        del marked[-2]
    if len(marked) > 2 and marked[1] - marked[0] < stride * 0.6:
        del marked[1]
    return Lines(
        title,
        f"{title} by {x_name}: {told}.",
        TOP + PLOT_HEIGHT + BOTTOM,
        drawn,
        [Tick(across(epoch), str(epoch)) for epoch in marked],
        [Tick(down(value), label) for value, label in ticks(low, high, step)],
        x_name=x_name,
    )


def _draw(
    curve: Curve, values: list[float | None], style: int, across: Place, down: Place, x_name: str
) -> DrawnCurve:
    pieces: list[list[tuple[float, float, str]]] = [[]]
    for epoch, value in zip(curve.epochs, values, strict=True):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append(
                (across(epoch), down(value), f"{curve.label}, {x_name} {epoch}: {axis_number(value)}")
            )
    points = [point for piece in pieces for point in piece]
    return DrawnCurve(
        curve.label,
        style % 6,
        [" ".join(f"{x:g},{y:g}" for x, y, _ in piece) for piece in pieces if len(piece) > 1],
        points if len(points) <= MOST_POINTS else [],
        _last(values),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _first(values: Sequence[float | None]) -> str:
    return axis_number(next(value for value in values if value is not None))


def _last(values: Sequence[float | None]) -> str:
    return axis_number(next(value for value in reversed(values) if value is not None))


def axis_number(value: float) -> str:
    """Short, for axes and legends: 0.25, 1,200, 4e−05."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "−")


def nice(step: float) -> float:
    """The next larger of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** floor(log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def ticks(start: float, end: float, step: float) -> list[tuple[float, str]]:
    """Places on an axis, a step apart, and what stands there."""
    n = floor((end - start) / step + 1e-6)
    values = [start + i * step for i in range(n + 1)]
    return [(value, axis_number(round(value, 12) + 0.0)) for value in values]
