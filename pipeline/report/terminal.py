"""What a run ends with in the terminal: a small table, and what to open."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..api.doctor import Diagnosis
from ..evaluation.results import ComparedRun, Comparison, Group, Validation
from ..runs.console import safe_console
from ..runs.results import Report, Resolutions
from ..runs.scores import Score
from . import budget, format, sizes, validation_tables
from .sections import calibration
from .pages import comparison, validation
from .summary import notes, title
from .networks import compared, measure, shipped, threads

MOST_PAIRS = 6
"""Of more, those with the first file are printed; all are on the page."""


def table(report: Report) -> Table:
    """A row per network: accuracy (or mAP) with its interval, size, median latency at each thread count; 80
    columns.

    Names are shown as they are: nothing in them is taken for markup.
    """
    counts, ships = threads(report), shipped(report)
    drawn = Table(
        title=Text(title(report)),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="",
        padding=(0, 2, 0, 0),
    )
    drawn.add_column("")
    for name in (measure(report), "95 % interval", "size", *(format.threads(count) for count in counts)):
        drawn.add_column(name, justify="right", no_wrap=True)
    for column in compared(report):
        network, score = column.subject, column.subject.score
        interval = format.MISSING
        if score:
            interval = format.percent_interval(score.low, score.high, score.n)
        latencies = (network.latency_ms.get(count) for count in counts)
        drawn.add_row(
            column.role,
            format.percent(score.percent, score.n) if score else format.MISSING,
            interval,
            format.megabytes(network.bytes),
            *(format.milliseconds(one.p50 if one else None) for one in latencies),
            style="bold" if column == ships else "",
        )
    return drawn


def show_sizes(found: Resolutions, console: Console | None = None) -> None:
    """Print the table of the sizes, and the paths to open."""
    console = console or safe_console()
    made = sizes.table(found)
    drawn = Table(title=Text(found.title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    # The rest is in the report: a terminal is 80 columns wide.
    kept = [n for n, column in enumerate(made.columns) if column not in sizes.ASIDE]
    for n in kept:
        drawn.add_column(made.columns[n], justify="left" if n < made.left else "right", no_wrap=True)
    for row in made.rows:
        drawn.add_row(*(Text(row[n]) for n in kept))
    console.print(drawn)
    console.print(Text(f"Report:   {Path(found.folder) / 'report.html'}"), soft_wrap=True)


def show_validation(found: Validation, console: Console | None = None) -> None:
    """Print a row for each file, what is to be noted, how the files differ, and the page to open."""
    console = console or safe_console()
    drawn = Table(title=Text(found.title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    drawn.add_column("")
    details = list(dict.fromkeys(name for one in found.networks if one.score for name in one.score.details))
    taught = any(one.agreement for one in found.networks)
    names = [validation.measure(found), "95 % interval", *details, "NLL", "ECE"]
    for name in [*names, *(["like teacher"] if taught else [])]:
        drawn.add_column(name, justify="right", no_wrap=True)
    for one in found.networks:
        score, measured = one.score, one.calibration
        drawn.add_row(
            Text(one.name),
            format.percent(score.percent, score.n) if score else format.MISSING,
            format.percent_interval(score.low, score.high, score.n) if score else format.MISSING,
            *(_detail(score, name) for name in details),
            format.significant(measured.nll) if measured else format.MISSING,
            format.percent(measured.ece, measured.n) if measured else format.MISSING,
            *([format.percent(one.agreement.percent if one.agreement else None, found.n)] if taught else []),
        )
    console.print(drawn)
    for pair in found.pairs:
        if found.first.name in (pair.first, pair.second) or len(found.pairs) <= MOST_PAIRS:
            console.print(Text(validation_tables.told(pair, found.n)), soft_wrap=True)
    for note in [*found.warnings, *found.notes]:
        console.print(Text(f"Note: {note}"), soft_wrap=True)
    if found.folder is not None:
        console.print(Text(f"Page:     {Path(found.folder) / 'validation.html'}"), soft_wrap=True)
        console.print(Text(f"Mistakes: {Path(found.folder) / 'mistakes.csv'}"), soft_wrap=True)


def _detail(score: Score | None, name: str) -> str:
    detail = score.details.get(name) if score is not None else None
    return format.percent(detail.percent if detail else None, score.n if score else None)


def show_comparison(found: Comparison, console: Console | None = None) -> None:
    """Print a row for each run, what is best and what is noise, and the page to open."""
    console = console or safe_console()
    for group in found.groups:
        title = f"On {group.data}, {group.n:,} test images" if group.n else group.data or "without data yet"
        drawn = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        drawn.add_column("")
        drawn.add_column("method")
        latency = "latency" if found.threads is None else format.threads(str(found.threads))
        for name in (comparison.measure(found, group), "95 % interval", latency, "size"):
            drawn.add_column(name, justify="right", no_wrap=True)
        drawn.add_column("")
        for name in group.runs:
            drawn.add_row(*(Text(cell) for cell in _compared(found.run(name), group)))
        console.print(drawn)
        for sentence in comparison.sentences(found, group):
            console.print(Text(sentence), soft_wrap=True)
    for note in found.warnings:
        console.print(Text(f"Note: {note}"), soft_wrap=True)
    if found.folder is not None:
        console.print(Text(f"Page: {Path(found.folder) / 'comparison.html'}"), soft_wrap=True)


def _compared(run: ComparedRun, group: Group) -> list[str]:
    ships = run.ships
    score = ships.score if ships is not None else None
    noise = {one.run: "noise" if one.within_noise else "worse" for one in group.accuracies}
    return [
        run.name,
        run.method,
        format.percent(score.percent, score.n) if score else format.MISSING,
        format.percent_interval(score.low, score.high, score.n) if score else format.MISSING,
        format.milliseconds(ships.p50 if ships is not None else None),
        format.megabytes(ships.bytes if ships is not None else None),
        "best" if run.name == group.best else noise.get(run.name, "not finished" if run.missing else ""),
    ]


def show(report: Report, folder: Path | None = None, console: Console | None = None) -> None:
    """Print that the fp32 file ships where no int8 file does, the table, what of int8 was found, the notes,
    and the paths to open: the page and the folder that ships.

    Args:
        folder: the run folder; without it the one the run was told to write to.
    """
    console = console or safe_console()
    fp32 = budget.fp32_ships(report)
    if fp32 is not None:
        console.print(Text(fp32))
    console.print(table(report))
    calibrated = calibration.line(report)
    if calibrated is not None:
        console.print(Text(calibrated))
    for note in notes(report):
        console.print(Text(f"Note: {note}"))
    out = folder or (Path(str(report.config["out"])) if report.config.get("out") else None)
    if out is not None:
        # Paths are printed in one piece, so that they can be clicked or copied.
        console.print(Text(f"Report:   {out / 'report.html'}"), soft_wrap=True)
        if report.artifact:
            console.print(Text(f"Artifact: {out / report.artifact}"), soft_wrap=True)


def show_diagnosis(found: Diagnosis, console: Console | None = None) -> None:
    """Print what was looked at, by groups, with what to do where something is not right."""
    console = console or safe_console(highlight=False)
    marks = {"ok": "[green]✓[/green]", "note": "[yellow]![/yellow]", "missing": "[red]✗[/red]"}
    group = None
    for one in found.findings:
        if one.group != group:
            group = one.group
            console.print(Text(group, style="bold"))
        console.print(f"  {marks[one.verdict]} {escape(f'{one.name}: {one.told}')}", soft_wrap=True)
        if one.remedy is not None:
            console.print(Text(f"      → {one.remedy}"), soft_wrap=True)
    missing = sum(one.verdict == "missing" for one in found.findings)
    console.print(
        "compress can run here."
        if found.fit
        else f"compress cannot run here: {missing} thing{'s are' if missing > 1 else ' is'} missing."
    )
