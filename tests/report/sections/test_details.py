from questpress.pipeline.report.sections import details

from tests.support import reports
from tests.support.pages import html


def test_commands_repeat_each_part_of_the_run() -> None:
    report = reports.full()
    report.config |= {"out": "runs/my shop", "data": "photos"}
    commands = [row[1] for row in details.commands(report).rows]
    assert commands == [
        "compress validate 'runs/my shop'",
        "compress bench 'runs/my shop'",
        "compress export 'runs/my shop'",
        "compress report 'runs/my shop'",
    ]
    assert "compress bench &#39;runs/my shop&#39;" in html(report)


def test_unfinished_run_has_only_the_report_command() -> None:
    [[_, command]] = details.commands(reports.without("artifact")).rows
    assert command == "compress report runs/clothing"
    assert details.commands(reports.bare()).rows == []
