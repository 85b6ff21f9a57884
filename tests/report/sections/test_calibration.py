"""Calibration in the report: diagrams, sentences, table, terminal."""

import io

import numpy as np
import pytest
from questpress.pipeline.evaluation.calibration import Softmax, measure
from questpress.pipeline.report.charts import Chart
from questpress.pipeline.report.networks import compared_networks
from questpress.pipeline.report.sections import calibration
from questpress.pipeline.report.terminal import show_report
from questpress.pipeline.runs.results import Report
from questpress.pipeline.runs.scores import Calibration, Temperature
from rich.console import Console

from tests.support import reports
from tests.support.pages import Reader, center, html, markdown, shapes


def measured(scale: float, n: int = 800, temperature: float | None = None) -> Calibration:
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((n, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=4)
    result = measure(scale * logits, labels, Softmax(), temperature)
    assert result is not None
    return result


def with_calibration(temperature: float | None = None) -> Report:
    report = reports.full()
    assert report.teacher and report.student and report.student_int8
    scale = 2.0 if temperature is None else 2.0 / temperature
    student = report.student.model_copy(update={"calibration": measured(scale, temperature=temperature)})
    int8 = measured(scale * 1.02, temperature=temperature)
    fit = None
    if temperature is not None:
        fit = Temperature(value=temperature, low=1.8, high=2.2, n=341, nll_before=0.9, nll_after=0.8)
    return report.model_copy(
        update={
            "teacher": report.teacher.model_copy(update={"calibration": measured(1.0)}),
            "student": student,
            "student_int8": report.student_int8.model_copy(update={"calibration": int8}),
            "temperature": fit,
        }
    )


def test_html_and_markdown_have_the_figures_of_each_network() -> None:
    report = with_calibration(2.0)
    assert report.student_int8 and report.student_int8.calibration
    assert report.student_int8.calibration.before
    ece, before = report.student_int8.calibration.ece, report.student_int8.calibration.before.ece
    for page in (html(report), markdown(report)):
        assert "Calibration" in page and f"{ece:.1f} %" in page and f"{before:.1f} %" in page
        assert "Student int8, no temperature scaling" in page
        assert "temperature of 2.00, fitted on 341 validation images (95 % interval 1.80–2.20)" in page
        assert "is a bootstrap over images" in page


def test_diagrams_have_descriptions_and_a_link() -> None:
    reader = Reader(html(with_calibration(2.0)))
    assert reader.ids().count("calibration") == 1
    assert ("a", "href", "#calibration") in reader.attributes
    described = [
        str(value)
        for tag, name, value in reader.attributes
        if (tag, name) == ("svg", "aria-label") and "Reliability" in str(value)
    ]
    assert len(described) == 3 and all("accuracy" in text for text in described)
    assert "None" not in " ".join(reader.words)


def test_report_without_calibration_has_no_section() -> None:
    for report in (reports.full(), reports.bare(), reports.teacher_only()):
        assert calibration.section(report).is_empty and calibration.terminal_line(report) is None
        assert 'id="calibration"' not in html(report)
        assert "## Calibration" not in markdown(report)


def test_verdict_depends_on_the_interval_of_the_gap() -> None:
    [teacher, *_] = compared_networks(reports.full())
    bold, shy, fair = measured(2.0), measured(0.4), measured(1.0)
    assert calibration.describe(teacher, bold) == (
        f"Teacher: mean confidence {bold.confidence:.1f} %, accuracy {bold.accuracy:.1f} %, "
        f"overconfident by {bold.confidence - bold.accuracy:.1f} points."
    )
    assert "underconfident by" in calibration.describe(teacher, shy)
    assert "no significant difference on 800 images" in calibration.describe(teacher, fair)


def test_dots_are_at_mean_confidence_and_accuracy() -> None:
    report = with_calibration()
    [_, _, chart] = calibration.section(report).figures
    assert isinstance(chart, Chart)
    assert report.student_int8 and report.student_int8.calibration
    bins = [part for part in report.student_int8.calibration.bins if part.n]
    dots, bars = shapes(chart, "dot"), shapes(chart, "bar")
    assert len(dots) == len(bars) == len(bins) and not shapes(chart, "ring")
    [diagonal] = shapes(chart, "diagonal")
    x0, y0, x1, y1 = (float(c) for c in diagonal.attributes["d"].replace("M", "").replace("L", "").split())
    for dot, whisker, part in zip(dots, shapes(chart, "whisker"), bins, strict=True):
        assert part.confidence is not None and part.accuracy is not None
        x, y = center(dot)
        assert (x - x0) / (x1 - x0) == pytest.approx(part.confidence / 100, abs=0.002)
        assert (y - y0) / (y1 - y0) == pytest.approx(part.accuracy / 100, abs=0.002)
        _, _, low, _, high = whisker.attributes["d"].split()
        assert float(high) <= y <= float(low)
    heights = [float(bar.attributes["height"]) for bar in bars]
    assert heights.index(max(heights)) == max(range(len(bins)), key=lambda i: bins[i].n)


def test_terminal_has_one_line() -> None:
    file = io.StringIO()
    show_report(with_calibration(2.0), console=Console(file=file, width=200, color_system=None))
    [line] = [line for line in file.getvalue().splitlines() if line.startswith("ECE: ")]
    assert "teacher " in line and "student int8 " in line and line.count(" → ") == 2 and len(line) <= 80


def test_json_round_trip_preserves_calibration() -> None:
    report = with_calibration(2.0)
    assert Report.model_validate_json(report.model_dump_json()) == report
