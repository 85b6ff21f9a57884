"""Latency in the report: intervals, speed-ups in words, disturbances, histograms."""

import re

import pytest
from questpress.pipeline.report.sections import latency

from tests.support import bench_reports, reports
from tests.support.pages import html, markdown, points, shapes


def test_report_without_a_bench_has_no_section() -> None:
    assert latency.section(reports.full()).is_empty
    assert 'id="latency"' not in html(reports.full())


def test_percentiles_have_intervals() -> None:
    bench = bench_reports.bench()
    table = latency.percentiles(bench)
    assert table.columns == ["", "threads", "p50", "p90", "p95", "p99", "mean", "runs"]
    first = bench.latencies[0].percentiles["p50"]
    role, threads, p50, *_, runs = table.rows[0]
    assert (role, threads, runs) == ("Teacher", "1", "700")
    shown = [float(number) for number in re.findall(r"[\d.]+", p50)]
    assert shown == pytest.approx([first.value, first.low, first.high], rel=0.005)
    assert latency.percentile(None) == "–"


def test_percentile_with_too_few_runs_is_left_out_with_a_note() -> None:
    few = [bench_reports.timed("teacher", 1, 12.0, n=100)]
    table = latency.percentiles(bench_reports.bench(latencies=few))
    assert table.columns == ["", "threads", "p50", "p90", "mean", "runs"]
    assert table.note.endswith("Too few runs for p95 and p99.")


def test_speedups_below_one_are_called_slower() -> None:
    rows = {row[0]: row[1:] for row in latency.speedups(bench_reports.bench()).rows}
    assert rows == {
        "Student int8 vs. teacher": ["18.2× faster (17.9–18.5×)", "–"],
        "Student int8 vs. student fp32": [
            "1.25× slower (1.19–1.33×)",
            "no significant difference (0.98–1.03×)",
        ],
    }


def test_speedups_are_shown_once() -> None:
    for page in (html(bench_reports.with_bench()), markdown(bench_reports.with_bench())):
        assert page.count("18.2× faster (17.9–18.5×)") == 1


def test_end_to_end_cold_start_and_throughput_are_tables() -> None:
    bench = bench_reports.bench()
    _, end_to_end, cold_start, throughput = latency.other_tables(bench)
    assert end_to_end.rows == [
        ["Student int8", "6.10", "1.90", "0.200", "0.340", "8.61 (8.55–8.70)", "9.20 (9.10–)"]
    ]
    assert cold_start.rows == [["Student int8", "140", "41.0", "3.20", "66.0 MB", "12.0 MB"]]
    assert throughput.rows == [["Student int8", "1,450", "1,460"]]
    assert ["not monitored", "throttled", "throttled"] in latency.conditions(bench).rows


def test_disturbance_is_in_the_section_and_on_the_first_screen() -> None:
    quiet, disturbed = bench_reports.with_bench(), bench_reports.with_bench(flags=[bench_reports.STEAL])
    assert "No disturbance was detected" in markdown(quiet)
    for page in (html(disturbed), markdown(disturbed)):
        assert page.count("gave 5 % of this virtual machine") == 2
        assert "The measurement was disturbed (steal)" in page


def test_histogram_of_each_network_peaks_near_its_median() -> None:
    chart = latency.histograms(bench_reports.bench(), 1)
    assert chart is not None
    assert [shape.text for shape in shapes(chart, "name")] == ["Teacher", "Student fp32", "Student int8"]
    assert "Student int8: median 0.6" in chart.description
    [median] = shapes(chart, "level budget")
    whiskers = shapes(chart, "whisker")
    assert len(whiskers) == 3
    for histogram, p90 in zip(shapes(chart, "histogram"), whiskers, strict=True):
        outline = points(histogram)
        base = outline[0][1]
        x, y = min(outline, key=lambda point: point[1])
        assert y == pytest.approx(base - latency.HISTOGRAM_HEIGHT, abs=0.2)
        assert abs(x - float(median.attributes["x1"])) < 30
        assert float(p90.attributes["d"].split()[1]) > float(median.attributes["x1"])
    assert latency.histograms(bench_reports.bench(), 4) is None


def test_equal_runs_can_be_drawn() -> None:
    equal = [m.model_copy(update={"quantiles": [2.0] * 101}) for m in bench_reports.bench().latencies]
    chart = latency.histograms(bench_reports.bench(latencies=equal), 1)
    assert chart is not None and "nan" not in str(chart)


def test_disturbed_bench_has_no_wall_time_and_names_cause_and_repetition() -> None:
    report = bench_reports.disturbed()
    assert report.bench is not None
    table = latency.percentiles(report.bench)
    assert table.columns == ["", "threads", "processor time", "runs"]
    assert table.rows[0] == ["Teacher", "1", "12.4", "700"]
    assert latency.speedups(report.bench).rows == [
        ["Student int8 vs. teacher", "18.2× less processor time (17.9–18.5×)", "–"],
        ["Student int8 vs. student fp32", "1.92× less processor time (1.88–1.95×)", "–"],
    ]
    assert all(latency.histograms(report.bench, threads) is None for threads in (1, 2))
    for page in (html(report), markdown(report)):
        assert "18.2×</" in page or "**18.2×**" in page
        assert "less processor time than the teacher, 1 thread" in page and "faster than the" not in page
        assert "0.684 ms vs. 12.4 ms" in page and "0.489 ms" not in page
        assert page.count("Other processes used 62 % of the cores under test.") >= 2
        assert "close other programs and run: compress bench runs/shop" in page
