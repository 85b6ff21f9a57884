"""Points of two measures, one against the other: what it gives over what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, isfinite

from .charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Place, Tick, nice, ticks

HEIGHT = 190
"""Of the plot: taller than a curve's, so that labels find room."""

LABEL_WIDTH, LABEL_HEIGHT = 18, 13
"""Room that a short label takes."""


@dataclass(frozen=True)
class Point:
    """``low`` and ``high`` end the whisker of ``y``; ``text`` says the point in words."""

    label: str
    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together; ``key`` names them in the style sheet."""

    label: str
    key: str
    points: Sequence[Point]
    joined: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal line; ``key`` names it in the style sheet, ``above``: where its label stands."""

    label: str
    y: float
    key: str
    above: bool = True


@dataclass(frozen=True)
class DrawnPoint:
    x: float
    y: float
    low: float | None
    high: float | None
    label: str
    label_x: float
    anchor: str
    text: str


@dataclass(frozen=True)
class DrawnSeries:
    label: str
    key: str
    line: str
    """`points` of an SVG polyline; empty where they are not joined."""
    points: list[DrawnPoint]


@dataclass(frozen=True)
class DrawnLevel:
    label: str
    key: str
    y: float
    label_y: float


@dataclass(frozen=True)
class Scatter:
    title: str
    description: str
    height: float
    series: list[DrawnSeries]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_name: str
    kind: str = "scatter"
    note: str = ""
    levels: Sequence[DrawnLevel] = ()


def scatter(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    note: str = "",
    levels: Sequence[Level] = (),
    share_labels: bool = False,
) -> Scatter | None:
    """Percentages over what they cost; the cost's axis begins at zero, that of percent where they lie.

    Args:
        share_labels: points too near to each other for labels of their own get one together.
    """
    kept = [_finite(one) for one in series]
    kept = [one for one in kept if one.points]
    if not kept:
        return None
    every = [point for one in kept for point in one.points]
    right = max(point.x for point in every) or 1.0
    step = nice(right / 4)
    right = ceil(right / step + 0.15) * step  # room for a label
    levels = [one for one in levels if isfinite(one.y)]
    lines = [one.y for one in levels]
    low = min([point.y if point.low is None else point.low for point in every] + lines)
    high = max([point.y if point.high is None else point.high for point in every] + lines)
    y_step = nice(max(high - low, 0.5) / 4)
    bottom, top = floor(low / y_step) * y_step, min(100.0, ceil(high / y_step) * y_step)
    if top <= bottom:
        bottom = top - y_step

    def across(x: float) -> float:
        return round(LEFT + 4 + (WIDTH - LEFT - RIGHT - 4) * x / right, 1)

    def down(y: float) -> float:
        return round(TOP + HEIGHT * (top - y) / (top - bottom), 1)

    told = "; ".join(
        [f"{one.label}: {', '.join(point.text for point in one.points)}" for one in kept]
        + [f"line: {one.label}" for one in levels]
    )
    drawn = [_drawn(one, across, down) for one in kept]
    return Scatter(
        title,
        f"{title}. {told}.",
        TOP + HEIGHT + BOTTOM,
        _sharing(drawn) if share_labels else drawn,
        [Tick(across(x), text) for x, text in ticks(0.0, right, step)],
        [Tick(down(y), text) for y, text in ticks(bottom, top, y_step)],
        x_name,
        note=note,
        levels=[
            DrawnLevel(one.label, one.key, down(one.y), down(one.y) + (-4 if one.above else 13))
            for one in levels
        ],
    )


def _sharing(drawn: Sequence[DrawnSeries]) -> list[DrawnSeries]:
    """The same with one label for points of any series that lie together, at the outermost of them."""
    groups: list[list[DrawnPoint]] = []
    for point in (point for one in drawn for point in one.points if point.label):
        near = [group for group in groups if any(_near(point, other) for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append([*(other for group in near for other in group), point])
    labels: dict[int, str] = {}
    for group in groups:
        outermost = max(group, key=lambda point: (-point.x if point.anchor == "end" else point.x, point.y))
        named = sorted(group, key=lambda point: (len(point.label), point.label))
        labels[id(outermost)] = ", ".join(point.label for point in named)
    return [
        replace(one, points=[replace(point, label=labels.get(id(point), "")) for point in one.points])
        for one in drawn
    ]


def _near(one: DrawnPoint, other: DrawnPoint) -> bool:
    return abs(one.x - other.x) < LABEL_WIDTH and abs(one.y - other.y) < LABEL_HEIGHT


def _finite(one: Series) -> Series:
    points = [point for point in one.points if isfinite(point.x) and isfinite(point.y)]
    return Series(one.label, one.key, points, one.joined)


def _drawn(one: Series, across: Place, down: Place) -> DrawnSeries:
    points = [_placed(point, across, down) for point in one.points]
    line = " ".join(f"{point.x:g},{point.y:g}" for point in sorted(points, key=lambda point: point.x))
    return DrawnSeries(one.label, one.key, line if one.joined and len(points) > 1 else "", points)


def _placed(point: Point, across: Place, down: Place) -> DrawnPoint:
    x = across(point.x)
    to_the_left = x > WIDTH * 0.72
    return DrawnPoint(
        x,
        down(point.y),
        None if point.low is None else down(point.low),
        None if point.high is None else down(point.high),
        point.label,
        x - 8 if to_the_left else x + 8,
        "end" if to_the_left else "start",
        point.text,
    )
