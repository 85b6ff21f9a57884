"""SVG charts: positions are computed here, figures.html.j2 writes the elements, report.css has the colors.

A drawing is as wide as a phone, so that its text keeps its size there; a wide window shows several in a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10

from .format import minus

WIDTH = 340
LABEL_WIDTH = 92
"""For names at the left of dots."""
VALUE_WIDTH = 76
"""For numbers at their right."""
ROW_HEIGHT = 26
PLOT_HEIGHT = 150
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 30
MAX_CURVE_MARKS = 40
"""Longer curves are drawn without a mark for each epoch."""

Position = Callable[[float], float]


@dataclass(frozen=True)
class Shape:
    """An SVG element. Coordinates are text with one decimal at most."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    tooltip: str = ""


@dataclass(frozen=True)
class Drawing:
    width: float
    height: float
    shapes: list[Shape]
    css: str = ""


@dataclass(frozen=True)
class Chart:
    title: str
    description: str
    drawings: list[Drawing]
    """One, or one for a wide window and one for a phone."""
    note: str = ""
    legend: list[tuple[Drawing, str, str]] = field(default_factory=list)
    """Symbol, label, and last value of a curve."""
    kind: str = "chart"
    table: None = None

    @property
    def is_wide(self) -> bool:
        return len(self.drawings) > 1


def coordinate(value: float) -> str:
    return f"{round(value, 1):g}"


def line(css: str, x1: float, y1: float, x2: float, y2: float) -> Shape:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return Shape("line", {"class": css, **{name: coordinate(value) for name, value in ends.items()}})


def path(css: str, *parts: str | float, tooltip: str = "") -> Shape:
    """Return a path of commands and coordinates."""
    d = " ".join(part if isinstance(part, str) else coordinate(part) for part in parts)
    return Shape("path", {"class": css, "d": d}, tooltip=tooltip)


def circle(css: str, x: float, y: float, radius: float, tooltip: str = "") -> Shape:
    attributes = {"class": css, "cx": coordinate(x), "cy": coordinate(y), "r": f"{radius:g}"}
    return Shape("circle", attributes, tooltip=tooltip)


def rectangle(css: str, x: float, y: float, width: float, height: float) -> Shape:
    places = {"x": x, "y": y, "width": width, "height": height}
    return Shape("rect", {"class": css, **{name: coordinate(value) for name, value in places.items()}})


def polyline(css: str, points: Sequence[tuple[float, float]], tag: str = "polyline") -> Shape:
    joined = " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)
    return Shape(tag, {"class": css, "points": joined})


def text(css: str, x: float, y: float, content: str, anchor: str = "start") -> Shape:
    attributes = {"class": css, "x": coordinate(x), "y": coordinate(y)}
    if anchor != "start":
        attributes["text-anchor"] = anchor
    return Shape("text", attributes, content)


def linear_scale(low: float, high: float, start: float, end: float) -> Position:
    """Return the positions of values, ``low`` at ``start`` and ``high`` at ``end``."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def y_axis(ticks: Sequence[tuple[float, str]], position: Position, left: float, right: float) -> list[Shape]:
    """Return horizontal grid lines with their numbers."""
    shapes = []
    for value, label in ticks:
        y = position(value)
        shapes.append(line("grid", left, y, right, y))
        shapes.append(text("tick", left - 6, y + 4, label, "end"))
    return shapes


def vertical_grid(ticks: Sequence[tuple[float, str]], position: Position, height: float) -> list[Shape]:
    """Return vertical grid lines over the height of a drawing, with their numbers at its bottom."""
    shapes = []
    for value, label in ticks:
        x = position(value)
        shapes.append(line("grid", x, 0, x, height - 18))
        shapes.append(text("tick", x, height - 4, label, "middle"))
    return shapes


@dataclass(frozen=True)
class Mark:
    """A row of a dot chart; ``low`` and ``high`` are the ends of its whisker."""

    label: str
    key: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


def dots(title: str, marks: Sequence[Mark], note: str = "") -> Chart | None:
    """Draw percentages as dots with intervals; None if no value is finite."""
    if not (marks := [mark for mark in marks if isfinite(mark.value)]):
        return None
    start, end, step = percent_range(marks, 3)
    x = linear_scale(start, end, LABEL_WIDTH + 6, WIDTH - VALUE_WIDTH - 6)
    height = 22.0 + ROW_HEIGHT * len(marks)
    shapes = vertical_grid(axis_ticks(start, end, step), x, height)
    for i, mark in enumerate(marks):
        y = 2 + ROW_HEIGHT * (i + 0.5)
        shapes.append(text("name", 0, y + 4, mark.label))
        if mark.low is not None and mark.high is not None:
            ends = ("M", x(mark.low), y - 4, "v8m0 -4H", x(mark.high), "m0 -4v8")
            shapes.append(path(f"whisker {mark.key}", *ends))
        shapes.append(circle(f"dot {mark.key}", x(mark.value), y, 5))
        shapes.append(text("number", WIDTH - VALUE_WIDTH + 10, y + 4, mark.text))
    note = "; ".join(part for part in (note, "axis does not start at 0" if start else "") if part)
    description = f"{title}. {'; '.join(f'{mark.label}: {mark.text}' for mark in marks)}."
    return Chart(title, description, [Drawing(WIDTH, height, shapes)], note)


def percent_range(marks: Sequence[Mark], steps: int, *levels: float) -> tuple[float, float, float]:
    """Return start, end and step of an axis of percentages around the marks and their intervals."""
    low = min(*(mark.value if mark.low is None else mark.low for mark in marks), 100, *levels)
    high = max(*(mark.value if mark.high is None else mark.high for mark in marks), *levels, low)
    step = round_step(max(high - low, 0.5) / steps)
    start, end = floor(low / step) * step, min(100.0, ceil(high / step) * step)
    return (start if start < end else end - step), end, step


@dataclass(frozen=True)
class Curve:
    """``values`` over ``epochs``; a value that is missing or not finite leaves a gap."""

    label: str
    epochs: Sequence[int]
    values: Sequence[float | None]

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if value is not None and isfinite(value)]


def lines(
    title: str,
    curves: Sequence[Curve],
    *,
    from_zero: bool = True,
    top: float | None = None,
    x_name: str = "epoch",
) -> Chart | None:
    """Draw curves over epochs, or over ``x_name``, to ``top`` at most; None if no value is finite."""
    finite = [(curve, curve.finite) for curve in curves if curve.finite]
    if not finite:
        return None
    low, high = min(min(values) for _, values in finite), max(max(values) for _, values in finite)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = round_step((high - low) / 4)
    low, high = floor(low / step) * step, ceil(high / step) * step
    if top is not None:
        high = min(high, top)
    epochs = [epoch for curve, _ in finite for epoch in curve.epochs]
    first, last = min(epochs), max(epochs)
    ends = (first, last) if first < last else (first - 1, last + 1)
    x = linear_scale(*ends, LEFT + 4, WIDTH - RIGHT - 4)
    y = linear_scale(high, low, TOP, TOP + PLOT_HEIGHT)
    height = TOP + PLOT_HEIGHT + BOTTOM
    marked = _marked_epochs(first, last)
    shapes = y_axis(axis_ticks(low, high, step), y, LEFT, WIDTH - RIGHT)
    shapes += [text("tick", x(epoch), height - 14, str(epoch), "middle") for epoch in marked]
    if len(marked) < 8:
        shapes.append(text("tick axis", WIDTH - RIGHT, height - 1, x_name, "end"))
    for style, (curve, _) in reversed(list(enumerate(finite))):
        shapes += _draw_curve(curve, f"s{style % 6}", x, y, x_name)
    legend, note, described = [], "", []
    for style, (curve, values) in enumerate(finite):
        symbol = Drawing(22, 8, [line(f"curve s{style % 6}", 1, 4, 21, 4)])
        legend.append((symbol, curve.label, axis_number(values[-1])))
        name = "" if curve.label == title else f"{curve.label} "
        described.append(f"{name}from {axis_number(values[0])} to {axis_number(values[-1])}")
    if len(finite) == 1 and legend[0][1] == title:
        legend, note = [], f"last value {legend[0][2]}"
    description = f"{title} by {x_name}: {'; '.join(described)}."
    return Chart(title, description, [Drawing(WIDTH, height, shapes)], note, legend)


def _draw_curve(curve: Curve, style: str, x: Position, y: Position, x_name: str) -> list[Shape]:
    pieces: list[list[tuple[float, float]]] = [[]]
    marks = []
    for epoch, value in zip(curve.epochs, curve.values, strict=True):
        if value is None or not isfinite(value):
            pieces.append([])
        else:
            pieces[-1].append((x(epoch), y(value)))
            tooltip = f"{curve.label}, {x_name} {epoch}: {axis_number(value)}"
            marks.append(circle(f"point {style}", x(epoch), y(value), 2.2, tooltip))
    drawn = [polyline(f"curve {style}", piece) for piece in pieces if len(piece) > 1]
    return [*drawn, *(marks if len(marks) <= MAX_CURVE_MARKS else [])]


def _marked_epochs(first: int, last: int) -> list[int]:
    """Return the first and the last epoch, and round numbers between them that are not too near."""
    step = max(1, ceil(round_step((last - first) / 5))) if last > first else 1
    marked = sorted({first, *(epoch for epoch in range(0, last + 1, step) if first < epoch), last})
    if len(marked) > 2 and marked[-1] - marked[-2] < step * 0.6:
        del marked[-2]
    if len(marked) > 2 and marked[1] - marked[0] < step * 0.6:
        del marked[1]
    return marked


def axis_number(value: float) -> str:
    """Format briefly, for axes and legends: 0.25, 1,200, 4e−05."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return minus(f"{value:.3g}")
    return minus(f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}")


def round_step(step: float) -> float:
    """Return the next larger of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** floor(log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def axis_ticks(start: float, end: float, step: float) -> list[tuple[float, str]]:
    """Return values from ``start`` to ``end`` with their numbers."""
    values = [start + i * step for i in range(floor((end - start) / step + 1e-6) + 1)]
    return [(value, axis_number(round(value, 12) + 0.0)) for value in values]
