"""A scatter chart of accuracy over latency whose labels do not overlap.

It is drawn twice, for a wide window and for a phone, so that its text keeps its size on both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log10, sqrt

from ..evaluation.comparison import frontier
from ..runs.scores import Score
from . import charts, format
from .charts import Chart, Drawing, Mark, Position, Shape

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 38
INSET = 10.0
"""Distance of the data from the top and the bottom of the plot."""
DOT = 3.5
"""Radius of the dot at the center of each circle, which stays visible if the file is small."""
LOGARITHMIC_RATIO = 4.0
"""Ratio of the largest latency to the smallest from which their axis is logarithmic."""
MIN_TICK_DISTANCE = 30.0
FEW_POINTS = 6
"""Charts of no more points are lower."""
LETTER, LINE = 6.7, 14.0
"""Mean width of a letter and height of a line, of labels of 12.5 px."""
GAP = 5.0
LEADER = 14.0
"""A label that is this much farther from its point than necessary gets a line to it."""
DISTANCES = (0.0, 14.0, 28.0, 44.0, 62.0, 84.0, 110.0, 140.0, 180.0, 230.0, 290.0)
"""Additional distances from a point at which its label is tried."""
DIRECTIONS = ((1, 0), (1, -0.8), (1, 0.8), (-1, 0), (-1, -0.8), (-1, 0.8), (0, -1), (0, 1))

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Point:
    """A file: ``x`` in ms, ``y`` in percent with its interval."""

    name: str
    key: str
    """Its color in the style sheet."""
    x: float
    y: float
    text: str
    """Its figures in words."""
    low: float | None = None
    high: float | None = None
    bytes: int | None = None
    label: str = ""
    run: str = ""
    """Files of the same run are joined by a thin line."""

    @classmethod
    def from_score(
        cls, name: str, key: str, score: Score, p50: float, size: int | None, label: str, run: str = ""
    ) -> "Point":
        text = f"{format.score(score)} at {format.milliseconds(p50)}"
        text += "" if size is None else f", {format.megabytes(size)}"
        return cls(name, key, p50, score.percent, text, score.low, score.high, size, label, run)


@dataclass(frozen=True)
class Level:
    """A horizontal line at ``y`` percent."""

    label: str
    key: str
    y: float


@dataclass(frozen=True)
class Label:
    text: str
    x: float
    y: float
    anchor: str
    point: Point
    leader: tuple[float, float] | None
    """End of the line from the point to the label."""


def scatter(
    title: str,
    points: Sequence[Point],
    *,
    x_name: str,
    note: str = "",
    legend: Sequence[tuple[str, str]] = (),
    levels: Sequence[Level] = (),
    show_frontier: bool = True,
) -> Chart | None:
    """Draw points of accuracy over latency; None if none of them is finite.

    ``legend`` holds keys of the style sheet and their meaning. The frontier is the Pareto front.
    """
    points = [point for point in points if isfinite(point.x) and point.x > 0 and isfinite(point.y)]
    levels = [level for level in levels if isfinite(level.y)]
    if not points:
        return None
    best = frontier([(point.x, point.y) for point in points]) if show_frontier else list(range(len(points)))
    few = len(points) <= FEW_POINTS
    drawings = [
        _Plot(points, best, levels, show_frontier, x_name, *form).draw()
        for form in (
            ("wide", 1000, 300 if few else 470, 26.0, 30),
            ("narrow", 350, 300 if few else 420, 17.0, 20),
        )
    ]
    described = [f"{point.name}: {point.text}" for point in points]
    described += [f"line: {level.label}" for level in levels]
    description = f"{title}. {'; '.join(described)}."
    if show_frontier:
        names = ", ".join(points[i].name for i in best)
        description += f" Pareto front (no file is both faster and more accurate): {names}."
        note = f"{note} {_explain_marks(points, best)}".strip()
    symbols = [(Drawing(12, 12, [charts.circle(f"dot {key}", 6, 6, 5)]), label, "") for key, label in legend]
    return Chart(title, description, drawings, note, symbols)


def _explain_marks(points: Sequence[Point], best: Sequence[int]) -> str:
    sentences = []
    largest = max((point.bytes or 0 for point in points), default=0)
    if largest:
        sentences.append(f"Circle area: file size, the largest {format.megabytes(largest)}.")
    if any(point.low is not None for point in points):
        sentences.append("Vertical line: 95 % interval.")
    if len(best) > 1:
        sentences.append("Dashed line: Pareto front.")
    if len(best) < len(points):
        sentences.append("Hollow dot: another file is at least as fast and as accurate.")
    runs = [point.run for point in points if point.run]
    if len(set(runs)) < len(runs):
        sentences.append("A thin line joins the two files of a run.")
    return " ".join(sentences)


@dataclass
class _Plot:
    """The scatter chart for one width of the window."""

    points: Sequence[Point]
    best: Sequence[int]
    levels: Sequence[Level]
    show_frontier: bool
    x_name: str
    css: str
    width: int
    height: int
    max_radius: float
    max_letters: int

    def __post_init__(self) -> None:
        self.right, self.bottom = self.width - RIGHT, self.height - BOTTOM
        sizes = [point.bytes or 0 for point in self.points]
        largest = max(sizes) or 1
        self.radii = [round(self.max_radius * sqrt(size / largest), 2) for size in sizes]
        self.x, self.x_ticks = _x_scale(self.points, LEFT + 4.0, float(self.right))
        if is_logarithmic(self.points):
            self.x_name += ", logarithmic"
        marks = [Mark("", "", point.y, "", point.low, point.high) for point in self.points]
        low, high, step = charts.percent_range(marks, 5, *(level.y for level in self.levels))
        self.y = _scale(high, low, TOP + INSET, self.bottom - INSET)
        self.y_ticks = charts.axis_ticks(low, high, step)

    def draw(self) -> Drawing:
        shapes = charts.y_axis(self.y_ticks, self.y, LEFT, self.right)
        for value, number in self.x_ticks:
            shapes.append(charts.line("grid", self.x(value), self.bottom, self.x(value), self.bottom + 5))
            shapes.append(charts.text("tick", self.x(value), self.bottom + 18, number, "middle"))
        shapes.append(charts.text("tick axis", self.right, self.bottom + 34, self.x_name, "end"))
        shapes.append(charts.text("tick axis", 0, 9, "%"))
        for level in self.levels:
            y = self.y(level.y)
            shapes.append(charts.line(f"level {level.key}", LEFT, y, self.right, y))
            shapes.append(charts.text("tick halo", LEFT + 4, y - 4, level.label))
        # Large circles first, so that small ones stay visible.
        for point, radius in sorted(zip(self.points, self.radii, strict=True), key=lambda pair: -pair[1]):
            if radius:
                shapes.append(charts.circle(f"area {point.key}", *self.position(point), radius))
        shapes += self._draw_frontier() + self._draw_runs()
        labels = self.place_labels()
        for label in labels:
            if label.leader is not None:
                shapes.append(charts.line("leader", *self.position(label.point), *label.leader))
        for point in self.points:
            if point.low is not None and point.high is not None:
                start, end = (self.x(point.x) - 3, self.y(point.low)), self.y(point.high)
                shapes.append(charts.path(f"whisker {point.key}", "M", *start, "h6m-3 0V", end, "m-3 0h6"))
        for i in sorted(range(len(self.points)), key=lambda i: i in self.best):
            point, mark = self.points[i], "dot" if i in self.best else "ring"
            tooltip = f"{point.name}: {point.text}"
            shapes.append(charts.circle(f"{mark} {point.key}", *self.position(point), DOT, tooltip))
        for label in labels:
            is_best = self.show_frontier and any(self.points[i] is label.point for i in self.best)
            weight = "best" if is_best else "name"
            shapes.append(charts.text(f"{weight} halo", label.x, label.y, label.text, label.anchor))
        return Drawing(self.width, self.height, shapes, self.css)

    def position(self, point: Point) -> tuple[float, float]:
        return self.x(point.x), self.y(point.y)

    def _draw_frontier(self) -> list[Shape]:
        """Draw the stairs from each point of the Pareto front across to the next one's latency, and up."""
        front = [self.position(self.points[i]) for i in self.best]
        corners = front[:1]
        for (_, y), (next_x, next_y) in pairwise(front):
            corners += [(next_x, y), (next_x, next_y)]
        return [charts.polyline("stairs", corners)] if self.show_frontier and len(front) > 1 else []

    def _draw_runs(self) -> list[Shape]:
        shapes = []
        for run in dict.fromkeys(point.run for point in self.points if point.run):
            files = [self.position(point) for point in self.points if point.run == run]
            shapes += [charts.line("pair", *a, *b) for a, b in pairwise(files)]
        return shapes

    def place_labels(self) -> list[Label]:
        """Place a label for each point, those of the Pareto front first; a label without room is left out."""
        frame = (LEFT, TOP - 8.0, float(self.width), float(self.bottom))
        circles, whiskers = [], []
        for point, area in zip(self.points, self.radii, strict=True):
            (x, y), r = self.position(point), max(area, DOT)
            circles.append((x - r, y - r, x + r, y + r))
            ends = [self.y(end) for end in (point.low, point.high) if end is not None] or [y]
            whiskers.append((x - 2, min(ends), x + 2, max(ends)))
        for level in self.levels:
            y = self.y(level.y)
            circles.append((LEFT, y - LINE, LEFT + 4 + LETTER * len(level.label), y))
        taken: list[Box] = []
        labels = []
        labeled = [i for i, point in enumerate(self.points) if point.label]
        for i in sorted(labeled, key=lambda i: (i not in self.best, self.y(self.points[i].y))):
            point = self.points[i]
            name = shorten(point.label, self.max_letters)
            # A label may cover an interval if it has no other place.
            for obstacles in ([*circles, *taken, *whiskers], [*circles, *taken]):
                places = self._label_places(point, max(self.radii[i], DOT), name)
                free = (place for place in places if _is_free(place[0], obstacles, frame))
                if (place := next(free, None)) is not None:
                    taken.append(place[0])
                    labels.append(self._label(point, name, *place))
                    break
        return labels

    def _label_places(self, point: Point, radius: float, name: str) -> Iterator[tuple[Box, str, float]]:
        """Yield possible boxes of a label, nearest first, with their text anchor and distance."""
        width = LETTER * len(name)
        for distance in DISTANCES:
            for right, below in DIRECTIONS:
                gap = radius + GAP + distance
                x, y = self.x(point.x) + right * gap, self.y(point.y) + below * gap
                left = x if right > 0 else x - width if right < 0 else x - width / 2
                anchor = "start" if right > 0 else "end" if right < 0 else "middle"
                yield (left, y - LINE / 2, left + width, y + LINE / 2), anchor, distance

    def _label(self, point: Point, name: str, box: Box, anchor: str, distance: float) -> Label:
        left, top, right, bottom = box
        x = {"start": left, "end": right, "middle": (left + right) / 2}[anchor]
        y = (top + bottom) / 2
        edge = y if anchor != "middle" else top if self.y(point.y) < y else bottom
        return Label(name, x, y + 4, anchor, point, (x, edge) if distance >= LEADER else None)


def _scale(low: float, high: float, start: float, end: float, transform: Position = float) -> Position:
    exact = charts.linear_scale(transform(low), transform(high), start, end)
    return lambda value: round(exact(transform(value)), 1)


def is_logarithmic(points: Sequence[Point]) -> bool:
    return max(point.x for point in points) / min(point.x for point in points) >= LOGARITHMIC_RATIO


def _x_scale(points: Sequence[Point], start: float, end: float) -> tuple[Position, list[tuple[float, str]]]:
    """Return positions on the axis of latencies, and its ticks."""
    low, high = min(point.x for point in points), max(point.x for point in points)
    if is_logarithmic(points):
        margin = (high / low) ** 0.09
        first, last = low / margin, high * margin
        position = _scale(first, last, start, end, log10)
        factors = (1, 2, 5) if high / low > 12 else (1, 1.5, 2, 3, 5, 7)
        powers = range(floor(log10(first)), ceil(log10(last)) + 1)
        values = [factor * 10.0**power for power in powers for factor in factors]
        values = [value for value in values if first <= value <= last]
    else:
        step = charts.round_step(high / 5)
        last = ceil(high / step + 0.2) * step
        position = _scale(0.0, last, start, end)
        values = [value for value, _ in charts.axis_ticks(0.0, last, step)]
    ticks: list[tuple[float, str]] = []
    for value in values:
        if not ticks or position(value) - position(ticks[-1][0]) >= MIN_TICK_DISTANCE:
            ticks.append((value, charts.axis_number(round(value, 9))))
    return position, ticks


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _is_free(box: Box, obstacles: Sequence[Box], frame: Box) -> bool:
    inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
    return inside and not any(overlap(box, other) for other in obstacles)


def shorten(name: str, max_letters: int) -> str:
    """Replace the middle of a long name by an ellipsis: names of runs often differ at their ends."""
    if len(name) <= max_letters:
        return name
    head = (max_letters - 1) // 2
    return f"{name[:head]}…{name[head + 1 - max_letters :]}"
