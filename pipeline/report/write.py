"""Build and write the report of a run, and write its model card."""

from pathlib import Path

from ..runs.files import write_if_changed
from ..runs.folder import RunFolder
from ..runs.results import Report
from . import summary
from .assemble import assemble, make_writable
from .model_card import write_card
from .networks import thread_counts
from .page import Page
from .render import render_page
from .sections import calibration, classes, comparison, details, int8, latency, training, vocabulary

FILES = ("report.html", "report.md", "report.json")


def report_page(report: Report) -> Page:
    missing = summary.list_missing(report)
    remarks = [f"Not in this report yet: {', '.join(missing)}."] if missing else []
    if machine := summary.describe_machine(report.environment):
        remarks.append(f"{'Benchmarked' if thread_counts(report) else 'Run'} on {machine}")
    footer = f"questpress, report schema {report.schema_version}. "
    footer += "report.html, report.md and report.json have the same content."
    if report.artifact:
        footer += f" The files to deploy are in {report.artifact}."
    return Page(
        kind="compression report",
        title=summary.title(report),
        lead=summary.lead(report),
        sections=[
            comparison.section(report),
            latency.section(report),
            int8.section(report),
            training.section(report),
            classes.example_section(report),
            classes.section(report),
            calibration.section(report),
            vocabulary.section(report),
            details.section(report),
        ],
        footer=footer,
        data_file="report.json",
        warnings=summary.warnings(report),
        key_figures=summary.key_figures(report),
        remarks=remarks,
    )


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
