"""Accessibility: contrast, structure, descriptions, keyboard."""

import re
from html.parser import HTMLParser
from importlib import resources

import pytest

from tests.support import int8_reports, reports
from tests.support.pages import html, with_words

CSS = (
    resources.files("questpress.pipeline.report")
    .joinpath("templates", "report.css")
    .read_text(encoding="utf-8")
)
LIGHT, DARK = re.findall(r":root \{(.*?)\}", CSS, re.S)
Color = tuple[float, ...]


def colors(theme: str) -> dict[str, Color]:
    values = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", theme))
    return {name: tuple(int(value[i : i + 2], 16) for i in (0, 2, 4)) for name, value in values.items()}


def luminance(color: Color) -> float:
    """WCAG 2's relative luminance of sRGB values 0 to 255."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: Color, second: Color) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def mix(color: Color, fraction: float, other: Color) -> Color:
    return tuple(fraction * a + (1 - fraction) * b for a, b in zip(color, other, strict=True))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("ink", "paper"),
        ("muted", "paper"),
        ("accent", "paper"),
        ("rust", "paper"),
        ("ink", "warning"),
        ("ink", "panel"),
    ],
)
def test_text_has_enough_contrast(theme: str, text: str, on: str) -> None:
    palette = colors(theme)
    assert contrast(palette[text], palette[on]) >= 4.5


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_numbers_in_the_confusion_matrix_have_enough_contrast(theme: str) -> None:
    palette = colors(theme)
    shades = [mix(palette["accent"], 0.45 * percent / 100, palette["panel"]) for percent in range(101)]
    shades += [mix(palette["rust"], 0.1 + 0.4 * percent / 100, palette["panel"]) for percent in range(101)]
    assert "calc(var(--percent) * .45)" in CSS and "calc(10% + var(--percent) * .4)" in CSS
    assert min(contrast(palette["ink"], shade) for shade in shades) >= 4.5


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("mark", ["teacher", "fp32", "accent", "rust", "s0", "s1", "s2", "s3", "s4", "s5"])
def test_marks_and_curves_have_enough_contrast(theme: str, mark: str) -> None:
    palette = colors(theme)
    assert contrast(palette[mark], palette["paper"]) >= 3


def test_print_has_the_light_theme() -> None:
    assert "@media screen and (prefers-color-scheme: dark)" in CSS
    assert CSS.count("prefers-color-scheme: dark") == 1


class Outline(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.tables: list[set[str]] = []
        self.pictures: list[set[str]] = []
        self.cells: list[dict[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "table":
            self.tables.append(set())
        if tag == "caption":
            self.tables[-1].add("caption")
        if tag == "th":
            self.cells.append(dict(attrs))
        if tag == "svg" and ("aria-hidden", "true") not in attrs:
            assert ("role", "img") in attrs and dict(attrs).get("aria-label")
            self.pictures.append(set())
        if tag == "desc":
            self.pictures[-1].add("desc")


PAGES = {
    "full": reports.full(),
    "words": with_words(),
    "int8": int8_reports.with_int8(),
    "bare": reports.bare(),
    "many classes": reports.full([f"class {i}" for i in range(60)]),
}


@pytest.mark.parametrize("name", PAGES)
def test_headings_tables_and_figures_are_well_formed(name: str) -> None:
    outline = Outline(html(PAGES[name]))
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(
        after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False)
    )
    assert all("caption" in table for table in outline.tables)
    assert all(cell.get("scope") in ("row", "col") for cell in outline.cells)
    assert all(picture == {"desc"} for picture in outline.pictures)


def test_page_can_be_used_with_a_keyboard() -> None:
    page = html(reports.full())
    body = page.split("<body>")[1]
    first = re.search(r"<a [^>]*>", body)
    assert first is not None and 'class="skip"' in first[0]
    target = re.search(r'href="#([\w-]+)"', first[0])
    assert target is not None and f'id="{target[1]}"' in page
    # What scrolls can be reached, and what has the focus is seen.
    assert all('tabindex="0"' in frame for frame in re.findall(r'<div class="scroll"[^>]*>', page))
    assert ":focus-visible { outline: 2px" in CSS and "outline: none" not in CSS and "outline: 0" not in CSS


def test_predictions_are_marked_by_sign_and_label() -> None:
    page = html(reports.full())
    assert 'aria-label="wrong">✗' in page and 'aria-label="correct">✓' in page
