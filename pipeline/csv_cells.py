"""Cells of a CSV file that a spreadsheet may open: text from outside must not become a formula."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of one."""


def harmless(cell: str) -> str:
    """The cell; with an apostrophe before it where a spreadsheet would compute it."""
    return f"'{cell}" if cell.lstrip(" ").startswith(FORMULA) else cell
