"""The chart of accuracy over latency: positions of points, axes and labels."""

import random
from itertools import pairwise
from typing import Any

import pytest
from questpress.pipeline.report.charts import Chart
from questpress.pipeline.report.networks import accuracy_over_latency
from questpress.pipeline.report.scatter import DOT, LETTER, Box, Level, Point, overlap, scatter, shorten

from tests.support import reports
from tests.support.pages import center, html, markdown, points, shapes


def point(name: str, x: float, y: float, size: int | None = None, **more: str) -> Point:
    return Point(name, "student", x, y, f"{y} % at {x} ms", y - 2, y + 2, size, **{"label": name, **more})


def draw(*drawn: Point, **options: Any) -> Chart:
    chart = scatter("Accuracy over latency", drawn, x_name="ms", **options)
    assert chart is not None
    assert [drawing.css for drawing in chart.drawings] == ["wide", "narrow"]
    return chart


def place(chart: Chart, name: str, i: int) -> tuple[float, float]:
    marks = [*shapes(chart, "dot", i), *shapes(chart, "ring", i)]
    [mark] = [mark for mark in marks if mark.tooltip.startswith(f"{name}:")]
    return center(mark)


def x_ticks(chart: Chart, i: int) -> dict[str, float]:
    ticks = [tick for tick in shapes(chart, "tick", i) if tick.attributes.get("text-anchor") == "middle"]
    return {tick.text: float(tick.attributes["x"]) for tick in ticks}


@pytest.fixture(params=[0, 1], ids=["wide", "narrow"])
def i(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def test_areas_are_proportional_to_sizes(i: int) -> None:
    chart = draw(point("small", 0.2, 70, 1_000_000), point("large", 12, 90, 400_000_000))
    large, small = (float(area.attributes["r"]) for area in shapes(chart, "area", i))
    assert (large / small) ** 2 == pytest.approx(400, rel=0.02)
    assert small < DOT, "the dot, which has the same size for all files, stays visible"
    unknown = draw(point("a", 1, 70), point("b", 2, 80))
    assert not shapes(unknown, "area", i) and "area" not in unknown.note


def test_faster_is_left_and_more_accurate_is_up(i: int) -> None:
    chart = draw(point("a", 3, 80), point("b", 1, 70), point("c", 2, 75))
    a, b, c = (place(chart, name, i) for name in "abc")
    assert b[0] < c[0] < a[0] and a[1] < c[1] < b[1]
    for whisker, mark in zip(shapes(chart, "whisker", i), (a, b, c), strict=True):
        path = whisker.attributes["d"].split()
        assert 0 <= float(path[5]) < mark[1] < float(path[2]) <= chart.drawings[i].height


def test_far_apart_latencies_have_a_logarithmic_axis(i: int) -> None:
    chart = draw(point("a", 16, 80), point("b", 1, 70), point("c", 4, 75))
    a, b, c = (place(chart, name, i)[0] for name in "abc")
    assert (a - c) - (c - b) == pytest.approx(0, abs=0.2)
    assert list(x_ticks(chart, i)) == ["1", "2", "5", "10", "20"]
    assert shapes(chart, "tick axis", i)[0].text == "ms, logarithmic"
    near = draw(point("a", 2, 80), point("b", 1, 70))
    assert shapes(near, "tick axis", i)[0].text == "ms"
    zero = x_ticks(near, i)["0"]
    assert (place(near, "a", i)[0] - zero) / (place(near, "b", i)[0] - zero) == pytest.approx(2, abs=0.01)


def test_ticks_do_not_overlap(i: int) -> None:
    positions = list(x_ticks(draw(point("a", 0.05, 70), point("b", 400, 90)), i).values())
    assert len(positions) >= 4
    assert min(after - before for before, after in pairwise(positions)) >= 30


def test_stairs_follow_the_pareto_front(i: int) -> None:
    drawn = [point("slow", 3, 90), point("fast", 1, 70), point("beaten", 2.5, 69), point("between", 2, 80)]
    chart = draw(*drawn)
    fast, between, slow = (place(chart, name, i) for name in ("fast", "between", "slow"))
    [stairs] = shapes(chart, "stairs", i)
    assert points(stairs) == [fast, (between[0], fast[1]), between, (slow[0], between[1]), slow]
    assert [ring.tooltip for ring in shapes(chart, "ring", i)] == ["beaten: 69 % at 2.5 ms"]
    assert chart.description.endswith("(no file is both faster and more accurate): fast, between, slow.")
    assert "Dashed" in chart.note and "Hollow" in chart.note
    alone = draw(point("a", 1, 70))
    assert not shapes(alone, "stairs", i)
    assert "Dashed" not in alone.note and "Hollow" not in alone.note


def test_files_of_a_run_are_joined(i: int) -> None:
    chart = draw(
        point("a int8", 1, 70, run="a"), point("b int8", 2, 80, run="b"), point("a fp32", 3, 71, run="a")
    )
    [pair] = shapes(chart, "pair", i)
    ends = [float(pair.attributes[name]) for name in ("x1", "y1", "x2", "y2")]
    assert ends == [*place(chart, "a int8", i), *place(chart, "a fp32", i)]
    assert "joins the two files of a run" in chart.note


def label_boxes(chart: Chart, i: int) -> list[Box]:
    boxes = []
    for label in (*shapes(chart, "best", i), *shapes(chart, "name", i)):
        x, y, width = float(label.attributes["x"]), float(label.attributes["y"]), LETTER * len(label.text)
        anchor = label.attributes.get("text-anchor", "start")
        left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
        boxes.append((left, y - 11, left + width, y + 3))
    return boxes


def test_labels_overlap_neither_each_other_nor_points(i: int) -> None:
    chance = random.Random(1)
    many = [
        point(f"resnet50-mobilenet-{k}", 1 + chance.random() / 5, 70 + 8 * chance.random(), 2_500_000)
        for k in range(14)
    ]
    chart = draw(*many)
    boxes, drawing = label_boxes(chart, i), chart.drawings[i]
    assert len(boxes) >= (10 if i == 0 else 4)
    assert shapes(chart, "leader", i)
    for k, box in enumerate(boxes):
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= drawing.width and box[3] <= drawing.height
        assert not any(overlap(box, other) for other in boxes[:k])
        for area in shapes(chart, "area", i):
            (x, y), r = center(area), float(area.attributes["r"]) - 0.1
            assert not overlap(box, (x - r, y - r, x + r, y + r))


def test_all_networks_of_a_run_have_labels(i: int) -> None:
    sizes = (90_000_000, 9_000_000, 2_500_000)
    for y in ((78, 77, 76.9), (98.9, 98.9, 98.9)):
        values = zip(("Teacher", "fp32", "int8"), (11, 0.74, 0.41), y, sizes, strict=True)
        chart = draw(*(point(*value) for value in values))
        labels = [*shapes(chart, "best", i), *shapes(chart, "name", i)]
        assert sorted(label.text for label in labels) == ["Teacher", "fp32", "int8"]


def test_levels_are_horizontal_lines_inside_the_plot(i: int) -> None:
    chart = draw(point("a", 1, 70), levels=[Level("budget 60 %", "budget", 60.0)], show_frontier=False)
    [level] = shapes(chart, "level budget", i)
    assert level.attributes["y1"] == level.attributes["y2"]
    assert place(chart, "a", i)[1] < float(level.attributes["y1"]) < chart.drawings[i].height
    assert "line: budget 60 %" in chart.description and "Pareto" not in chart.description


def test_long_labels_lose_their_middle() -> None:
    assert shorten("short", 10) == "short"
    assert shorten("resnet50-mobilenetv2-quest-seed3", 12) == "resne…-seed3"


def test_values_that_are_not_finite_are_not_drawn(i: int) -> None:
    bad = [point("a", float("nan"), 70), point("b", 0, 70), point("c", 1, float("inf"))]
    assert scatter("t", bad, x_name="ms") is None
    assert len(shapes(draw(*bad, point("d", 1, 70)), "dot", i)) == 1


def test_report_has_teacher_fp32_and_int8(i: int) -> None:
    report = reports.full()
    chart = accuracy_over_latency(report)
    assert chart is not None
    assert {(dot.tooltip.split(":")[0], dot.attributes["class"]) for dot in shapes(chart, "dot", i)} == {
        ("Teacher", "dot teacher"),
        ("fp32", "dot student"),
        ("int8", "dot student_int8"),
    }
    assert "1 thread" in shapes(chart, "tick axis", i)[0].text
    assert "at 0.684 ms, 2.55 MB" in chart.description
    assert html(report).count('<figure class="wide-chart">') == 1
    assert "Accuracy over latency. Teacher: " in markdown(report)


def test_report_before_the_bench_has_no_chart() -> None:
    assert accuracy_over_latency(reports.teacher_only()) is None
    assert "wide-chart" not in html(reports.teacher_only()).split("</style>")[1]
