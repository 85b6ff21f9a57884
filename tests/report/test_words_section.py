from questpress.pipeline.report.sections.vocabulary import section
from questpress.pipeline.report.render import html, markdown
from questpress.pipeline.runs.results import ShownWord

from tests.support import reports


def with_words(**more: object):
    report = reports.full()
    patches = [reports.png(i, 48) for i in range(6)]
    facts = {
        "usage": [(1, 2000), (2, 900), (704, 0)],
        "dead": 3,
        "shown": [
            ShownWord(rank=1, share=7.24, patches=patches),
            ShownWord(rank=351, share=0.1, patches=patches[:2]),
        ],
        "patch": 27,
        "seen": 256,
    }  # fmt: skip
    return report.model_copy(update={"words": [report.words[0].model_copy(update=facts | more)]})


def test_the_words_are_told_with_their_use_and_the_dead_ones() -> None:
    told = section(with_words()).text
    assert "3 words are no feature’s nearest; the most used one is that of 7.2 % of the features." in told
    assert "Every word is some feature’s nearest" in section(with_words(dead=0)).text


def test_patches_are_shown_with_words_for_those_who_cannot_see_them() -> None:
    page = html(with_words())
    assert 'aria-label="Word 1 of 704 by use: the 6 patches of images nearest to it"' in page
    assert 'aria-label="Word 351 of 704 by use: the 2 patches of images nearest to it"' in page
    assert page.count('alt="" width="48"') == 8
    assert "27 × 27 pixels around a position of the map, looked for in 256 images" in page


def test_a_patch_that_is_no_png_is_left_out() -> None:
    bad = [ShownWord(rank=1, share=1.0, patches=['"><script>', reports.png(1)])]
    assert len(section(with_words(shown=bad)).shown[0].patches) == 1
    assert "<script" not in html(with_words(shown=bad))


def test_usage_is_a_curve_over_the_words() -> None:
    [chart] = section(with_words()).usage
    assert chart.x_name == "word, the most used first"
    assert "from 2,000 to 0" in chart.description
    assert "Usage of the words by word, the most used first" in markdown(with_words())


def test_a_run_of_an_older_version_shows_its_vocabulary_alone() -> None:
    found = section(reports.full())
    assert (found.usage, found.shown) == ([], []) and found.table.rows
    assert 'class="patches"' not in html(reports.full())
