"""Training cost and cached teacher outputs in the report."""

from questpress.pipeline.report.sections import training
from questpress.pipeline.runs.results import Epoch, Report, TeacherCacheUse

from tests.support import reports
from tests.support.pages import html, markdown


def epoch(stage: str, number: int, images_per_second: float = 100.0, **more: object) -> Epoch:
    return Epoch.model_validate(
        {"stage": stage, "epoch": number, "epochs": 3, "images_per_second": images_per_second,
         "learning_rate": 0.1, "losses": {"loss": 1.0}, **more}
    )  # fmt: skip


def report(*epochs: Epoch) -> Report:
    return reports.bare().model_copy(update={"epochs": list(epochs)})


def test_cost_is_the_median_over_epochs_and_phases_are_weighted_by_time() -> None:
    early, late = {"data": 0.4, "student": 0.6}, {"data": 0.0, "teacher": 0.4, "student": 0.6}
    table = training.cost_table(
        report(
            epoch("teacher", 1, 900, peak_memory_bytes=2_000_000_000),
            epoch("student", 1, 10, seconds=30, mfu=0.1, peak_memory_bytes=10**9, time_fractions=early),
            epoch(
                "student", 2, 1234, seconds=10, mfu=0.31, peak_memory_bytes=1_500_000_000, time_fractions=late
            ),
            epoch(
                "student", 3, 1300, seconds=10, mfu=0.33, peak_memory_bytes=1_500_000_000, time_fractions=late
            ),
        )
    )
    assert table.columns == ["stage", "images/s", "time per epoch", "peak memory", "time by phase", "MFU"]
    # Data took 0.4 × 30 of 50 seconds, the teacher 0.4 × 20 of 50.
    phases = "data 24.0 %, trained network 60.0 %, teacher 16.0 %"
    assert table.rows == [
        ["teacher", "900", "–", "2,000 MB", "–", "–"],
        ["student", "1,234", "10.0 s", "1,500 MB", phases, "31.0 %"],
    ]
    assert "FLOPs utilization" in table.note


def test_cost_without_a_value_has_no_column() -> None:
    table = training.cost_table(report(epoch("teacher", 1), epoch("student", 1, float("inf"))))
    assert table.columns == ["stage", "images/s"]
    assert table.rows == [["teacher", "100"], ["student", "–"]]
    assert training.cost_table(report()).rows == []


def test_cost_is_in_html_and_markdown() -> None:
    for page in (html(reports.full()), markdown(reports.full())):
        assert "Training cost" in page and "1,840 MB" in page
        assert "data 8.0 %, teacher 32.0 %, trained network 60.0 %" in page


def test_cached_teacher_outputs_are_listed() -> None:
    use = TeacherCacheUse(views=50, complete=True, bytes_per_view=16_512_000, lost_mass=0.0143, computed=7)
    table = training.cache_table(reports.bare().model_copy(update={"teacher_cache": use}))
    assert table.rows == [
        ["views per image", "50 (all possible views)"],
        ["size of one view of all images", "16.5 MB"],
        ["size of all views", "826 MB"],
        ["views computed in this run", "7"],
        ["probability mass of p_T not cached", "1.43 %"],
    ]
    plain = TeacherCacheUse(views=3, complete=False, bytes_per_view=600, computed=0)
    table = training.cache_table(reports.bare().model_copy(update={"teacher_cache": plain}))
    assert table.rows[0] == ["views per image", "3"]
    assert training.cache_table(reports.bare()).rows == []
