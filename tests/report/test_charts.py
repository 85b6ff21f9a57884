from questpress.pipeline.report.charts import Curve, Mark, dots, lines, round_step

from tests.support.pages import center, shapes


def test_dot_is_inside_its_interval_and_the_axis_ends_at_100_percent() -> None:
    chart = dots("Accuracy", [Mark("a", "teacher", 99.4, "99.4 %", 97.0, 99.9)])
    assert chart is not None and chart.description == "Accuracy. a: 99.4 %."
    [dot], [whisker] = shapes(chart, "dot"), shapes(chart, "whisker")
    path = whisker.attributes["d"].split()
    low, high = path[1], path[5]
    assert float(low) < center(dot)[0] < float(high)
    ticks = shapes(chart, "tick")
    assert float(ticks[-1].text) <= 100
    assert float(ticks[0].attributes["x"]) <= float(low)
    assert float(high) <= float(ticks[-1].attributes["x"]) + 60


def test_curve_falls_with_its_values_and_has_a_gap_if_they_are_not_finite() -> None:
    chart = lines("Loss", [Curve("loss", [1, 2, 3, 4, 5], [4.0, 2.0, float("nan"), 1.0, None])])
    assert chart is not None
    heights = [center(mark)[1] for mark in shapes(chart, "point")]
    assert len(heights) == 3 and heights == sorted(heights)
    assert len(shapes(chart, "curve")) == 1
    assert chart.legend[0][1:] == ("loss", "1")


def test_chart_without_a_finite_value_is_none() -> None:
    assert lines("Loss", [Curve("loss", [1], [float("inf")]), Curve("ce", [1], [None])]) is None
    assert dots("Accuracy", []) is None


def test_one_epoch_and_equal_values_can_be_drawn() -> None:
    for value in (0.0, 3.0, -2.0):
        chart = lines("Loss", [Curve("loss", [7], [value])], from_zero=False)
        assert chart is not None and len(shapes(chart, "point")) == 1
        assert [
            tick.text for tick in shapes(chart, "tick") if tick.attributes.get("text-anchor") == "middle"
        ] == ["7"]


def test_axis_steps_are_round_numbers() -> None:
    assert [round_step(x) for x in (0.3, 0.11, 7, 26, 1)] == [0.5, 0.2, 10, 50, 1]
