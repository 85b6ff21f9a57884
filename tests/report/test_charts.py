from questpress.pipeline.report.charts import LABEL, Curve, Mark, bars, dots, lines, nice


def test_bar_is_as_long_as_its_value_from_zero() -> None:
    chart = bars("Size", [Mark("a", "teacher", 40, "40 MB"), Mark("b", "student", 10, "10 MB")])
    assert chart is not None
    long, short = (one.x - LABEL for one in chart.marks)
    assert abs(long / short - 4) < 0.05
    assert chart.description == "Size. a: 40 MB; b: 10 MB."


def test_dot_lies_inside_its_interval_and_the_axis_inside_a_hundred_percent() -> None:
    chart = dots("Accuracy", [Mark("a", "teacher", 99.4, "99.4 %", 97.0, 99.9)])
    assert chart is not None
    (one,) = chart.marks
    assert one.low is not None and one.high is not None
    assert one.low < one.x < one.high
    assert float(chart.ticks[-1].text) <= 100
    assert chart.ticks[0].position <= one.low and one.high <= chart.ticks[-1].position + 60


def test_curve_falls_where_its_values_fall_and_breaks_where_they_are_not_finite() -> None:
    chart = lines("Loss", [Curve("loss", [1, 2, 3, 4, 5], [4.0, 2.0, float("nan"), 1.0, None])])
    assert chart is not None
    (curve,) = chart.curves
    assert len(curve.points) == 3
    assert [y for _, y, _ in curve.points] == sorted(y for _, y, _ in curve.points)
    assert len(curve.pieces) == 1 and curve.last == "1"


def test_charts_without_a_finite_value_are_not_drawn() -> None:
    assert lines("Loss", [Curve("loss", [1], [float("inf")]), Curve("ce", [1], [None])]) is None
    assert bars("Size", []) is None and dots("Accuracy", []) is None


def test_one_epoch_and_equal_values_still_make_a_picture() -> None:
    for values in ([0.0], [3.0], [-2.0]):
        chart = lines("Loss", [Curve("loss", [7], values)], from_zero=False)
        assert chart is not None and len(chart.curves[0].points) == 1
        assert [tick.text for tick in chart.x_ticks] == ["7"]


def test_axis_steps_are_round_numbers() -> None:
    assert [nice(x) for x in (0.3, 0.11, 7, 26, 1)] == [0.5, 0.2, 10, 50, 1]
