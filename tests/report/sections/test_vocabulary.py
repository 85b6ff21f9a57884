from questpress.pipeline.report.charts import Chart
from questpress.pipeline.report.sections.vocabulary import Patches, section
from questpress.pipeline.runs.results import ShownWord

from tests.support import reports
from tests.support.pages import html, markdown, with_words


def test_text_has_word_frequency_and_unused_words() -> None:
    [text] = section(with_words()).text
    assert "3 words are never the nearest word; the most frequent word is the nearest of 7.2 %" in text
    assert "No word is unused" in section(with_words(dead=0)).text[0]


def test_patches_have_descriptions() -> None:
    page = html(with_words())
    assert 'aria-label="Word 1 of 704 by frequency: 6 nearest patches"' in page
    assert 'aria-label="Word 351 of 704 by frequency: 2 nearest patches"' in page
    assert page.count('alt="" width="48"') == 8
    assert "27 × 27 pixels around a position of the feature map, from 256 images" in page


def test_patch_that_is_not_a_png_is_left_out() -> None:
    bad = with_words(shown=[ShownWord(rank=1, share=1.0, patches=['"><script>', reports.png(1)])])
    [patches] = [figure for figure in section(bad).figures if isinstance(figure, Patches)]
    assert len(patches.words[0].patches) == 1
    assert "<script" not in html(bad)


def test_word_frequency_is_a_curve_over_ranks() -> None:
    [chart] = [f for f in section(with_words()).figures if isinstance(f, Chart) and "Word freq" in f.title]
    assert "from 2,000 to 0" in chart.description
    assert "Word frequency by rank of the word" in markdown(with_words())


def test_vocabulary_without_frequencies_is_a_table() -> None:
    vocabulary = section(reports.full())
    assert not any("Word freq" in str(figure) for figure in vocabulary.figures)
    assert vocabulary.tables[0].rows
    assert 'class="patches"' not in html(reports.full())
