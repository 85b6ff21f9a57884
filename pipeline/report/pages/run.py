"""The report of a run."""

from ...runs.results import Report
from .. import summary
from ..networks import thread_counts
from ..page import Page
from ..sections import calibration, classes, comparison, details, int8, latency, training, vocabulary


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
