"""The picture of accuracy with its interval over latency, files by their size: of one run or of many.

Drawn twice, for a wide window and for a phone, so that its text keeps its size on both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log10, sqrt
from typing import Self

from ..evaluation.comparison import frontier
from ..runs.scores import Score
from . import format
from .charts import Tick, axis_number, nice, ticks
from .labels import Label, Named, placed

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 38
INSET = 10.0
"""Of the plot's top and bottom, so that a circle there stays off the title and the numbers."""

DOT = 3.5
"""Radius of the dot in the middle of each circle, which a small file's does not hide."""

LOGARITHMIC = 4.0
"""From this ratio of latencies on, their axis is logarithmic."""

APART = 30.0
"""Between two numbers below it."""

FEW = 6
"""So many files need less height."""


@dataclass(frozen=True)
class Spot:
    """One file: ``x`` milliseconds, ``y`` percent with its interval; ``key`` names its colour in the style
    sheet, ``text`` says its figures in words.
    """

    name: str
    key: str
    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None
    bytes: int | None = None
    label: str = ""
    """What stands beside it, if anything does."""
    run: str = ""
    """Files of one run are joined by a thin line."""

    @classmethod
    def of(
        cls, name: str, key: str, score: Score, p50: float, size: int | None, *, label: str, run: str = ""
    ) -> Self:
        """Of what was measured; ``size`` in bytes."""
        text = f"{format.percent(score.percent, score.n)} "
        text += f"({format.percent_interval(score.low, score.high, score.n)}) at {format.milliseconds(p50)}"
        text += "" if size is None else f", {format.megabytes(size)}"
        return cls(name, key, p50, score.percent, text, score.low, score.high, size, label, run)


@dataclass(frozen=True)
class DrawnSpot:
    key: str
    x: float
    y: float
    low: float | None
    high: float | None
    radius: float
    """Its circle's area is in proportion to the file's size; 0 where that is not known."""
    best: bool
    """It is on the frontier."""
    text: str


@dataclass(frozen=True)
class Plot:
    kind: str
    """``wide`` or ``narrow``."""
    width: int
    height: int
    left: float
    right: float
    bottom: float
    spots: list[DrawnSpot]
    labels: list[Label]
    stairs: str
    """Points of an SVG polyline through the frontier; empty where that is one point."""
    joined: list[tuple[float, float, float, float]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    dot: float = DOT


@dataclass(frozen=True)
class Tradeoff:
    title: str
    description: str
    note: str
    legend: list[tuple[str, str]]
    """A key of the style sheet, and what it stands for."""
    x_name: str
    plots: list[Plot]


def tradeoff(
    title: str,
    spots: Sequence[Spot],
    *,
    x_name: str,
    note: str = "",
    legend: Sequence[tuple[str, str]] = (),
) -> Tradeoff | None:
    """The picture for a wide window and for a phone; None where there is nothing to show.

    Args:
        note: what is said before the picture's own explanation.
    """
    kept = [one for one in spots if isfinite(one.x) and one.x > 0 and isfinite(one.y)]
    if not kept:
        return None
    best = frontier([(one.x, one.y) for one in kept])
    few = len(kept) <= FEW
    told = "; ".join(f"{one.name}: {one.text}" for one in kept)
    plots = [
        _plot("wide", 1000, 300 if few else 470, 26.0, 30, kept, best),
        _plot("narrow", 350, 300 if few else 420, 17.0, 20, kept, best),
    ]
    own_note = _note(kept, best, joined=bool(plots[0].joined))
    return Tradeoff(
        title,
        f"{title}. {told}. Faster or more accurate than any other: {', '.join(kept[i].name for i in best)}.",
        f"{note} {own_note}".strip(),
        list(legend),
        f"{x_name}, logarithmic" if _logarithmic(kept) else x_name,
        plots,
    )


def _note(spots: Sequence[Spot], best: Sequence[int], *, joined: bool) -> str:
    """What the picture's marks mean, of those that are in it."""
    told = []
    largest = max((spot.bytes or 0 for spot in spots), default=0)
    if largest:
        told.append(f"Area: size of the file, the largest {format.megabytes(largest)}.")
    if any(spot.low is not None for spot in spots):
        told.append("Upright line: 95 % interval.")
    if len(best) > 1:
        told.append("Dashed line: each file on it is faster or more accurate than any other here.")
    if len(best) < len(spots):
        told.append(
            "Hollow dot: another file is at least as fast and as accurate, and better in one of the two."
        )
    if joined:
        told.append("A thin line joins the two files of a run.")
    return " ".join(told)


def _plot(
    kind: str,
    width: int,
    height: int,
    largest: float,
    letters: int,
    spots: Sequence[Spot],
    best: Sequence[int],
) -> Plot:
    across, x_ticks = _across(spots, width)
    down, y_ticks = _down(spots, height)
    most = max((spot.bytes or 0 for spot in spots), default=0)
    drawn = [
        DrawnSpot(
            spot.key,
            across(spot.x),
            down(spot.y),
            None if spot.low is None else down(spot.low),
            None if spot.high is None else down(spot.high),
            round(largest * sqrt((spot.bytes or 0) / most), 2) if most else 0.0,
            i in best,
            f"{spot.name}: {spot.text}",
        )
        for i, spot in enumerate(spots)
    ]
    named = [
        Named(
            spot.label,
            one.x,
            one.y,
            max(one.radius, DOT),
            one.y if one.low is None else one.low,
            one.y if one.high is None else one.high,
            one.best,
        )
        for spot, one in zip(spots, drawn, strict=True)
    ]
    return Plot(
        kind,
        width,
        height,
        LEFT,
        width - RIGHT,
        height - BOTTOM,
        # Large ones first, so that small ones are seen on them.
        sorted(drawn, key=lambda one: -one.radius),
        placed(named, (LEFT, TOP - 8.0, float(width), float(height - BOTTOM)), letters),
        _stairs([(drawn[i].x, drawn[i].y) for i in best]),
        _joined(spots, drawn),
        x_ticks,
        y_ticks,
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


def _logarithmic(spots: Sequence[Spot]) -> bool:
    return max(spot.x for spot in spots) / min(spot.x for spot in spots) >= LOGARITHMIC


def _across(spots: Sequence[Spot], width: int) -> tuple[_Scale, list[Tick]]:
    low, high = min(spot.x for spot in spots), max(spot.x for spot in spots)
    start, end = LEFT + 4.0, float(width - RIGHT)
    if _logarithmic(spots):
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
    return scale, _apart([Tick(scale(mark), axis_number(round(mark, 9))) for mark in marks])


def _apart(found: Sequence[Tick]) -> list[Tick]:
    """Those that leave each other room."""
    kept: list[Tick] = []
    for tick in found:
        if not kept or tick.position - kept[-1].position >= APART:
            kept.append(tick)
    return kept


def _down(spots: Sequence[Spot], height: int) -> tuple[_Scale, list[Tick]]:
    """The axis of percent is cut to where they lie."""
    low = min(spot.y if spot.low is None else spot.low for spot in spots)
    high = max(spot.y if spot.high is None else spot.high for spot in spots)
    step = nice(max(high - low, 0.5) / 5)
    bottom, top = floor(low / step) * step, min(100.0, ceil(high / step) * step)
    bottom = bottom if bottom < top else top - step
    scale = _Scale(top, bottom, TOP + INSET, height - BOTTOM - INSET)
    return scale, [Tick(scale(value), text) for value, text in ticks(bottom, top, step)]


def _stairs(best: Sequence[tuple[float, float]]) -> str:
    """From each of the best across to the next one's latency, and up."""
    points = list(best[:1])
    for (_, y), (x, up) in pairwise(best):
        points += [(x, y), (x, up)]
    return " ".join(f"{x:g},{y:g}" for x, y in points) if len(points) > 1 else ""


def _joined(spots: Sequence[Spot], drawn: Sequence[DrawnSpot]) -> list[tuple[float, float, float, float]]:
    found = []
    for run in dict.fromkeys(spot.run for spot in spots if spot.run):
        own = [one for spot, one in zip(spots, drawn, strict=True) if spot.run == run]
        found += [(a.x, a.y, b.x, b.y) for a, b in pairwise(own)]
    return found
