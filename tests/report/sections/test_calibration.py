"""Calibration in the report: the diagrams' places, the sentence that reads them, the table, the terminal."""

import io

import numpy as np
import pytest
from questpress.pipeline.evaluation.calibration import measure
from questpress.pipeline.evaluation.likelihood import Softmax
from questpress.pipeline.report.sections import calibration
from questpress.pipeline.report.networks import compared
from questpress.pipeline.report.terminal import show_report
from tests.support.pages import html, markdown
from questpress.pipeline.runs.results import Report
from questpress.pipeline.runs.scores import Calibration, Temperature
from rich.console import Console

from tests.support.pages import Reader
from tests.support import reports


def measured(scale: float, n: int = 800, temperature: float | None = None) -> Calibration:
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((n, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=4)
    found = measure(scale * logits, labels, Softmax(), temperature)
    assert found is not None
    return found


def with_calibration(temperature: float | None = None) -> Report:
    report = reports.full()
    assert report.teacher and report.student and report.student_int8
    scale = 2.0 if temperature is None else 2.0 / temperature
    return report.model_copy(
        update={
            "teacher": report.teacher.model_copy(update={"calibration": measured(1.0)}),
            "student": report.student.model_copy(
                update={"calibration": measured(scale, temperature=temperature)}
            ),
            "student_int8": report.student_int8.model_copy(
                update={"calibration": measured(scale * 1.02, temperature=temperature)}
            ),
            "temperature": None
            if temperature is None
            else Temperature(value=temperature, low=1.8, high=2.2, n=341, nll_before=0.9, nll_after=0.8),
        }
    )


def test_section_stands_in_html_and_markdown_with_every_networks_figures():
    report = with_calibration(2.0)
    page, text = html(report), markdown(report)
    assert report.student_int8 and report.student_int8.calibration
    ece = f"{report.student_int8.calibration.ece:.1f} %"
    assert report.student_int8.calibration.before
    before = f"{report.student_int8.calibration.before.ece:.1f} %"
    for one in (page, text):
        assert "Calibration" in one and ece in one and before in one
        assert "Student int8, without temperature" in one
        assert "temperature of 2.00, fitted on 341 val images (95 % interval 1.80–2.20)" in one
        assert "is a bootstrap over the images" in one


def test_every_diagram_has_words_and_a_link_leads_to_the_section():
    read = Reader(html(with_calibration(2.0)))
    assert read.ids().count("calibration") == 1
    assert ("a", "href", "#calibration") in read.attributes
    told = [v for t, name, v in read.attributes if t == "svg" and name == "aria-label" and "Reliab" in str(v)]
    assert len(told) == 3 and all("right" in str(one) for one in told)
    assert "None" not in " ".join(read.words)


def test_without_calibration_there_is_no_section():
    for report in (reports.full(), reports.bare(), reports.teacher_only()):
        assert calibration.section(report).diagrams == [] and calibration.line(report) is None
        assert 'id="calibration"' not in html(report)
        assert "## Calibration" not in markdown(report)


def test_network_is_said_to_be_over_confident_under_confident_or_honest_as_far_as_one_can_tell():
    [teacher, *_] = compared(reports.full())
    bold, shy, fair = measured(2.0), measured(0.4), measured(1.0)
    told = calibration.reading(teacher, bold)
    assert told == (
        f"The teacher’s predictions have a mean probability of {bold.confidence:.1f} %, and "
        f"{bold.accuracy:.1f} % are correct: over-confident by {bold.confidence - bold.accuracy:.1f} points."
    )
    assert "under-confident by" in calibration.reading(teacher, shy)
    assert "honest on average, as far as 800 images can tell" in calibration.reading(teacher, fair)


def test_dots_lie_where_confidence_and_accuracy_put_them():
    [_, _, chart] = calibration.section(with_calibration()).diagrams
    report = with_calibration()
    assert report.student_int8 and report.student_int8.calibration
    bins = [one for one in report.student_int8.calibration.bins if one.n]
    assert len(chart.dots) == len(bins) == len(chart.pillars) and chart.before == []
    for dot, one in zip(chart.dots, bins, strict=True):
        assert one.confidence is not None and one.accuracy is not None
        (x0, y0, x1, y1) = chart.diagonal
        assert (dot.x - x0) / (x1 - x0) == pytest.approx(one.confidence / 100, abs=0.002)
        assert (dot.y - y0) / (y1 - y0) == pytest.approx(one.accuracy / 100, abs=0.002)
        assert dot.high <= dot.y <= dot.low
    tall = max(chart.pillars, key=lambda pillar: pillar.height)
    assert chart.pillars.index(tall) == max(range(len(bins)), key=lambda i: bins[i].n)


def test_terminal_has_a_line_of_it():
    file = io.StringIO()
    show_report(with_calibration(2.0), console=Console(file=file, width=200, color_system=None))
    [line] = [one for one in file.getvalue().splitlines() if one.startswith("ECE: ")]
    assert "teacher " in line and "student int8 " in line and line.count(" → ") == 2 and len(line) <= 80


def test_json_gives_it_back():
    report = with_calibration(2.0)
    assert Report.model_validate_json(report.model_dump_json()) == report
