"""The section on latency says what was measured, with its intervals, and what disturbed it."""

import re

import numpy as np
import pytest
from questpress.pipeline.report import bench_tables
from questpress.pipeline.report.sections import latency
from questpress.pipeline.report.render import html, markdown

from tests.support import bench_reports, reports


def test_a_report_without_a_bench_has_no_section() -> None:
    assert latency.section(reports.full()) == latency.Section()
    assert 'id="latency"' not in html(reports.full())
    assert "Latency of one image" in html(reports.full())


def test_percentiles_stand_with_their_intervals() -> None:
    bench = bench_reports.bench()
    table = bench_tables.percentiles(bench)
    assert table.columns == ["", "threads", "p50", "p90", "p95", "p99", "mean", "runs"]
    first = bench.latencies[0].percentiles["p50"]
    role, threads, p50, *_, runs = table.rows[0]
    assert (role, threads, runs) == ("Teacher", "1", "700")
    found = [float(one) for one in re.findall(r"[\d.]+", p50)]
    assert found == pytest.approx([first.value, first.low, first.high], rel=0.005)
    assert bench_tables.interval(None) == "–"


def test_a_percentile_nobody_has_runs_for_is_left_out_and_said_to_be() -> None:
    few = [bench_reports.timed("teacher", 1, 12.0, n=100)]
    table = bench_tables.percentiles(bench_reports.bench(latencies=few))
    assert table.columns == ["", "threads", "p50", "p90", "mean", "runs"]
    assert table.note.endswith("Too few runs for p95 and p99.")


def test_speedups_are_told_in_words_never_flattering() -> None:
    rows = {row[0]: row[1:] for row in bench_tables.speedups(bench_reports.bench()).rows}
    assert rows == {
        "Student int8 against teacher": ["18.2× faster (17.9–18.5×)", "–"],
        "Student int8 against student fp32": ["1.25× slower (1.19–1.33×)", "no difference (0.98–1.03×)"],
    }


def test_what_stands_beside_the_latencies_is_told() -> None:
    bench = bench_reports.bench()
    assert bench_tables.end_to_end(bench).rows == [
        ["Student int8", "6.10", "1.90", "0.200", "0.340", "8.61 (8.55–8.70)", "9.20 (9.10–)"]
    ]
    assert bench_tables.cold_starts(bench).rows == [
        ["Student int8", "140", "41.0", "3.20", "66.0 MB", "12.0 MB"]
    ]
    assert bench_tables.throughput(bench).rows == [["Student int8", "1,450", "1,460"]]
    assert ["not checked", "throttled", "throttled"] in bench_tables.conditions(bench).rows


def test_a_flag_stands_in_the_section_and_on_the_first_screen() -> None:
    quiet, disturbed = bench_reports.with_bench(), bench_reports.with_bench(flags=[bench_reports.STEAL])
    assert "showed nothing that disturbed it" in markdown(quiet)
    for text in (html(disturbed), markdown(disturbed)):
        assert text.count("gave 5 % of this virtual machine") == 2
        assert "The machine was not quiet (steal)" in text


def test_the_picture_has_a_hill_for_each_network_over_its_own_median() -> None:
    bench = bench_reports.bench()
    drawn = latency.hills(bench, 1)
    assert drawn is not None
    assert [row.label for row in drawn.rows] == ["Teacher", "Student fp32", "Student int8"]
    assert "Student int8: median 0.6" in drawn.description
    for row in drawn.rows:
        points = np.array([[float(one) for one in point.split(",")] for point in row.outline.split()])
        peak = points[points[:, 1].argmin(), 0]
        assert points[:, 1].min() == pytest.approx(row.y - latency.CURVE, abs=0.2)
        assert abs(peak - drawn.median_x) < 30 and row.p90 is not None and row.p90 > drawn.median_x
    assert latency.hills(bench, 4) is None


def test_equal_runs_can_be_drawn() -> None:
    still = [one.model_copy(update={"quantiles": [2.0] * 101}) for one in bench_reports.bench().latencies]
    drawn = latency.hills(bench_reports.bench(latencies=still), 1)
    assert drawn is not None and "nan" not in "".join(row.outline for row in drawn.rows)
