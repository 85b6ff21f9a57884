"""What `compress bench` ends with in the terminal: small tables of 80 columns, and what to doubt."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from ..runs.bench_results import Bench
from ..runs.console import safe_console
from . import bench_tables, format
from .sections.latency import disturbed
from .tables import Table

LONGEST = 34
"""Of a name in a table; the rest of it is in bench.json."""


def show(bench: Bench, folder: Path, console: Console | None = None) -> None:
    """Print the tables, the flags, and where the results are."""
    console = console or safe_console()
    _show(console, _percentiles(bench))
    speedups = bench_tables.speedups(bench)
    if all(len(row[0]) <= LONGEST for row in speedups.rows):
        _show(console, speedups)
    else:
        _show_lines(console, speedups)
    for table in (
        bench_tables.end_to_end(bench),
        bench_tables.cold_starts(bench),
        bench_tables.throughput(bench),
    ):
        _show(console, table)
    for flag in bench.flags:
        console.print(Text(f"{format.threads(str(flag.threads))}, {flag.name}: {flag.sentence}"))
    for note in bench.notes:
        console.print(Text(f"Note: {note}."))
    console.print(Text(disturbed(bench)))
    for path in _paths(folder):
        console.print(Text(path), soft_wrap=True)


def _show(console: Console, table: Table) -> None:
    if table.rows:
        console.print(drawn(table))
        console.print()


def _show_lines(console: Console, table: Table) -> None:
    """A line for each cell, where names are too long for columns."""
    console.print(Text(table.title, style="bold"))
    for name, *cells in table.rows:
        told = "; ".join(f"{count} {cell}" for count, cell in zip(table.columns[1:], cells, strict=True))
        console.print(Text(f"{name}: {told}"))
    console.print()


def drawn(table: Table) -> Drawn:
    """Names are shown as they are, and cut in the middle of nowhere rather than wrapped."""
    made = Drawn(
        title=Text(table.title),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="",
        padding=(0, 1, 0, 0),
    )
    for i, name in enumerate(table.columns):
        words = i < table.left
        made.add_column(
            name,
            justify="left" if words else "right",
            no_wrap=words,
            overflow="ellipsis" if words else "fold",
            max_width=LONGEST if words else None,
        )
    for row in table.rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def _percentiles(bench: Bench) -> Table:
    """With the median's interval alone: that of the others are in the report and in bench.json."""
    names = ("p50", "p90", "p95", "p99")
    rows = [
        [
            bench_tables.role(bench, one.subject),
            str(one.threads),
            bench_tables.interval(one.percentiles.get("p50")),
            *(_value(one.percentiles[name].value if name in one.percentiles else None) for name in names[1:]),
            format.count(one.n),
        ]
        for one in bench.latencies
    ]
    return Table("Milliseconds of one image", ["", "threads", *names, "runs"], rows)


def _value(value: float | None) -> str:
    return format.MISSING if value is None else format.significant(value)


def _paths(folder: Path) -> Sequence[str]:
    report = folder.parent / "report.html"
    found = [f"Results:  {folder / 'bench.json'}"]
    if folder.name == "bench" and report.is_file():
        found.insert(0, f"Report:   {report}")
    return found
