"""The picture of accuracy over latency: where its points, axes and names lie."""

import random
from itertools import pairwise

import pytest
from questpress.pipeline.report.labels import LETTER, overlap, shortened
from questpress.pipeline.report.pictures import trade
from questpress.pipeline.report.tradeoff import DOT, Plot, Spot, Tradeoff, tradeoff
from tests.support.pages import html, markdown

from tests.support import reports


def spot(name: str, x: float, y: float, size: int | None = None, **more: str) -> Spot:
    return Spot(name, "student", x, y, f"{y} % at {x} ms", y - 2, y + 2, size, **{"label": name, **more})


def drawn(*spots: Spot) -> Tradeoff:
    found = tradeoff("Accuracy over latency", spots, x_name="ms")
    assert found is not None
    assert [plot.kind for plot in found.plots] == ["wide", "narrow"]
    return found


def place(plot: Plot, name: str) -> tuple[float, float]:
    [found] = [(one.x, one.y) for one in plot.spots if one.text.startswith(f"{name}:")]
    return found


def test_areas_are_in_proportion_to_sizes() -> None:
    for plot in drawn(spot("small", 0.2, 70, 1_000_000), spot("large", 12, 90, 400_000_000)).plots:
        large, small = (one.radius for one in plot.spots)
        assert (large / small) ** 2 == pytest.approx(400, rel=0.02)
        # Smaller than a dot, which has one size for all and so is seen.
        assert small < plot.dot == DOT
    unknown = drawn(spot("a", 1, 70), spot("b", 2, 80))
    assert {one.radius for plot in unknown.plots for one in plot.spots} == {0.0}
    assert "Area" not in unknown.note


def test_faster_is_further_left_and_the_more_accurate_further_up() -> None:
    for plot in drawn(spot("a", 3, 80), spot("b", 1, 70), spot("c", 2, 75)).plots:
        a, b, c = (place(plot, name) for name in "abc")
        assert b[0] < c[0] < a[0] and a[1] < c[1] < b[1]
        for one in plot.spots:
            assert one.low is not None and one.high is not None and one.high < one.y < one.low
            assert one.high >= 0 and one.low <= plot.bottom


def test_far_apart_times_lie_on_a_logarithmic_axis_which_says_so() -> None:
    far = drawn(spot("a", 16, 80), spot("b", 1, 70), spot("c", 4, 75))
    assert far.x_name == "ms, logarithmic"
    for plot in far.plots:
        a, b, c = (place(plot, name)[0] for name in "abc")
        assert (a - c) - (c - b) == pytest.approx(0, abs=0.2)
        assert [tick.text for tick in plot.x_ticks] == ["1", "2", "5", "10", "20"]
    near = drawn(spot("a", 2, 80), spot("b", 1, 70))
    assert near.x_name == "ms"
    for plot in near.plots:
        assert plot.x_ticks[0].text == "0"
        zero = plot.x_ticks[0].position
        assert (place(plot, "a")[0] - zero) / (place(plot, "b")[0] - zero) == pytest.approx(2, abs=0.01)


def test_numbers_on_the_axis_leave_each_other_room() -> None:
    for plot in drawn(spot("a", 0.05, 70), spot("b", 400, 90)).plots:
        places = [tick.position for tick in plot.x_ticks]
        assert len(places) >= 4
        assert min(after - before for before, after in pairwise(places)) >= 30


def test_staircase_goes_through_the_frontier_across_and_up() -> None:
    those = [spot("slow", 3, 90), spot("fast", 1, 70), spot("beaten", 2.5, 69), spot("between", 2, 80)]
    picture = drawn(*those)
    for plot in picture.plots:
        fast, between, slow = (place(plot, name) for name in ("fast", "between", "slow"))
        corners = [fast, (between[0], fast[1]), between, (slow[0], between[1]), slow]
        assert plot.stairs == " ".join(f"{x:g},{y:g}" for x, y in corners)
        assert [one.text for one in plot.spots if not one.best] == ["beaten: 69 % at 2.5 ms"]
    assert picture.description.endswith("Faster or more accurate than any other: fast, between, slow.")
    assert "Dashed" in picture.note and "Hollow" in picture.note
    alone = drawn(spot("a", 1, 70))
    assert [plot.stairs for plot in alone.plots] == ["", ""]
    assert "Dashed" not in alone.note and "Hollow" not in alone.note


def test_files_of_a_run_are_joined() -> None:
    picture = drawn(
        spot("a int8", 1, 70, run="a"), spot("b int8", 2, 80, run="b"), spot("a fp32", 3, 71, run="a")
    )
    for plot in picture.plots:
        assert plot.joined == [(*place(plot, "a int8"), *place(plot, "a fp32"))]
    assert "joins the two files of a run" in picture.note


def test_names_lie_neither_on_each_other_nor_on_points() -> None:
    chance = random.Random(1)
    many = [
        spot(f"resnet50-mobilenet-{i}", 1 + chance.random() / 5, 70 + 8 * chance.random(), 2_500_000)
        for i in range(14)
    ]
    for plot in drawn(*many).plots:
        boxes = []
        for label in plot.labels:
            wide = LETTER * len(label.text)
            left = {"start": label.x, "end": label.x - wide, "middle": label.x - wide / 2}[label.anchor]
            boxes.append((left, label.y - 11, left + wide, label.y + 3))
            assert left >= 0 and left + wide <= plot.width
            assert label.y - 11 >= 0 and label.y + 3 <= plot.bottom
        assert len(boxes) >= (10 if plot.kind == "wide" else 4)
        assert any(label.line for label in plot.labels)
        for i, box in enumerate(boxes):
            assert not any(overlap(box, other) for other in boxes[:i])
            for one in plot.spots:
                circle = (one.x - one.radius, one.y - one.radius, one.x + one.radius, one.y + one.radius)
                assert not overlap(box, circle)


def test_names_of_one_run_all_find_room() -> None:
    sizes = (90_000_000, 9_000_000, 2_500_000)
    for y in ((78, 77, 76.9), (98.9, 98.9, 98.9)):
        those = [
            spot(*one) for one in zip(("Teacher", "fp32", "int8"), (11, 0.74, 0.41), y, sizes, strict=True)
        ]
        for plot in drawn(*those).plots:
            assert sorted(label.text for label in plot.labels) == ["Teacher", "fp32", "int8"]


def test_long_names_are_shortened_in_their_middle() -> None:
    assert shortened("short", 10) == "short"
    assert shortened("resnet50-mobilenetv2-quest-seed3", 12) == "resne…-seed3"


def test_what_is_not_finite_is_not_drawn() -> None:
    those = [spot("a", float("nan"), 70), spot("b", 0, 70), spot("c", 1, float("inf"))]
    assert tradeoff("t", those, x_name="ms") is None
    assert [len(plot.spots) for plot in drawn(*those, spot("d", 1, 70)).plots] == [1, 1]


def test_report_shows_teacher_fp32_and_int8_and_says_them_in_words() -> None:
    report = reports.full()
    picture = trade(report)
    assert picture is not None
    for plot in picture.plots:
        assert {(one.text.split(":")[0], one.key) for one in plot.spots} == {
            ("Teacher", "teacher"),
            ("fp32", "student"),
            ("int8", "student_int8"),
        }
    assert "1 thread" in picture.x_name
    assert "at 0.684 ms, 2.55 MB" in picture.description
    assert html(report).count('<figure class="tradeoff">') == 1
    assert "Accuracy over latency. Teacher: " in markdown(report)


def test_before_the_bench_there_is_no_picture_of_latency() -> None:
    assert trade(reports.teacher_only()) is None
    assert "tradeoff" not in html(reports.teacher_only()).split("</style>")[1]
