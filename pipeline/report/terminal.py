"""Tables and messages at the end of a command in the terminal."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..evaluation.results import Comparison, Validation
from ..runs.console import safe_console
from ..runs.results import Bench, Report
from . import comparison_page, format, validation_page
from .networks import compared_networks, latency_measure, score_name, shipped_network, thread_counts
from .sections import calibration, int8, latency
from .summary import title, warnings
from .tables import Table

DRAWN_WIDTH = 100
"""Columns of a result in a notebook."""

MAX_PAIRS = 6
"""Of more pairs, only those with the first file are printed; the page has all."""


def show_report(report: Report, folder: Path | None = None, console: Console | None = None) -> None:
    """Print networks, warnings and paths of a run; ``folder`` if it is not the one of the options."""
    console = console or safe_console()
    if (reason := int8.explain_fp32(report)) is not None:
        console.print(Text(reason))
    shipped, columns = shipped_network(report), compared_networks(report)
    bold = columns.index(shipped) if shipped is not None else None
    console.print(report_table(report).to_rich(bold))
    if (line := calibration.terminal_line(report)) is not None:
        console.print(Text(line))
    for warning in warnings(report):
        console.print(Text(f"Warning: {warning}"))
    out = folder or (Path(str(report.config["out"])) if report.config.get("out") else None)
    if out is not None:
        _print_path(console, "Report:  ", out / "report.html")
        if report.artifact:
            _print_path(console, "Artifact:", out / report.artifact)


def _print_path(console: Console, label: str, path: Path) -> None:
    # In one line, so that it can be copied.
    console.print(Text(f"{label} {path}"), soft_wrap=True)


def report_table(report: Report) -> Table:
    """Return score, size and median latency of each network, for 80 columns."""
    counts = thread_counts(report)
    measures = {count: latency_measure(report, count) for count in counts}
    rows = [
        [
            column.role,
            format.score_percent(column.subject.score),
            format.score_interval(column.subject.score),
            format.megabytes(column.subject.bytes),
            *(format.milliseconds(read(column.subject)) for _, read in measures.values()),
        ]
        for column in compared_networks(report)
    ]
    columns = ["", score_name(report), "95 % interval", "size"]
    for count, (name, _) in measures.items():
        columns.append(format.threads(count) + (f", {name}" if name != "median latency" else ""))
    return Table(title(report), columns, rows)


def show_validation(validation: Validation, console: Console | None = None) -> None:
    """Print the results of each file, pairwise tests, warnings, and the paths of the results."""
    console = console or safe_console()
    console.print(validation_page.terminal_table(validation).to_rich())
    for pair in validation.pairs:
        if validation.first.name in (pair.first, pair.second) or len(validation.pairs) <= MAX_PAIRS:
            console.print(Text(validation_page.describe_pair(pair, validation.n)), soft_wrap=True)
    for note in [*validation.warnings, *validation.notes]:
        console.print(Text(f"Note: {note}"), soft_wrap=True)
    if validation.folder is not None:
        _print_path(console, "Page:  ", Path(validation.folder) / "validation.html")
        _print_path(console, "Errors:", Path(validation.folder) / "mistakes.csv")


def show_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the runs of each data set, significant differences, warnings, and the path of the page."""
    console = console or safe_console()
    for group in comparison.groups:
        console.print(comparison_page.terminal_table(comparison, group).to_rich())
        for sentence in comparison_page.conclusions(comparison, group):
            console.print(Text(sentence), soft_wrap=True)
    if comparison.search is not None:
        for sentence in comparison_page.describe_search(comparison, comparison.search):
            console.print(Text(sentence), soft_wrap=True)
    for warning in comparison.warnings:
        console.print(Text(f"Warning: {warning}"), soft_wrap=True)
    if comparison.folder is not None:
        _print_path(console, "Page:", Path(comparison.folder) / "comparison.html")


def show_bench(bench: Bench, folder: Path | None = None, console: Console | None = None) -> None:
    """Print the tables of a bench, disturbances, and the paths of the results in ``folder``."""
    console = console or safe_console()
    for table in (latency.brief_percentiles(bench), *latency.other_tables(bench)):
        if table.rows:
            console.print(table.to_rich(), "")
    for flag in bench.flags:
        console.print(Text(f"{format.threads(flag.threads)}, {flag.name}: {flag.sentence}"))
    for note in bench.notes:
        console.print(Text(f"Note: {note}."))
    console.print(Text(latency.noise_summary(bench, bench.command)))
    if folder is None:
        return
    report = folder.parent / "report.html"
    if folder.name == "bench" and report.is_file():
        _print_path(console, "Report: ", report)
    _print_path(console, "Results:", folder / "bench.json")


def show_devices(report: Report, folder: Path, console: Console | None = None) -> None:
    """Print the table of devices, and the path of the report in ``folder``."""
    console = console or safe_console()
    console.print(latency.devices(report.devices).to_rich(), "")
    _print_path(console, "Report: ", folder / "report.html")


SHOWN: dict[type, Callable[..., None]] = {
    Report: show_report,
    Validation: show_validation,
    Comparison: show_comparison,
    Bench: show_bench,
}


def draw(result: Any) -> tuple[str, str] | None:
    """Return what a command prints as text and as HTML; None for parts of a result."""
    show = SHOWN.get(type(result))
    if show is None:
        return None
    console = safe_console(file=io.StringIO(), record=True, width=DRAWN_WIDTH, force_jupyter=False)
    show(result, console=console)
    html = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>", clear=False)
    return console.export_text().rstrip(), html
