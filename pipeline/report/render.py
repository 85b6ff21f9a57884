"""Render pages as HTML and Markdown."""

import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from ...export.text import escape_controls
from ..runs.files import to_csv
from .page import Page
from .tables import markdown_text

MAX_MARKDOWN = 65_000
"""Characters of a page in Markdown; a comment on GitHub has 65,536 at most."""
MAX_ROWS = 1000
"""Rows of a folded table in HTML."""
MARKDOWN_LIMITS = ((40, None), (40, 120), (12, 60), (4, 40))
"""Rows of a folded table and characters of a cell, tried until the page is short enough."""


def render_page(page: Page, name: str) -> dict[str, str]:
    """Return the page as ``name``.html and ``name``.md, every text escaped, and its CSV files."""
    files = {csv.name: to_csv(csv.rows) for csv in page.csv_files().values()}
    return {**files, f"{name}.md": render_markdown(page), f"{name}.html": render_html(page)}


def render_html(page: Page) -> str:
    """Return a page without scripts, which requests nothing."""
    environment = _environment(_escape_controls)
    style = Markup(_read("report.css"))
    return environment.get_template("base.html.j2").render(page=page, style=style, max_rows=MAX_ROWS)


def render_markdown(page: Page) -> str:
    """Return a page in GitHub's Markdown, with fewer rows and shorter names if it would be too long."""
    text = ""
    for max_rows, max_chars in MARKDOWN_LIMITS:
        text = render_markdown_template("base.md.j2", page=page, max_rows=max_rows, max_chars=max_chars)
        if len(text) <= MAX_MARKDOWN:
            return text
    cut = text[: text.rfind("\n\n", 0, MAX_MARKDOWN - 200)]
    unclosed = "\n\n</details>" * (cut.count("<details>") - cut.count("</details>"))
    return f"{cut}{unclosed}\n\nThe rest is in {page.data_file}.\n"


def render_markdown_template(template: str, **variables: Any) -> str:
    environment = _environment(markdown_text, fenced=_fence, verbatim=Markup)
    text = environment.get_template(template).render(**variables)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def render_plain_template(template: str, **variables: Any) -> str:
    """Render a template of another language, in which nothing is escaped."""
    environment = _environment(None)
    environment.autoescape = False
    return environment.get_template(template).render(**variables)


def _environment(finalize: Callable[[Any], Any] | None, **filters: Callable[..., Any]) -> Environment:
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
    return environment


def _read(name: str) -> str:
    # A loader of paths would need a folder on disk, which a zipped package does not have.
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _escape_controls(value: Any) -> Any:
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return escape_controls(value, keep="\n\t") if is_text else value


def _fence(value: str, language: str = "sh") -> Markup:
    """Return a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{value.rstrip()}\n{fence}")
