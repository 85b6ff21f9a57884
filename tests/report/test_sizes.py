"""Students of several image sizes in one report, where one of them has no int8 file."""

from questpress.pipeline.report import sizes
from questpress.pipeline.report.render import as_html, as_markdown
from questpress.pipeline.runs.results import Resolutions, Size

from tests.support import reports


def found(*, without: int) -> Resolutions:
    report = reports.full()
    assert report.teacher and report.student and report.student_int8
    int8 = report.student_int8.model_copy(update={"speedups": []})
    return Resolutions(
        title="mobilenetv2_100 from resnet34 at 2 image sizes",
        folder="runs/sizes",
        command="compress resolutions",
        method="quest",
        teacher=report.teacher,
        teacher_image_size=96,
        sizes=[
            Size(
                size=size,
                folder=str(size),
                gmacs=size / 1600,
                student=report.student,
                student_int8=None if size == without else int8,
            )
            for size in (96, 64)
        ],
        threads=[1, 2],
        environment={"cpu": "AMD EPYC", "cores allowed": "2"},
        timed="5fd1",
    )


def test_a_size_without_int8_has_one_row_and_the_page_says_that_its_fp32_file_ships() -> None:
    made = found(without=64)
    assert [row[:2] for row in sizes.table(made).rows] == [
        ["96 px", "int8"], ["96 px", "fp32"], ["64 px", "fp32"], ["teacher, 96 px", "torch"],
    ]  # fmt: skip
    shown = sizes.page(made)
    told = "No int8 file kept within the budget at 64 px: the fp32 file ships there."
    assert told in shown.lead
    assert told in as_html("sizes.html.j2", shown) and told in as_markdown("sizes.md.j2", shown)
    assert "No int8" not in sizes.page(found(without=0)).lead


def test_its_point_in_the_plot_carries_the_size() -> None:
    for chart in sizes.page(found(without=64)).charts:
        labels = {one.key: [point.label for point in one.points] for one in chart.series}
        assert labels == {"student_int8": ["96"], "student": ["", "64"]}
