"""What the details at the end of the page say of the trainings."""

from questpress.pipeline.report import details
from questpress.pipeline.report.render import html, markdown
from questpress.pipeline.runs.results import Epoch, Report, TeacherCacheUse

from tests.support import reports


def epoch(stage: str, number: int, rate: float = 100.0, **more: object) -> Epoch:
    return Epoch.model_validate(
        {"stage": stage, "epoch": number, "epochs": 3, "images_per_second": rate, "learning_rate": 0.1,
         "losses": {"loss": 1.0}, **more}
    )  # fmt: skip


def report(*epochs: Epoch) -> Report:
    return reports.bare().model_copy(update={"epochs": list(epochs)})


def test_each_training_has_its_median_rate_peak_memory_shares_and_utilisation() -> None:
    early, late = {"data": 0.4, "student": 0.6}, {"data": 0.0, "teacher": 0.4, "student": 0.6}
    table = details.training(
        report(
            epoch("teacher", 1, 900, peak_memory_bytes=2_000_000_000),
            epoch("student", 1, 10, seconds=30, mfu=0.1, peak_memory_bytes=10**9, shares=early),
            epoch("student", 2, 1234, seconds=10, mfu=0.31, peak_memory_bytes=1_500_000_000, shares=late),
            epoch("student", 3, 1300, seconds=10, mfu=0.33, peak_memory_bytes=1_500_000_000, shares=late),
        )
    )
    assert table.columns == [
        "", "images/s", "an epoch", "peak memory", "share of the steps", "of the device’s peak",
    ]  # fmt: skip
    # The shares count by time: data 0.4 × 30 of 50 seconds, teacher 0.4 × 20 of 50.
    assert table.rows == [
        ["teacher", "900", "–", "2,000 MB", "–", "–"],
        ["student", "1,234", "10.0 s", "1,500 MB", "data 24.0 %, student 60.0 %, teacher 16.0 %", "31.0 %"],
    ]
    assert "arithmetic" in table.note


def test_what_no_training_knows_is_no_column() -> None:
    table = details.training(report(epoch("teacher", 1), epoch("student", 1, float("inf"))))
    assert table.columns == ["", "images/s"]
    assert table.rows == [["teacher", "100"], ["student", "–"]]
    assert details.training(report()).rows == []


def test_the_cost_of_training_stands_in_html_and_markdown() -> None:
    for page in (html(reports.full()), markdown(reports.full())):
        assert "Cost of training" in page and "1,840 MB" in page
        assert "data 8.0 %, teacher 32.0 %, student 60.0 %" in page


def test_what_was_stored_of_the_teachers_answers_is_told() -> None:
    use = TeacherCacheUse(views=50, complete=True, bytes_per_view=16_512_000, lost_mass=0.0143, computed=7)
    table = details.store(reports.bare().model_copy(update={"teacher_cache": use}))
    assert table.rows == [
        ["views of each image", "50, all there are"],
        ["a view of all images", "16.5 MB"],
        ["all views", "826 MB"],
        ["views that a teacher was asked about", "7"],
        ["share of p_T that is left out", "1.43 %"],
    ]
    plain = TeacherCacheUse(views=3, complete=False, bytes_per_view=600, computed=0)
    assert details.store(reports.bare().model_copy(update={"teacher_cache": plain})).rows[0] == [
        "views of each image",
        "3",
    ]
    assert details.store(reports.bare()).rows == []
