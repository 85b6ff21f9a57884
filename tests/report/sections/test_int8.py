"""Int8 in the report: every candidate in plot and table, the first line where fp32 ships, recovery."""

import io
import re
from math import inf

import pytest
from questpress.pipeline.report import summary
from questpress.pipeline.report.sections import int8
from questpress.pipeline.report.pages.run import page
from questpress.pipeline.report.scatter import Scatter
from questpress.pipeline.report.terminal import show_report
from tests.support.pages import html, markdown
from questpress.pipeline.runs.results import Report
from rich.console import Console

from tests.support.pages import Reader
from tests.support import int8_reports, reports


def printed(report: Report) -> str:
    file = io.StringIO()
    show_report(report, console=Console(file=file, width=300, color_system=None))
    return file.getvalue()


def drawn(report: Report) -> Scatter:
    chart = int8.section(report).targets[0].chart
    assert chart is not None
    return chart


def test_table_has_every_candidate_in_the_order_they_were_tried() -> None:
    table = int8.section(int8_reports.with_int8()).targets[0].tried
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["candidate"] for row in rows] == [
        "fp32", "minmax", "entropy", "entropy, biases corrected", "percentile",
    ]  # fmt: skip
    assert [row["result"] for row in rows] == ["–", "refused", "refused", "ships", "holds"]
    assert (rows[0]["accuracy"], rows[0]["1 thread"], rows[0]["file"]) == ("90.0 %", "1.31 ms", "8.94 MB")
    assert rows[3] == {
        "no.": "3",
        "candidate": "entropy, biases corrected",
        "result": "ships",
        "calibration": "entropy",
        "also": "biases corrected",
        "kept float": "–",
        "accuracy": "89.8 %",
        "against fp32": "−0.2 points",
        "McNemar’s p": "0.50",
        "SQNR": "23.5 dB",
        "1 thread": "0.684 ms",
        "of fp32’s speed": "1.92× (1.89–1.95×)",
        "file": "2.55 MB",
    }
    assert rows[4]["kept float"] == "2" and rows[4]["against fp32"] == "+0.0 points"
    assert table.left == 5


def test_what_no_candidate_has_is_no_column() -> None:
    columns = int8.section(int8_reports.with_int8()).targets[1].tried.columns
    assert {"kept float", "also", "1 thread", "of fp32’s speed"}.isdisjoint(columns)
    report = int8_reports.with_int8()
    bare = [one.model_copy(update={"p": None}) for one in report.int8[0].tried]
    table = int8.tried(report, report.int8[0].model_copy(update={"tried": bare}))
    assert "McNemar’s p" not in table.columns and "McNemar" not in table.note
    assert "SQNR" in columns


def test_point_lies_where_its_latency_and_accuracy_put_it() -> None:
    chart = drawn(int8_reports.with_int8())
    points = {point.text.split(":")[0]: point for one in chart.series for point in one.points}
    assert set(points) == {"fp32", "1 minmax", "2 entropy", "3 entropy, biases corrected", "4 percentile"}
    fp32, minmax, islands = points["fp32"], points["1 minmax"], points["4 percentile"]
    left = next(tick.position for tick in chart.x_ticks if tick.text == "0")
    assert (minmax.x - left) / (fp32.x - left) == pytest.approx(0.671 / 1.31, abs=0.003)
    assert islands.y == fp32.y < minmax.y
    percent = {float(tick.text): tick.position for tick in chart.y_ticks}
    (top, high), (bottom, low) = max(percent.items()), min(percent.items())
    assert (minmax.y - high) / (low - high) == pytest.approx((top - 87.75) / (top - bottom), abs=0.003)
    assert {one.key: len(one.points) for one in chart.series} == {
        "student": 1, "refused": 2, "holds": 1, "student_int8": 1,
    }  # fmt: skip
    assert chart.series[-1].label == "ships: entropy, biases corrected"


def test_lines_show_fp32_and_the_budget_below_it() -> None:
    chart = drawn(int8_reports.with_int8())
    fp32, budget = chart.levels
    assert (fp32.label, budget.label) == ("fp32 90.0 %", "budget 89.5 %")
    assert fp32.y == next(point.y for one in chart.series for point in one.points if point.label == "fp32")
    assert budget.y > fp32.y and "line: budget 89.5 %" in chart.description


def test_budget_of_nothing_is_one_line() -> None:
    report = int8_reports.with_int8()
    strict = report.int8[0].model_copy(update={"max_drop": 0.0})
    (line,) = drawn(report.model_copy(update={"int8": [strict]})).levels
    assert line.label == "fp32: no less is allowed"


def test_points_that_lie_together_share_one_label() -> None:
    near = [int8_reports.tried("minmax", 0, p50=0.70), int8_reports.tried("entropy", 0, p50=0.71)]
    far = int8_reports.tried("percentile", 9, p50=0.70)
    chart = drawn(
        reports.full().model_copy(update={"int8": [int8_reports.searched("x86-vnni", [*near, far])]})
    )
    labels = {point.text.split(":")[0]: point.label for one in chart.series for point in one.points}
    assert labels == {"fp32": "fp32", "1 minmax": "", "2 entropy": "1, 2", "3 percentile": "3"}


def test_target_of_other_processors_has_a_table_and_no_plot() -> None:
    here, there = int8.section(int8_reports.with_int8()).targets
    assert here.chart is not None and there.chart is None and len(there.tried.rows) == 2
    assert "artifact/student.int8.arm64.onnx has 80.9 % (76.6–84.5 %) of 371 test images, fp32" in there.text
    assert "unknown: made for arm64, and this machine is x86-vnni: it cannot be timed here." in there.text
    for told in (html(int8_reports.with_int8()), markdown(int8_reports.with_int8())):
        assert "For arm64" in told and "student.int8.arm64.onnx has 80.9 %" in told


def test_text_says_how_the_candidates_fared() -> None:
    first = int8.section(int8_reports.with_int8()).targets[0].text
    assert first.startswith(
        "Of 4 candidates 2 keep within 0.5 points of fp32’s accuracy on 400 val images; "
        "the most accurate of them ships: entropy, biases corrected, −0.2 points."
    )
    assert "A larger loss is not refused" not in first
    second = int8.section(int8_reports.with_int8()).targets[1].text
    assert second.startswith(
        "The only candidate keeps within 0.5 points of fp32’s accuracy on 400 val images; "
        "it ships: minmax, +0.0 points."
    )
    both = int8.section(int8_reports.with_recovery()).targets[0].text
    assert both.startswith("Both candidates keep within 0.5 points of fp32’s accuracy on 400 val images;")
    report = int8_reports.with_int8()
    few = report.int8[0].model_copy(update={"max_drop": 0.1})
    told = int8.section(report.model_copy(update={"int8": [few]})).targets[0].text
    assert "A larger loss is not refused where it is of one or two images." in told


def test_float_nodes_and_the_worst_roundings_are_folded() -> None:
    page_, text = html(int8_reports.with_int8()), markdown(int8_reports.with_int8())
    for told in (page_, text):
        assert "What still runs in float, x86-vnni" in told and "Roundings that cost most, x86-vnni" in told
    folded = re.findall(r"<details.*?</details>", page_, re.DOTALL)
    assert any("<code>conv_1</code>" in one and "kept in float for accuracy" in one for one in folded)
    assert any("<code>features.17.conv</code>" in one and "14.2 dB" in one for one in folded)


def test_plot_has_words_and_a_link_leads_to_the_section() -> None:
    read = Reader(html(int8_reports.with_int8()))
    assert read.ids().count("int8") == 1 and ("a", "href", "#int8") in read.attributes
    [told] = [
        value
        for tag, name, value in read.attributes
        if (tag, name) == ("svg", "aria-label") and "minmax" in str(value)
    ]
    assert "1 minmax: 87.8 % at 0.671 ms" in str(told) and "ships: entropy, biases corrected: 3" in str(told)


def test_without_a_search_there_is_no_section() -> None:
    for report in (reports.full(), reports.bare(), reports.teacher_only()):
        assert int8.section(report).targets == [] and 'id="int8"' not in html(report)
        assert "## Int8" not in markdown(report)


FIRST_LINE = (
    "The fp32 file ships: of 2 int8 candidates for x86-vnni none keeps within 0.5 points of fp32’s accuracy "
    "on 400 val images; the best, entropy, loses 1.8 points."
)


def test_where_no_candidate_holds_the_first_line_says_that_the_fp32_file_ships() -> None:
    report = int8_reports.without_int8_file()
    assert summary.lead(report).startswith(f"{FIRST_LINE} Method quest on clothing")
    assert markdown(report).split("\n\n")[1].startswith(FIRST_LINE)
    assert html(report).split('<p class="lead">')[1].startswith(FIRST_LINE)
    assert printed(report).startswith(FIRST_LINE)
    assert "The int8 file ships" not in markdown(report)


def test_then_the_key_figures_are_those_of_the_fp32_file() -> None:
    report = int8_reports.without_int8_file()
    assert report.student is not None and report.student.score is not None
    smaller, faster, accurate = summary.key_figures(report)
    assert (smaller.value, smaller.meaning) == ("9.52×", "smaller than the teacher")
    assert smaller.lines == ["8.94 MB instead of 85.1 MB"]
    assert (faster.value, faster.meaning) == ("9.49×", "faster than the teacher, 1 thread")
    assert accurate.value == f"{report.student.score.percent:.1f} %"
    assert accurate.meaning == "accuracy of the student fp32 file"
    assert summary.list_missing(report) == []
    table = int8.section(report).targets[0].tried
    results = [row[table.columns.index("result")] for row in table.rows]
    assert results == ["ships", "refused", "refused"]
    assert "no int8 file ships for x86-vnni." in int8.section(report).targets[0].text


def test_second_target_without_a_file_is_a_note() -> None:
    report = int8_reports.with_int8()
    lost = report.int8[1].model_copy(
        update={"file": None, "tried": [int8_reports.tried("minmax", 6, p50=None)], "test_score": None}
    )
    notes = summary.notes(report.model_copy(update={"int8": [report.int8[0], lost]}))
    assert (
        "No int8 file for arm64: of 1 int8 candidate for arm64 none keeps within 0.5 points of fp32’s "
        "accuracy on 400 val images; the best, minmax, loses 1.5 points."
    ) in notes
    assert not summary.lead(report).startswith("The fp32")


def test_why_int8_is_not_faster_is_a_note_on_the_first_screen() -> None:
    report = int8_reports.with_int8()
    slow = report.int8[0].model_copy(update={"slow": "int8 is not faster than fp32 here: no dot product."})
    report = report.model_copy(update={"int8": [slow]})
    assert "Int8 is not faster than fp32 here: no dot product." in summary.notes(report)
    assert "> **Please note:** Int8 is not faster than fp32 here: no dot product." in markdown(report)
    assert "<li>Int8 is not faster than fp32 here: no dot product.</li>" in html(report)
    assert "Note: Int8 is not faster than fp32 here: no dot product." in printed(report)


def test_default_target_of_other_processors_has_no_latency_and_says_why() -> None:
    report = int8_reports.with_int8()
    assert report.student_int8 is not None
    untimed = report.student_int8.model_copy(update={"latency_ms": {}, "speedups": []})
    report = report.model_copy(update={"int8": report.int8[1:], "student_int8": untimed})
    _, faster, _ = summary.key_figures(report)
    assert not faster.known and faster.lines == [report.int8[0].not_timed]


def test_recovery_compares_training_with_the_file_on_the_same_images() -> None:
    report = int8_reports.with_recovery()
    assert report.student_int8 is not None and report.student_int8.score is not None
    top1, n = report.student_int8.score.percent, report.student_int8.score.n
    section = int8.section(report)
    assert section.recovery.rows == [
        ["val", "400", "90.5 %", "89.8 %", "−0.8 points"],
        ["test", f"{n}", "84.0 %", f"{top1:.1f} %", f"+{top1 - 84:.1f} points"],
    ]
    assert section.recovery_text.startswith("With --qat the student learned on for 4 epochs")
    assert section.recovery_text.endswith("It ships.")
    for told in (html(report), markdown(report)):
        assert "Recovery" in told and "−0.8 points" in told


def test_recovery_does_not_compare_another_candidates_test_accuracy() -> None:
    section = int8.section(int8_reports.with_recovery(learned_ships=False))
    assert section.recovery.rows[1][3:] == ["–", "–"]
    assert "Another candidate ships, minmax, so on the test images" in section.recovery_text


def test_recovery_alone_is_shown_as_far_as_it_is_known() -> None:
    report = reports.bare().model_copy(update={"recovery": int8_reports.with_recovery().recovery})
    assert int8.section(report).recovery.rows == [
        ["val", "–", "90.5 %", "–", "–"],
        ["test", "–", "84.0 %", "–", "–"],
    ]
    assert [id for id, _ in page(report).sections] == ["int8", "details"]


def test_logits_without_any_error_are_said_to_have_none() -> None:
    assert int8.decibels(inf) == "no error" and int8.decibels(-1.06) == "−1.06 dB"
    assert [int8.probability(p) for p in (0.0004, 0.041, 0.5, 1.0)] == ["< 0.001", "0.041", "0.50", "1"]


def test_json_gives_it_back() -> None:
    for report in (int8_reports.with_int8(), int8_reports.with_recovery(), int8_reports.without_int8_file()):
        assert Report.model_validate_json(report.model_dump_json()) == report
