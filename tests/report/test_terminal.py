import io
from pathlib import Path

import pytest
from questpress.export.results import Result
from questpress.pipeline.report.terminal import report_table, show_report
from questpress.pipeline.runs.results import Report
from rich.console import Console

from tests.support import bench_reports, comparisons, reports


def printed(report: Report, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(report_table(report).to_rich())
    return file.getvalue()


def test_table_fits_80_columns() -> None:
    lines = printed(reports.full(), 80).splitlines()
    assert lines[0].strip() == "mobilenetv2_100 distilled from resnet34"
    assert " ".join(lines[2].split()) == "Teacher 87.7 % 84.0–90.6 % 85.1 MB 12.4 ms 6.71 ms"
    assert " ".join(lines[4].split()) == "Student int8 84.8 % 80.9–88.1 % 2.55 MB 0.684 ms 0.489 ms"
    assert len(lines) == 5


def test_disturbed_bench_shows_processor_time_on_one_thread_only() -> None:
    lines = printed(bench_reports.disturbed()).splitlines()
    assert "1 thread, processor time" in " ".join(lines[1].split())
    assert " ".join(lines[-1].split()).endswith("2.55 MB 0.684 ms –")


def test_table_of_an_unfinished_run_has_dashes() -> None:
    assert "–" in printed(reports.teacher_only())
    assert printed(reports.bare()).strip()


def test_names_are_not_interpreted_as_markup() -> None:
    report = reports.full()
    assert report.student is not None
    report.student.name = "[red]net[/red]"
    assert "[red]net[/red]" in printed(report)


def test_run_ends_with_warnings_and_paths_in_one_line() -> None:
    file = io.StringIO()
    folder = Path("a folder") / ("long" * 40)
    show_report(reports.full(), folder, Console(file=file, width=60, color_system=None))
    assert "Warning: The teacher's weights" in file.getvalue()
    assert f"Report:   {folder / 'report.html'}\n" in file.getvalue()
    assert f"Artifact: {folder / 'artifact'}\n" in file.getvalue()


def test_paths_without_a_folder_are_those_of_the_options() -> None:
    file = io.StringIO()
    show_report(reports.full(), console=Console(file=file, width=60, color_system=None))
    assert f"{Path('runs') / 'clothing' / 'report.html'}" in file.getvalue()


def test_narrow_terminal_keeps_the_names_of_rows() -> None:
    shown = " ".join(printed(reports.full(), 40).split())
    assert "Teacher: accuracy 87.7 %; 95 % interval 84.0–90.6 %; size 85.1 MB; 1 thread 12.4 ms" in shown
    assert "Student int8: accuracy 84.8 %;" in shown


@pytest.mark.parametrize(
    ("result", "content"),
    [
        (reports.full(), "Student int8    84.8 %    80.9–88.1 %  2.55 MB"),
        (reports.bare(), "mobilenetv2 from resnet34"),
        (comparisons.comparison(), "Most accurate: "),
        (comparisons.validation(), "Correct images 80 of 105"),
        (bench_reports.bench(), "Latency in ms, batch size 1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_results_are_tables_in_a_notebook(result: Result, content: str) -> None:
    assert repr(result) == str(result) and content in repr(result)
    assert len(repr(result)) < 4000 and "\x1b" not in repr(result)
    html = result._repr_html_()
    assert html is not None and html.startswith("<pre>") and content in html


def test_parts_of_a_result_have_the_usual_repr() -> None:
    teacher = reports.full().teacher
    assert teacher is not None and repr(teacher).startswith("Subject(name='resnet34'")
    assert teacher._repr_html_() is None
