"""The report as three files: report.json for programs, report.md for reviews, report.html to look at."""

import re
from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from ...export.text import spelled_out
from ..runs.files import write_changed
from ..runs.record import with_checksum
from ..runs.results import Report
from .pages.run import page
from .tables import Table

MOST_MARKDOWN = 65_000
"""Characters of report.md; GitHub takes 65,536 in a comment."""


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html into ``folder``, each whole or not at all.

    Any part of ``report`` may still be missing. The same report gives the same bytes.

    Raises:
        JobError: the folder cannot be written or the disk is full.
    """
    report = writable(report)
    rendered = {
        "report.json": report.model_dump_json(indent=2) + "\n",
        "report.md": markdown(report),
        "report.html": html(report),
    }
    for name, text in rendered.items():
        write_changed(folder / name, text)


def writable(report: Report) -> Report:
    """The same report with its checksum, and bytes of file names that are no UTF-8 spelled out, as ``\\xff``,
    and characters that would steer a terminal.
    """

    def spelled(content: Any) -> Any:
        if isinstance(content, str):
            return spelled_out(content, but="\n\t")
        if isinstance(content, dict):
            return {spelled(key): spelled(value) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return [spelled(one) for one in content]
        return content

    return with_checksum(Report.model_validate(spelled(report.model_dump())))


def html(report: Report) -> str:
    """One page without script or anything from outside; every text of the report is escaped."""
    return as_html("report.html.j2", page(report))


def as_html(template: str, shown: Any) -> str:
    """A page by one of our HTML templates, which finds ``shown`` as ``page``."""
    environment = _environment(1000, finalize=_plain, coordinate=_coordinate, count_of=lambda n: f"({n:,})")
    style = Markup(_read("report.css"))
    return environment.get_template(template).render(page=shown, style=style)


def markdown(report: Report) -> str:
    """The same content in GitHub's Markdown; every text is escaped for HTML and for Markdown.

    It is shorter than the 65,536 characters that a pull request's comment holds: where it would not be,
    folded tables lose rows and long names their ends, and at last the end is left out.
    """
    shown = page(report)
    for rows, letters in ((40, None), (40, 120), (12, 60), (4, 40)):
        text = as_markdown("report.md.j2", shown, rows, letters)
        if len(text) <= MOST_MARKDOWN:
            return text
    cut = text[: text.rfind("\n\n", 0, MOST_MARKDOWN - 200)]
    unclosed = "\n\n</details>" * (cut.count("<details>") - cut.count("</details>"))
    return f"{cut}{unclosed}\n\nThe rest is in report.html and report.json.\n"


def as_markdown(template: str, shown: Any, most_rows: int = 40, most_letters: int | None = None) -> str:
    """A page by one of our Markdown templates, which finds ``shown`` as ``page``; folded tables show
    ``most_rows`` rows, and cells ``most_letters`` letters.
    """

    def table(one: Table) -> Markup:
        return _table(one, most_letters)

    environment = _environment(
        most_rows, finalize=_plain_markdown, table=table, fenced=_fenced, as_it_is=Markup
    )
    text = environment.get_template(template).render(page=shown)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def as_plain(template: str, **shown: Any) -> str:
    """A text by one of our templates for other languages, in which nothing is escaped."""
    environment = _environment(0)
    environment.autoescape = False
    return environment.get_template(template).render(**shown)


def _environment(
    most_rows: int, finalize: Callable[[Any], Any] | None = None, **filters: Callable[..., Any]
) -> Environment:
    """Jinja for our templates; folded tables show ``most_rows`` rows."""
    environment = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    environment.globals["most_rows"] = most_rows
    return environment


def _read(name: str) -> str:
    # A resource of this package, wherever it is installed; a loader of paths would need a real folder.
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _coordinate(value: float) -> str:
    return f"{round(value, 1):g}"


SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def _plain(value: Any) -> Any:
    """Text of which no character turns the page's direction; what is already marked up stays."""
    return (
        spelled_out(value, but="\n\t") if isinstance(value, str) and not hasattr(value, "__html__") else value
    )


def _plain_markdown(value: Any) -> Any:
    """Text that Markdown shows as it is, in one line; what is already marked up stays."""
    if value is None or hasattr(value, "__html__"):
        return value
    return Markup(SPECIAL.sub(r"\\\1", escape(spelled_out(_one_line(str(value))), quote=False)))


def _code(value: str) -> Markup:
    # As HTML: a span of backticks can hold neither backticks nor a table's bar.
    return Markup(f"<code>{_plain_markdown(value)}</code>")


def _table(table: Table, most_letters: int | None = None) -> Markup:
    """A table with its note below; nothing where there are no rows."""

    def short(text: str) -> str:
        return text if most_letters is None or len(text) <= most_letters else f"{text[: most_letters - 1]}…"

    if not table.rows:
        return Markup()
    lines = [
        [_plain_markdown(short(name)) for name in table.columns],
        ["---" if table.text or i < table.left else "---:" for i in range(len(table.columns))],
    ]
    for row in table.rows:
        lines.append(
            [(_code if i in table.code else _plain_markdown)(short(cell)) for i, cell in enumerate(row)]
        )
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if table.note:
        text += f"\n\n{_plain_markdown(table.note)}"
    return Markup(text)


def _fenced(value: str, language: str = "sh") -> Markup:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{value.rstrip()}\n{fence}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
