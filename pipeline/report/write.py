"""Write the report of a run, and its model card."""

from pathlib import Path

from ..runs.files import write_if_changed
from ..runs.folder import RunFolder
from ..runs.results import Report
from .assemble import assemble, make_writable
from .model_card import write_card
from .pages.run import report_page
from .render import render_page

FILES = ("report.html", "report.md", "report.json")


def write(folder: RunFolder) -> Report:
    """Write the report again, and the model card if the run has an artifact."""
    report = assemble(folder)
    write_report(report, folder.path)
    if report.artifact is not None:
        write_card(report, folder.path / report.artifact)
    return report


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html into ``folder``, each atomically.

    Any part of ``report`` may be missing. The same report gives the same bytes.

    Raises:
        JobError: the folder cannot be written or the disk is full.
    """
    report = make_writable(report)
    pages = render_page(report_page(report), "report")
    for name, text in {"report.json": report.model_dump_json(indent=2) + "\n", **pages}.items():
        write_if_changed(folder / name, text)
