"""Tables of text, shown in HTML, in Markdown and in the terminal."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import markupsafe
from markupsafe import Markup
from rich.text import Text

from ...export.text import escape_controls
from ..runs.console import FittingTable
from . import format

_MARKDOWN_SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


PHONE_CHARS, MAX_WORD = 54, 14
"""Characters of a line on a phone, and of a column of text that wraps."""


@dataclass(frozen=True)
class CsvFile:
    """All rows of a table that is cut, unformatted and with a header, as a file next to the page."""

    name: str
    rows: list[list[Any]]


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    code: frozenset[int] = frozenset()
    """Columns of file names, hashes and the like."""
    text: bool = False
    """All columns hold text and are aligned left."""
    left: int = 1
    """Number of columns that are aligned left if the others hold numbers."""
    wide: bool = False
    """The first column stays visible while the others scroll."""
    csv: CsvFile | None = None

    def first(self, n: int, file: str) -> "Table":
        """Return the first ``n`` rows, with a note that ``file`` has all of them."""
        if len(self.rows) <= n:
            return self
        cut = f"The first {n:,} of {len(self.rows):,}; all are in {file}."
        return replace(self, rows=self.rows[:n], note=f"{self.note} {cut}".strip())

    @property
    def is_wide(self) -> bool:
        """True if the table is probably wider than a phone, where long text wraps."""
        longest = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        characters = sum(min(n, MAX_WORD) if self.text else n for n in longest) + 2 * len(longest)
        return len(self.columns) > 4 and characters > PHONE_CHARS

    def to_html(self) -> Markup:
        """Return the table in a frame that scrolls, with its note; nothing without rows."""
        if not self.rows:
            return Markup()
        cells = [
            f'<th scope="col"{self._align(i)}>{html_text(name)}</th>' if name else "<td></td>"
            for i, name in enumerate(self.columns)
        ]
        head = f"<thead><tr>{''.join(cells)}</tr></thead>\n" if any(self.columns) else ""
        lines = []
        for first, *rest in self.rows:
            cells = [f'<th scope="row">{self._html_cell(0, first)}</th>']
            cells += [
                f"<td{self._align(i)}>{self._html_cell(i, text)}</td>" for i, text in enumerate(rest, 1)
            ]
            lines.append(f"<tr>{''.join(cells)}</tr>\n")
        title, css = html_text(self.title), "text" if self.text else "numbers"
        hint = '<p class="note hint">Swipe the table for more columns →</p>\n' if self.is_wide else ""
        link = f' <a href="{self.csv.name}">{self.csv.name}</a>' if self.csv else ""
        note = f'\n<p class="note">{html_text(self.note)}{link}</p>' if self.note else ""
        return Markup(
            f'{hint}<div class="scroll{" wide" if self.wide else ""}" role="region" aria-label="{title}" '
            f'tabindex="0">\n<table class="{css}">\n<caption class="unseen">{title}</caption>\n{head}'
            f"<tbody>\n{''.join(lines)}</tbody>\n</table>\n</div>{note}"
        )

    def _align(self, column: int) -> str:
        return ' class="left"' if column < self.left else ""

    def _html_cell(self, column: int, text: str) -> str:
        return f"<code>{html_text(text)}</code>" if column in self.code else html_text(text)

    def to_markdown(self, max_chars: int | None = None) -> Markup:
        """Return a table of GitHub's Markdown with cells of ``max_chars`` at most; nothing without rows."""
        if not self.rows:
            return Markup()

        def cell(column: int, text: str) -> str:
            if max_chars is not None and len(text) > max_chars:
                text = f"{text[: max_chars - 1]}…"
            # HTML, because backticks can hold neither backticks nor the bar between cells.
            return f"<code>{markdown_text(text)}</code>" if column in self.code else markdown_text(text)

        n = len(self.columns)
        lines = [
            [cell(-1, name) for name in self.columns],
            ["---" if self.text or i < self.left else "---:" for i in range(n)],
            *([cell(i, text) for i, text in enumerate(row)] for row in self.rows),
        ]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        link = f" [{self.csv.name}]({self.csv.name})" if self.csv else ""
        return Markup(f"{text}\n\n{markdown_text(self.note)}{link}" if self.note else text)

    def to_rich(self, bold_row: int | None = None) -> FittingTable:
        """Return the table for the terminal; nothing in it is interpreted as markup."""
        table = FittingTable(
            title=Text(self.title), title_justify="left", title_style="bold", header_style=""
        )
        for i, name in enumerate(self.columns):
            table.add_column(Text(name), justify="left" if self.text or i < self.left else "right")
        for i, row in enumerate(self.rows):
            table.add_row(*(Text(cell) for cell in row), style="bold" if i == bold_row else "")
        return table


def html_text(text: str) -> str:
    """Escape text for HTML and characters that change the direction of writing."""
    return str(markupsafe.escape(escape_controls(text, keep="\n\t")))


def markdown_text(value: Any) -> Any:
    """Escape a value for Markdown and HTML and join its lines; `Markup` stays as it is."""
    if value is None or hasattr(value, "__html__"):
        return value
    line = " ".join(str(value).split())
    return Markup(_MARKDOWN_SPECIAL.sub(r"\\\1", escape(escape_controls(line), quote=False)))


Attribute = tuple[Callable[[Any], Any], Callable[[Any], str]]
"""Reads a value, which may be None, and formats it."""


def attribute_rows(items: Sequence[Any], attributes: Mapping[str, Attribute]) -> list[list[str]]:
    """Return a row for each attribute that at least one item has: its name, then the value of each item."""
    rows = []
    for name, (read, write) in attributes.items():
        values = [read(item) for item in items]
        if any(value is not None for value in values):
            rows.append([name, *(format.MISSING if value is None else write(value) for value in values)])
    return rows
