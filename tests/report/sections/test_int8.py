"""Int8 in the report: every candidate in chart and table, the reason if fp32 ships, fine-tuning."""

import io
import re
from math import inf

import pytest
from questpress.pipeline.report import format, summary
from questpress.pipeline.report.charts import Chart
from questpress.pipeline.report.page import Section
from questpress.pipeline.report.run_report import report_page
from questpress.pipeline.report.sections import int8
from questpress.pipeline.report.terminal import show_report
from questpress.pipeline.runs.results import Report
from rich.console import Console

from tests.support import int8_reports, reports
from tests.support.pages import Reader, center, html, markdown, shapes


def printed(report: Report) -> str:
    file = io.StringIO()
    show_report(report, console=Console(file=file, width=300, color_system=None))
    return file.getvalue()


def target(report: Report, i: int = 0) -> Section:
    return int8.section(report).sections[i]


def chart_of(report: Report) -> Chart:
    chart = int8.chart(report, report.int8[0])
    assert chart is not None
    return chart


def places(chart: Chart) -> dict[str, tuple[float, float]]:
    return {dot.tooltip.split(":")[0]: center(dot) for dot in shapes(chart, "dot")}


def test_table_has_candidates_in_the_order_they_were_tried() -> None:
    report = int8_reports.with_int8()
    table = int8.candidates(report, report.int8[0])
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["candidate"] for row in rows] == [
        "fp32", "minmax", "entropy", "entropy, biases corrected", "percentile",
    ]  # fmt: skip
    assert [row["result"] for row in rows] == ["–", "over budget", "over budget", "ships", "within budget"]
    assert (rows[0]["accuracy"], rows[0]["latency"], rows[0]["file"]) == ("90.0 %", "1.31 ms", "8.94 MB")
    assert rows[3] == {
        "no.": "3",
        "candidate": "entropy, biases corrected",
        "result": "ships",
        "calibration": "entropy",
        "corrections": "bias",
        "float nodes": "–",
        "accuracy": "89.8 %",
        "vs. fp32": "−0.2 points",
        "p": "0.500",
        "SQNR": "23.5 dB",
        "latency": "0.684 ms",
        "speedup": "1.92× (1.89–1.95×)",
        "file": "2.55 MB",
    }
    assert rows[4]["float nodes"] == "2" and rows[4]["vs. fp32"] == "+0.0 points"
    assert table.left == 5


def test_column_that_no_candidate_has_is_left_out() -> None:
    report = int8_reports.with_int8()
    columns = int8.candidates(report, report.int8[1]).columns
    assert {"float nodes", "corrections", "latency", "speedup"}.isdisjoint(columns)
    untested = [candidate.model_copy(update={"p": None}) for candidate in report.int8[0].tried]
    table = int8.candidates(report, report.int8[0].model_copy(update={"tried": untested}))
    assert "p" not in table.columns and "McNemar" not in table.note
    assert "SQNR" in table.columns


def test_chart_has_candidates_at_their_latency_and_accuracy() -> None:
    chart = chart_of(int8_reports.with_int8())
    dots = places(chart)
    assert set(dots) == {"fp32", "1 minmax", "2 entropy", "3 entropy, biases corrected", "4 percentile"}
    fp32, minmax, islands = dots["fp32"], dots["1 minmax"], dots["4 percentile"]
    ticks = shapes(chart, "tick")
    left = next(
        float(t.attributes["x"]) for t in ticks if t.text == "0" and t.attributes["text-anchor"] == "middle"
    )
    assert (minmax[0] - left) / (fp32[0] - left) == pytest.approx(0.671 / 1.31, abs=0.003)
    assert islands[1] == fp32[1] < minmax[1]
    percent = {
        float(t.text): float(t.attributes["y"]) - 4
        for t in ticks
        if t.attributes.get("text-anchor") == "end" and re.fullmatch(r"[\d.]+", t.text)
    }
    (top, high), (bottom, low) = max(percent.items()), min(percent.items())
    assert (minmax[1] - high) / (low - high) == pytest.approx((top - 87.75) / (top - bottom), abs=0.003)
    keys = [dot.attributes["class"].split()[1] for dot in shapes(chart, "dot")]
    assert sorted(keys) == ["holds", "refused", "refused", "student", "student_int8"]
    assert chart.legend[-1][1] == "shipped: entropy, biases corrected"


def test_chart_has_levels_of_fp32_and_of_the_budget() -> None:
    chart = chart_of(int8_reports.with_int8())
    fp32, budget = shapes(chart, "level")
    assert [label.text for label in shapes(chart, "tick halo")] == ["fp32 90.0 %", "budget 89.5 %"]
    assert float(fp32.attributes["y1"]) == places(chart)["fp32"][1] < float(budget.attributes["y1"])
    assert "line: budget 89.5 %" in chart.description
    report = int8_reports.with_int8()
    strict = report.int8[0].model_copy(update={"max_drop": 0.0})
    chart = chart_of(report.model_copy(update={"int8": [strict]}))
    assert [label.text for label in shapes(chart, "tick halo")] == ["fp32 90.0 %"]


def test_candidates_near_each_other_all_have_labels() -> None:
    near = [int8_reports.tried("minmax", 0, p50=0.70), int8_reports.tried("entropy", 0, p50=0.71)]
    search = int8_reports.searched("x86-vnni", [*near, int8_reports.tried("percentile", 9, p50=0.70)])
    chart = chart_of(reports.full().model_copy(update={"int8": [search]}))
    assert sorted(label.text for label in shapes(chart, "name")) == ["1", "2", "3", "fp32"]


def test_target_that_cannot_be_timed_has_a_table_and_no_chart() -> None:
    report = int8_reports.with_int8()
    assert any(target(report).figures) and not any(target(report, 1).figures)
    assert len(target(report, 1).tables[0].rows) == 2
    [text] = target(report, 1).text
    assert "artifact/student.int8.arm64.onnx on 371 test images: 80.9 % (76.6–84.5 %), fp32" in text
    assert "Latency not measured: made for arm64, and this machine is x86-vnni" in text
    for page in (html(report), markdown(report)):
        assert "Candidates for arm64" in page and "371 test images: 80.9 %" in page


def test_text_has_the_result_of_the_search() -> None:
    [text] = target(int8_reports.with_int8()).text
    assert text.startswith(
        "2 of 4 candidates are within 0.5 points of the fp32 accuracy on 400 validation images. "
        "The most accurate one ships: entropy, biases corrected, −0.2 points."
    )
    assert "one or two images only" not in text
    [text] = target(int8_reports.with_int8(), 1).text
    assert text.startswith(
        "1 of 1 candidate is within 0.5 points of the fp32 accuracy on 400 validation images."
    )
    assert " It ships: minmax, +0.0 points." in text
    report = int8_reports.with_int8()
    tight = report.int8[0].model_copy(update={"max_drop": 0.1})
    [text] = target(report.model_copy(update={"int8": [tight]})).text
    assert ", or lose one or two images only, which may be chance. " in text


def test_float_nodes_and_sensitive_tensors_are_folded() -> None:
    page, text = html(int8_reports.with_int8()), markdown(int8_reports.with_int8())
    for shown in (page, text):
        assert "Nodes that run in float, x86-vnni" in shown and "Most sensitive tensors, x86-vnni" in shown
    folded = re.findall(r"<details.*?</details>", page, re.DOTALL)
    assert any("<code>conv_1</code>" in part and "kept in float for accuracy" in part for part in folded)
    assert any("<code>features.17.conv</code>" in part and "14.2 dB" in part for part in folded)


def test_chart_has_a_description_and_the_section_a_link() -> None:
    reader = Reader(html(int8_reports.with_int8()))
    assert reader.ids().count("int8") == 1 and ("a", "href", "#int8") in reader.attributes
    described = {v for t, n, v in reader.attributes if (t, n) == ("svg", "aria-label") and "minmax" in str(v)}
    [description] = described
    assert "1 minmax: 87.8 % at 0.671 ms" in str(description)


def test_report_without_a_search_has_no_section() -> None:
    for report in (reports.full(), reports.bare(), reports.teacher_only()):
        assert int8.section(report).is_empty and 'id="int8"' not in html(report)
        assert "## Int8" not in markdown(report)


REASON = (
    "The fp32 file ships: no int8 candidate of 2 for x86-vnni is within 0.5 points of the fp32 accuracy on "
    "400 validation images; the best, entropy, loses 1.8 points."
)


def test_first_sentence_explains_why_fp32_ships() -> None:
    report = int8_reports.without_int8_file()
    assert summary.lead(report).startswith(f"{REASON} Trained with quest on clothing")
    assert markdown(report).split("\n\n")[1].startswith(REASON)
    assert html(report).split('<p class="lead">')[1].startswith(REASON)
    assert printed(report).startswith(REASON)
    assert "The int8 file ships" not in markdown(report)


def test_key_figures_without_an_int8_file_are_those_of_fp32() -> None:
    report = int8_reports.without_int8_file()
    assert report.student is not None and report.student.score is not None
    size, speed, score = summary.key_figures(report)
    assert (size.value, size.meaning) == ("9.52×", "smaller than the teacher")
    assert size.details == ["8.94 MB vs. 85.1 MB"]
    assert (speed.value, speed.meaning) == ("9.49×", "faster than the teacher, 1 thread")
    assert score.value == f"{report.student.score.percent:.1f} %"
    assert score.meaning == "accuracy of the fp32 student"
    assert summary.list_missing(report) == []
    table = int8.candidates(report, report.int8[0])
    results = [row[table.columns.index("result")] for row in table.rows]
    assert results == ["ships", "over budget", "over budget"]
    assert "no int8 file ships for x86-vnni." in target(report).text[0]


def test_second_target_without_a_file_is_a_warning() -> None:
    report = int8_reports.with_int8()
    lost = report.int8[1].model_copy(
        update={"file": None, "tried": [int8_reports.tried("minmax", 6, p50=None)], "test_score": None}
    )
    report = report.model_copy(update={"int8": [report.int8[0], lost]})
    assert (
        "No int8 file for arm64: no int8 candidate of 1 for arm64 is within 0.5 points of the fp32 accuracy "
        "on 400 validation images; the best, minmax, loses 1.5 points."
    ) in summary.warnings(report)
    assert not summary.lead(report).startswith("The fp32")


def test_reason_for_slow_int8_is_on_the_first_screen() -> None:
    report = int8_reports.with_int8()
    slow = report.int8[0].model_copy(update={"slow": "int8 is not faster than fp32 here: no dot product."})
    report = report.model_copy(update={"int8": [slow]})
    warning = "Int8 is not faster than fp32 here: no dot product."
    assert warning in summary.warnings(report)
    assert f"> **Warning:** {warning}" in markdown(report)
    assert f"<li>{warning}</li>" in html(report)
    assert f"Warning: {warning}" in printed(report)


def test_target_of_another_processor_has_no_latency_but_a_reason() -> None:
    report = int8_reports.with_int8()
    assert report.student_int8 is not None
    untimed = report.student_int8.model_copy(update={"latency_ms": {}, "speedups": []})
    report = report.model_copy(update={"int8": report.int8[1:], "student_int8": untimed})
    _, speed, _ = summary.key_figures(report)
    assert not speed.is_known and speed.details == [report.int8[0].not_timed]


def test_qat_compares_fake_quantization_with_the_file_on_the_same_images() -> None:
    report = int8_reports.with_recovery()
    assert report.student_int8 is not None and report.student_int8.score is not None
    percent, n = report.student_int8.score.percent, report.student_int8.score.n
    qat = target(report, -1)
    assert qat.tables[0].rows == [
        ["validation", "400", "90.5 %", "89.8 %", "−0.8 points"],
        ["test", f"{n}", "84.0 %", f"{percent:.1f} %", f"+{percent - 84:.1f} points"],
    ]
    assert qat.text[0].startswith("The student was fine-tuned with fake quantization for 4 epochs.")
    assert qat.text[0].endswith("Its int8 file ships.")
    for page in (html(report), markdown(report)):
        assert "Quantization-aware training" in page and "−0.8 points" in page


def test_qat_does_not_compare_the_test_score_of_another_candidate() -> None:
    qat = target(int8_reports.with_recovery(learned_ships=False), -1)
    assert qat.tables[0].rows[1][3:] == ["–", "–"]
    assert "Another candidate ships (minmax), so the test score" in qat.text[0]


def test_qat_without_a_search_has_the_fake_quantized_scores() -> None:
    report = reports.bare().model_copy(update={"recovery": int8_reports.with_recovery().recovery})
    assert target(report, -1).tables[0].rows == [
        ["validation", "–", "90.5 %", "–", "–"],
        ["test", "–", "84.0 %", "–", "–"],
    ]
    assert [section.id for section in report_page(report).shown_sections] == ["int8", "details"]


def test_sqnr_and_p_values_are_short() -> None:
    assert int8.decibels(inf) == "no error" and int8.decibels(-1.06) == "−1.06 dB"
    assert [format.p_value(p) for p in (0.0004, 0.041, 0.5, 1.0)] == ["< 0.001", "0.041", "0.500", "1.000"]
