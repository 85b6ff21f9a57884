"""Cells of a CSV file that a spreadsheet may open: text from outside must not become a formula."""

from ..export.text import spelled_out

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of one."""


def harmless(cell: str) -> str:
    """The cell; with an apostrophe before it where a spreadsheet would compute it, and without characters
    that would steer the terminal of whoever looks at the file.
    """
    guarded = f"'{cell}" if cell.lstrip(" ").startswith(FORMULA) else cell
    return spelled_out(guarded)
