import io
from pathlib import Path

from questpress.pipeline.report.terminal import show, table
from questpress.pipeline.runs.results import Report
from rich.console import Console

from tests.support import reports


def printed(report: Report, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table(report))
    return file.getvalue()


def test_the_table_shows_accuracy_size_and_latency_of_the_three_networks_in_80_columns() -> None:
    lines = printed(reports.full(), 80).splitlines()
    assert lines[0].strip() == "mobilenetv2_100 distilled from resnet34"
    assert " ".join(lines[2].split()) == "Teacher 87.7 % 84.0–90.6 % 85.1 MB 12.4 ms 6.71 ms"
    assert " ".join(lines[4].split()) == "Student int8 84.8 % 80.9–88.1 % 2.55 MB 0.684 ms 0.489 ms"
    assert len(lines) == 5


def test_the_table_of_a_run_under_way_has_dashes() -> None:
    assert "–" in printed(reports.teacher_only())
    assert printed(reports.bare()).strip()


def test_names_are_not_taken_for_markup() -> None:
    report = reports.full()
    assert report.student is not None
    report.student.name = "[red]net[/red]"
    assert "[red]net[/red]" in printed(report)


def test_the_run_ends_with_its_notes_and_what_to_open() -> None:
    file = io.StringIO()
    folder = Path("a folder") / ("long" * 40)
    show(reports.full(), folder, Console(file=file, width=60, color_system=None))
    told = file.getvalue()
    assert "Note: The teacher's weights" in told
    assert f"Report:   {folder / 'report.html'}\n" in told
    assert f"Artifact: {folder / 'artifact'}\n" in told


def test_without_a_folder_the_paths_are_those_of_the_options() -> None:
    file = io.StringIO()
    show(reports.full(), console=Console(file=file, width=60, color_system=None))
    assert f"{Path('runs') / 'clothing' / 'report.html'}" in file.getvalue()
