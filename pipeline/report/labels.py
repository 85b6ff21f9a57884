"""Where names stand beside their points: none upon another, none upon a point, far ones with a line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LETTER, LINE = 6.7, 14.0
"""Width of an average letter and height of a line, of labels of 12.5 px."""

GAP = 5.0
LEADER = 14.0
"""A label that is so much farther from its point than it could be gets a line to it."""

AWAY = (0.0, 14.0, 28.0, 44.0, 62.0, 84.0, 110.0, 140.0, 180.0, 230.0, 290.0)
"""How much farther than next to its point a label is tried."""

DIRECTIONS = ((1, 0), (1, -0.8), (1, 0.8), (-1, 0), (-1, -0.8), (-1, 0.8), (0, -1), (0, 1))

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Named:
    """A point of a picture; without ``text`` it is only in the way."""

    text: str
    x: float
    y: float
    radius: float
    low: float
    high: float
    """Where its whisker ends; ``y`` without one."""
    best: bool


@dataclass(frozen=True)
class Label:
    """``x``: where the text begins, ends or has its middle, by ``anchor``; ``line``: from its point to it."""

    x: float
    y: float
    anchor: str
    text: str
    line: tuple[float, float, float, float] | None
    best: bool


def placed(points: Sequence[Named], room: Box, most_letters: int) -> list[Label]:
    """A label for each point with a text, those of the best first; one that finds no room is left out."""
    circles = [_box(one) for one in points]
    whiskers = [(one.x - 2, min(one.low, one.high), one.x + 2, max(one.low, one.high)) for one in points]
    taken: list[Box] = []
    found: list[Label] = []
    for point in sorted(points, key=lambda one: (not one.best, one.y)):
        text = shortened(point.text, most_letters)
        # Rather farther away than upon an interval, but rather there than not at all.
        for obstacles in ([*circles, *taken, *whiskers], [*circles, *taken]):
            tried = _tried(point, text) if text else iter(())
            place = next((one for one in tried if _free(one[0], obstacles, room)), None)
            if place is not None:
                box, anchor, away = place
                taken.append(box)
                found.append(_label(box, anchor, away, text, point))
                break
    return found


def _tried(point: Named, text: str) -> Iterator[tuple[Box, str, float]]:
    wide = LETTER * len(text)
    for away in AWAY:
        for right, below in DIRECTIONS:
            gap = point.radius + GAP + away
            x, y = point.x + right * gap, point.y + below * gap
            left = x if right > 0 else x - wide if right < 0 else x - wide / 2
            box = (left, y - LINE / 2, left + wide, y + LINE / 2)
            yield box, "start" if right > 0 else "end" if right < 0 else "middle", away


def _label(box: Box, anchor: str, away: float, text: str, point: Named) -> Label:
    x = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
    y = (box[1] + box[3]) / 2
    line = None
    if away >= LEADER:
        edge = (box[1] if point.y < y else box[3]) if anchor == "middle" else y
        line = (point.x, point.y, round(x, 1), round(edge, 1))
    return Label(round(x, 1), round(y + 4, 1), anchor, text, line, point.best)


def _box(point: Named) -> Box:
    r = point.radius
    return point.x - r, point.y - r, point.x + r, point.y + r


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
