"""What the documentation says is what the code does."""

from pathlib import Path

from questpress.pipeline import defaults

DOCS = Path(__file__).parent.parent / "docs"


def test_the_table_of_defaults_in_the_docs_is_the_codes() -> None:
    assert defaults.markdown() in (DOCS / "defaults.md").read_text(encoding="utf-8")
