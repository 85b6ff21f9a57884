"""The geometry of a comparison's picture: accuracy with its interval against latency, files by their size.

Drawn twice, for a wide window and for a phone, so that its text keeps its size on both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10, sqrt

from .charts import Tick, axis_number, nice, ticks

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 38
LETTER, LINE = 6.6, 14.0
"""Width of an average letter and height of a line, of labels of 12.5 px."""

GAP = 5.0
LEADER = 16.0
"""A label farther from its point than this gets a line to it."""

LOGARITHMIC = 4.0
"""From this ratio of latencies on, their axis is logarithmic."""

LEAST_RADIUS = 3.5
AWAY = (0.0, 14.0, 28.0, 44.0, 62.0, 84.0, 110.0, 140.0, 180.0, 230.0, 290.0)
"""How much farther than next to its point a label is tried."""

DIRECTIONS = ((1, 0), (1, -0.8), (1, 0.8), (-1, 0), (-1, -0.8), (-1, 0.8), (0, -1), (0, 1))


@dataclass(frozen=True)
class Spot:
    """One file: ``x`` milliseconds, ``y`` percent with its interval; ``key`` names its colour."""

    label: str
    key: str
    x: float
    y: float
    low: float
    high: float
    bytes: int
    text: str
    on_frontier: bool
    run: str = ""
    """Files of one run are joined by a thin line."""


@dataclass(frozen=True)
class DrawnSpot:
    x: float
    y: float
    radius: float
    low: float
    high: float
    key: str
    pale: bool
    text: str


@dataclass(frozen=True)
class Label:
    """``x`` is where the text begins, or ends where ``anchor`` is ``end``; ``line``: from it to its point."""

    x: float
    y: float
    anchor: str
    text: str
    line: tuple[float, float, float, float] | None
    pale: bool


@dataclass(frozen=True)
class Plot:
    kind: str
    """``wide`` or ``narrow``."""
    width: int
    height: int
    description: str
    spots: list[DrawnSpot]
    labels: list[Label]
    frontier: str
    """Points of an SVG polyline: a staircase."""
    joined: list[tuple[float, float, float, float]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_name: str
    right: float
    bottom: float


def plots(spots: Sequence[Spot], x_name: str, description: str) -> list[Plot]:
    """The picture for a wide window and for a phone; empty without spots."""
    if not spots:
        return []
    return [
        _plot("wide", 900, 470, 26.0, 30, spots, x_name, description),
        _plot("narrow", 350, 420, 15.0, 20, spots, x_name, description),
    ]


def _plot(
    kind: str,
    width: int,
    height: int,
    largest: float,
    letters: int,
    spots: Sequence[Spot],
    x_name: str,
    description: str,
) -> Plot:
    across, x_ticks = _across([spot.x for spot in spots], width)
    down, y_ticks = _down(spots, height)
    most = max(spot.bytes for spot in spots) or 1
    drawn = [
        DrawnSpot(
            across(spot.x),
            down(spot.y),
            round(max(LEAST_RADIUS, largest * sqrt(spot.bytes / most)), 1),
            down(spot.low),
            down(spot.high),
            spot.key,
            not spot.on_frontier,
            spot.text,
        )
        for spot in spots
    ]
    places = dict(zip((id(spot) for spot in spots), drawn, strict=True))
    best = sorted((spot for spot in spots if spot.on_frontier), key=lambda spot: spot.x)
    stairs: list[tuple[float, float]] = []
    for spot in best:
        here = places[id(spot)]
        stairs += [(here.x, stairs[-1][1])] if stairs else []
        stairs.append((here.x, here.y))
    return Plot(
        kind,
        width,
        height,
        description,
        # Large ones first, so that small ones are seen on them.
        sorted(drawn, key=lambda one: -one.radius),
        _labels(spots, drawn, width, height, letters),
        " ".join(f"{x:g},{y:g}" for x, y in stairs),
        _joined(spots, places),
        x_ticks,
        y_ticks,
        x_name,
        width - RIGHT,
        height - BOTTOM,
    )


class _Scale:
    """From values to places on the canvas."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, logarithmic: bool = False
    ) -> None:
        self.logarithmic = logarithmic
        self.low, self.high = (log10(low), log10(high)) if logarithmic else (low, high)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        value = log10(value) if self.logarithmic else value
        return round(self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low), 1)


def _across(values: Sequence[float], width: int) -> tuple[_Scale, list[Tick]]:
    low, high = min(values), max(values)
    start, end = LEFT + 4.0, float(width - RIGHT)
    if high / low >= LOGARITHMIC:
        room = (high / low) ** 0.09
        scale = _Scale(low / room, high * room, start, end, logarithmic=True)
        decades = range(floor(log10(low / room)), ceil(log10(high * room)) + 1)
        steps = (1, 2, 5) if high / low > 12 else (1, 1.5, 2, 3, 5, 7)
        marks = [step * 10.0**power for power in decades for step in steps]
        marks = [mark for mark in marks if low / room <= mark <= high * room]
    else:
        step = nice(high / 5)
        end_value = ceil(high / step + 0.2) * step
        scale = _Scale(0.0, end_value, start, end)
        marks = [value for value, _ in ticks(0.0, end_value, step)]
    return scale, [Tick(scale(mark), axis_number(round(mark, 9))) for mark in marks]


def _down(spots: Sequence[Spot], height: int) -> tuple[_Scale, list[Tick]]:
    low, high = min(spot.low for spot in spots), max(spot.high for spot in spots)
    step = nice(max(high - low, 0.5) / 5)
    bottom, top = floor(low / step) * step, min(100.0, ceil(high / step) * step)
    bottom = bottom if bottom < top else top - step
    scale = _Scale(top, bottom, float(TOP), float(height - BOTTOM))
    return scale, [Tick(scale(value), text) for value, text in ticks(bottom, top, step)]


def _joined(spots: Sequence[Spot], places: dict[int, DrawnSpot]) -> list[tuple[float, float, float, float]]:
    """Thin lines between the files of a run."""
    found = []
    for run in dict.fromkeys(spot.run for spot in spots if spot.run):
        own = [places[id(spot)] for spot in spots if spot.run == run]
        found += [(a.x, a.y, b.x, b.y) for a, b in pairwise(own)]
    return found


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _labels(
    spots: Sequence[Spot], drawn: Sequence[DrawnSpot], width: int, height: int, letters: int
) -> list[Label]:
    """Names next to their points, none upon another or upon a point; one without room is left out, and is
    told by the point's title and by the table.
    """
    room = (LEFT, TOP - 8.0, float(width), float(height - BOTTOM))
    circles = [_box(one.x, one.y, one.radius) for one in drawn]
    whiskers = [(one.x - 2, min(one.low, one.high), one.x + 2, max(one.low, one.high)) for one in drawn]
    taken: list[Box] = []
    found: list[Label] = []
    order = sorted(range(len(spots)), key=lambda i: (not spots[i].on_frontier, drawn[i].y))
    for i in order:
        spot, point = spots[i], drawn[i]
        if not spot.label:
            continue
        text = shortened(spot.label, letters)
        # Rather farther away than upon an interval, but rather there than not at all.
        for obstacles in ([*circles, *taken, *whiskers], [*circles, *taken]):
            placed = next((one for one in _tried(point, text) if _free(one[0], obstacles, room)), None)
            if placed is not None:
                box, anchor, away = placed
                taken.append(box)
                found.append(_label(box, anchor, away, text, point))
                break
    return found


def _tried(point: DrawnSpot, text: str) -> Iterator[tuple[Box, str, float]]:
    wide = LETTER * len(text)
    for away in AWAY:
        for right, below in DIRECTIONS:
            gap = point.radius + GAP + away
            x, y = point.x + right * gap, point.y + below * gap
            left = x if right > 0 else x - wide if right < 0 else x - wide / 2
            box = (left, y - LINE / 2, left + wide, y + LINE / 2)
            yield box, "start" if right > 0 else "end" if right < 0 else "middle", away


def _label(box: Box, anchor: str, away: float, text: str, point: DrawnSpot) -> Label:
    x = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
    y = (box[1] + box[3]) / 2
    line = None
    if away >= LEADER - 2:
        edge = (box[1] if point.y < y else box[3]) if anchor == "middle" else y
        line = (point.x, point.y, round(x, 1), round(edge, 1))
    return Label(round(x, 1), round(y + 4, 1), anchor, text, line, point.pale)


def _box(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _free(box: Box, obstacles: Sequence[Box], room: Box) -> bool:
    inside = box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]
    return inside and not any(overlap(box, other) for other in obstacles)


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def shortened(text: str, most: int) -> str:
    """With an ellipsis in its middle, since runs' names often differ at their ends."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[head + 1 - most :]}"
