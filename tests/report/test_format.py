import pytest
from questpress.pipeline.report import format


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.9234, "1.92 ms"),
        (16.04, "16.0 ms"),
        (0.04123, "0.0412 ms"),
        (1234.4, "1,230 ms"),
        (9.9963, "10.0 ms"),
        (0, "0 ms"),
    ],
)
def test_milliseconds_have_three_significant_digits(value: float, text: str) -> None:
    assert format.milliseconds(value) == text


def test_percentages_of_1000_images_have_two_decimals() -> None:
    assert format.percent(97.222, 180) == "97.2 %"
    assert format.percent(97.222, 10_000) == "97.22 %"
    assert format.percent_interval(93.68, 98.81, 180) == "93.7–98.8 %"


def test_percentage_below_100_is_not_rounded_to_100() -> None:
    assert format.percent(99.996, 100_000) == "99.99 %"
    assert format.percent(100.0, 180) == "100.0 %"


def test_megabytes_are_a_million_bytes() -> None:
    assert format.megabytes(2_548_907) == "2.55 MB"
    assert format.megabytes(94_100_000) == "94.1 MB"
    assert format.megabytes(21_300) == "0.0213 MB"


def test_ratios_durations_and_differences_are_formatted() -> None:
    assert [format.times(x) for x in (0.972, 8.4, 25.31, 112.4, 0.0123)] == [
        "0.97×", "8.40×", "25.3×", "112×", "0.0123×",
    ]  # fmt: skip
    assert [format.duration(x) for x in (4.21, 59.97, 192, 3840)] == [
        "4.2 s", "1 min 00 s", "3 min 12 s", "1 h 04 min",
    ]  # fmt: skip
    assert format.points(-1.13) == "−1.1 points"


def test_missing_values_are_dashes_and_infinite_ones_are_named() -> None:
    assert format.percent(None) == format.milliseconds(None) == format.megabytes(None) == "–"
    assert format.number(float("nan")) == format.significant(float("inf")) == "not finite"
