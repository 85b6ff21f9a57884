"""Accuracy over latency with size as area: what is gained for what, in one picture of any number of files."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log10, sqrt

from .charts import LEFT, RIGHT, WIDTH, Place, Tick, axis_number, nice, ticks

TOP, HEIGHT, BOTTOM = 8, 220, 30
LARGEST = 22.0
"""Radius of the largest file's circle."""
DOT = 3.0
"""Radius of the dot in the middle of each, which a small circle does not hide."""
LETTER, LINE = 6.7, 14.0
"""Room that a letter of a label takes, and its height."""
GAP = 5.0
LOGARITHMIC_FROM = 4.0
"""Slowest over fastest, from which the axis of time is logarithmic."""

Box = tuple[float, float, float, float]
"""left, top, right, bottom."""


@dataclass(frozen=True)
class Candidate:
    """A file: ``cost`` in the unit of the horizontal axis, ``score`` in percent with its interval.

    ``key`` names its colour in the style sheet (``teacher``, ``student``, ``student_int8``), ``text`` says
    all of it in words.
    """

    label: str
    key: str
    cost: float
    score: float
    text: str
    low: float | None = None
    high: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class DrawnCandidate:
    key: str
    x: float
    y: float
    low: float | None
    high: float | None
    radius: float
    """Its area is in proportion to the file's size; 0 where that is not known."""
    label: str
    """What stands in the picture: its name, or its number in ``name``'s list."""
    label_x: float
    label_y: float
    anchor: str
    name: str
    best: bool
    """Nothing else here is as fast and as accurate, and better in one of the two."""
    text: str


@dataclass(frozen=True)
class Pareto:
    title: str
    description: str
    note: str
    candidates: list[DrawnCandidate]
    frontier: str
    """`points` of an SVG polyline through the best; empty where there is one."""
    numbered: bool
    """Whether the candidates' names stand in a list beside the picture."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_name: str
    height: float
    width: int = WIDTH
    left: int = LEFT
    right: int = WIDTH - RIGHT


def pareto(title: str, candidates: Sequence[Candidate], *, x_name: str, note: str = "") -> Pareto | None:
    """The picture, 340 units wide; None where there is nothing to show.

    Names that find no room in it are numbers there, in the order given, and ``numbered`` is set.
    """
    kept = [one for one in candidates if isfinite(one.cost) and one.cost > 0 and isfinite(one.score)]
    if not kept:
        return None
    across, x_ticks, logarithmic = _horizontal([one.cost for one in kept])
    down, y_ticks = _vertical(kept)
    most = max((one.bytes or 0 for one in kept), default=0)
    radii = [LARGEST * sqrt((one.bytes or 0) / most) if most else 0.0 for one in kept]
    places = [(across(one.cost), down(one.score)) for one in kept]
    blocks = _blocks(kept, places, radii, down)
    labels = [one.label for one in kept]
    placed = _labels(labels, places, radii, blocks)
    numbered = placed is None
    if placed is None:
        labels = [str(i + 1) for i in range(len(kept))]
        placed = _labels(labels, places, radii, blocks, anyhow=True)
    assert placed is not None
    best = frontier(kept)
    drawn = [
        DrawnCandidate(
            key=one.key,
            x=x,
            y=y,
            low=None if one.low is None else down(one.low),
            high=None if one.high is None else down(one.high),
            radius=round(radii[i], 1),
            label=labels[i],
            label_x=label_x,
            label_y=label_y,
            anchor=anchor,
            name=one.label,
            best=i in best,
            text=one.text,
        )
        for i, (one, (x, y), (label_x, label_y, anchor)) in enumerate(zip(kept, places, placed, strict=True))
    ]
    told = [f"{one.label}: {one.text}" for one in kept]
    told.append(f"not beaten in both: {', '.join(kept[i].label for i in best)}")
    return Pareto(
        title,
        f"{title}. {'; '.join(told)}.",
        note,
        drawn,
        _steps([places[i] for i in best]),
        numbered,
        x_ticks,
        y_ticks,
        f"{x_name}, logarithmic" if logarithmic else x_name,
        TOP + HEIGHT + BOTTOM,
    )


def frontier(candidates: Sequence[Candidate]) -> list[int]:
    """Indices of those that no other beats, the fastest first: of two alike in both, each is one."""

    def beaten(one: Candidate) -> bool:
        return any(
            other.cost <= one.cost
            and other.score >= one.score
            and (other.cost < one.cost or other.score > one.score)
            for other in candidates
        )

    best = [i for i, one in enumerate(candidates) if not beaten(one)]
    return sorted(best, key=lambda i: (candidates[i].cost, i))


def _steps(best: Sequence[tuple[float, float]]) -> str:
    """From each of the best across to the next one's latency, and up."""
    if len(best) < 2:
        return ""
    points = [best[0]]
    for (_, y), (x, up) in pairwise(best):
        points += [(x, y), (x, up)]
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _horizontal(costs: Sequence[float]) -> tuple[Place, list[Tick], bool]:
    """Where a cost lies: from zero, or where they are far apart on a logarithmic axis."""
    inset = LARGEST + 4
    logarithmic = max(costs) / min(costs) >= LOGARITHMIC_FROM
    start, end = LEFT + (inset if logarithmic else 0), WIDTH - RIGHT - inset
    if not logarithmic:
        step = nice(max(costs) / 3)

        def even(cost: float) -> float:
            return round(start + (end - start) * cost / max(costs), 1)

        marked = [one for one in ticks(0.0, max(costs) * 1.08, step) if even(one[0]) <= WIDTH - RIGHT]
        return even, [Tick(even(value), text) for value, text in marked], False
    low, high = log10(min(costs)), log10(max(costs))

    def place(cost: float) -> float:
        return round(start + (end - start) * (log10(cost) - low) / (high - low), 1)

    found = [
        Tick(place(value), axis_number(value))
        for power in range(floor(low) - 1, ceil(high) + 1)
        for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if LEFT + 4 <= place(value) <= WIDTH - RIGHT
    ]
    return place, _apart(found), True


def _apart(found: Sequence[Tick]) -> list[Tick]:
    """Those that leave each other room."""
    kept: list[Tick] = []
    for tick in found:
        if not kept or tick.position - kept[-1].position >= 30:
            kept.append(tick)
    return kept


def _vertical(candidates: Sequence[Candidate]) -> tuple[Place, list[Tick]]:
    """Where a percentage lies: the axis is cut to where they are."""
    low = min(one.score if one.low is None else one.low for one in candidates)
    high = max(one.score if one.high is None else one.high for one in candidates)
    step = nice(max(high - low, 0.5) / 4)
    bottom, top = floor(low / step) * step, min(100.0, ceil(high / step) * step)
    if top <= bottom:
        bottom = top - step
    inset = 10.0

    def down(percent: float) -> float:
        return round(TOP + inset + (HEIGHT - 2 * inset) * (top - percent) / (top - bottom), 1)

    return down, [Tick(down(value), text) for value, text in ticks(bottom, top, step)]


def _blocks(
    candidates: Sequence[Candidate],
    places: Sequence[tuple[float, float]],
    radii: Sequence[float],
    down: Place,
) -> list[tuple[Box, Box]]:
    """What a label should not lie on: each one's circle, and if possible its whisker."""
    found = []
    for one, (x, y), radius in zip(candidates, places, radii, strict=True):
        r = max(radius, DOT)
        low = down(one.low) if one.low is not None else y
        high = down(one.high) if one.high is not None else y
        # A circle's corners are free: the square inside it and half of what is left.
        found.append(
            (
                (x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r),
                (x - DOT, min(high, y - DOT), x + DOT, max(low, y + DOT)),
            )
        )
    return found


def _labels(
    labels: Sequence[str],
    places: Sequence[tuple[float, float]],
    radii: Sequence[float],
    blocks: Sequence[tuple[Box, Box]],
    *,
    anyhow: bool = False,
) -> list[tuple[float, float, str]] | None:
    """(x, baseline, anchor) of each label; None where one finds no room, unless placed ``anyhow``."""
    taken, whiskers = [circle for circle, _ in blocks], [whisker for _, whisker in blocks]
    found = []
    for label, (x, y), radius in zip(labels, places, radii, strict=True):
        options = [one for one in _around(label, x, y, max(radius, DOT)) if _inside(one[0])]
        # A label across a line is still read, thanks to its halo.
        clear = [one for one in options if not _hits(one[0], taken)]
        clear = [one for one in clear if not _hits(one[0], whiskers)] or clear
        if not clear and not anyhow:
            return None
        box, place = (clear or options or _around(label, x, y, DOT))[0]
        taken.append(box)
        found.append(place)
    return found


def _around(label: str, x: float, y: float, r: float) -> list[tuple[Box, tuple[float, float, str]]]:
    """Places for a label beside its circle, the best first."""
    wide, half = LETTER * len(label), LINE / 2
    found: list[tuple[Box, tuple[float, float, str]]] = []
    for dy in (0.0, -(r + half), r + half, -(r + LINE + half), r + LINE + half):
        aside = r + GAP if abs(dy) < r else GAP
        for anchor, left in (("start", x + aside), ("end", x - aside - wide), ("middle", x - wide / 2)):
            if anchor == "middle" and not dy:
                continue
            at = {"start": left, "end": left + wide, "middle": x}[anchor]
            box = (left, y + dy - half, left + wide, y + dy + half)
            found.append((box, (round(at, 1), round(y + dy + 4, 1), anchor)))
    return found


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= TOP + HEIGHT


def _hits(box: Box, others: Sequence[Box]) -> bool:
    return any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for other in others
    )
