"""Training cost, cached teacher outputs and visual words in the report."""

from questpress.pipeline.report.charts import Chart
from questpress.pipeline.report.sections import training
from questpress.pipeline.runs.results import Epoch, Report, ShownWord, TeacherCacheUse

from tests.support import reports
from tests.support.pages import html, markdown, with_words


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


def test_text_has_word_frequency_and_unused_words() -> None:
    [text] = training.vocabulary_section(with_words()).text
    assert "3 words are never the nearest word; the most frequent word is the nearest of 7.2 %" in text
    assert "No word is unused" in training.vocabulary_section(with_words(dead=0)).text[0]


def test_patches_have_descriptions() -> None:
    page = html(with_words())
    assert 'aria-label="Word 1 of 704 by frequency: 6 nearest patches"' in page
    assert 'aria-label="Word 351 of 704 by frequency: 2 nearest patches"' in page
    assert page.count('alt="" width="48"') == 8
    assert "27 × 27 pixels around a position of the feature map, from 256 images" in page


def test_patch_that_is_not_a_png_is_left_out() -> None:
    bad = with_words(shown=[ShownWord(rank=1, share=1.0, patches=['"><script>', reports.png(1)])])
    [patches] = [
        figure for figure in training.vocabulary_section(bad).figures if isinstance(figure, training.Patches)
    ]
    assert len(patches.words[0].patches) == 1
    assert "<script" not in html(bad)


def test_word_frequency_is_a_curve_over_ranks() -> None:
    [chart] = [
        f
        for f in training.vocabulary_section(with_words()).figures
        if isinstance(f, Chart) and "Word freq" in f.title
    ]
    assert "from 2,000 to 0" in chart.description
    assert "Word frequency by rank of the word" in markdown(with_words())


def test_vocabulary_without_frequencies_is_a_table() -> None:
    vocabulary = training.vocabulary_section(reports.full())
    assert not any("Word freq" in str(figure) for figure in vocabulary.figures)
    assert vocabulary.tables[0].rows
    assert 'class="patches"' not in html(reports.full())
