from questpress.pipeline.report import details
from questpress.pipeline.report.render import html

from tests.support import reports


def test_each_figure_names_the_command_that_measures_it_again() -> None:
    report = reports.full()
    report.config |= {"out": "runs/my shop", "data": "photos"}
    commands = [row[1] for row in details.repeat(report).rows]
    assert commands == [
        "compress validate 'runs/my shop'",
        "compress bench 'runs/my shop'",
        "compress export 'runs/my shop'",
        "compress report 'runs/my shop'",
    ]
    assert "compress bench &#39;runs/my shop&#39;" in html(report)


def test_of_a_run_under_way_only_the_report_can_be_made_again() -> None:
    assert [row[1] for row in details.repeat(reports.without("artifact")).rows] == [
        "compress report runs/clothing"
    ]
    assert details.repeat(reports.bare()).rows == []
