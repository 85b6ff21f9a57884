"""Terminal output of the commands that do not belong to a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.text import Text

from ..report import format
from ..runs.console import FittingTable, safe_console

if TYPE_CHECKING:
    from ...models.catalog import Entry
    from ..api.cache import CachedOutputs
    from ..api.doctor import Diagnosis
    from ..api.push import Push

MARKS = {"ok": "[green]✓[/green]", "note": "[yellow]![/yellow]", "missing": "[red]✗[/red]"}


def _table(left: Sequence[str], right: Sequence[str]) -> FittingTable:
    table = FittingTable(header_style="bold")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def print_models(models: Mapping[str, "Entry | str | None"]) -> None:
    """Print networks with parameters, GMACs and licenses, or only names if there are too many."""
    console = safe_console(highlight=False)
    if None in models.values():
        for name in models:
            console.print(Text(name))
        console.print(f"{len(models)} networks. Use a narrower pattern to list sizes.", style="dim")
        return
    table = _table(["name"], ["parameters", "GMACs", "image size"])
    table.add_column("pretrained weights")
    for name, model in models.items():
        if model is None or isinstance(model, str):
            table.add_row(Text(name), "", "", "", Text(model or ""))
            continue
        table.add_row(
            Text(model.name if model.name == name else f"{name} = {model.name}"),
            f"{model.parameters / 1e6:.2f} M",
            format.MISSING if model.gmacs is None else f"{model.gmacs:.3f}",
            str(model.image_size),
            (model.license or "license not stated") if model.has_weights else "none",
        )
    console.print(table)


def print_cache(outputs: Sequence["CachedOutputs"], unreadable: int, root: Path, size: int) -> None:
    """Print cached teacher outputs, their total size, and the ``size`` of the whole cache in bytes."""
    console = safe_console(highlight=False)
    if not outputs:
        console.print(Text(f"There are no cached teacher outputs in {root}."))
    else:
        table = _table(
            ["teacher", "data", "output"],
            ["top", "views", "images", "per view", "total", "p_T lost", "last used"],
        )
        for row in outputs:
            table.add_row(
                *(Text(cell) for cell in (row.teacher, row.data, row.readout)),
                format.MISSING if row.top is None else str(row.top),
                f"{row.views:,}{' (listed)' if row.listed else ''}",
                f"{row.images:,}",
                format.megabytes(row.bytes_per_view),
                format.megabytes(row.bytes),
                format.MISSING if row.lost_mass is None else f"{format.significant(100 * row.lost_mass)} %",
                row.last_used,
            )
        console.print(table)
        total = format.megabytes(sum(row.bytes for row in outputs))
        console.print(Text(f"{total} in total, in {root}"), style="dim", soft_wrap=True)
    whole = f"{format.megabytes(size)} with decoded images, teachers and vocabularies, in {root.parent}"
    console.print(Text(whole), style="dim", soft_wrap=True)
    if unreadable:
        entries = format.plural(unreadable, "entry", "entries")
        console.print(Text(f"{entries} cannot be read and will be replaced."), soft_wrap=True)


def print_diagnosis(diagnosis: "Diagnosis") -> None:
    """Print the findings of ``compress doctor`` by group, with remedies."""
    console = safe_console(highlight=False)
    group = None
    for finding in diagnosis.findings:
        if finding.group != group:
            group = finding.group
            console.print(Text(group, style="bold"))
        text = escape(f"{finding.name}: {finding.value}")
        console.print(f"  {MARKS[finding.verdict]} {text}", soft_wrap=True)
        if finding.remedy is not None:
            console.print(Text(f"      → {finding.remedy}"), soft_wrap=True)
    missing = sum(finding.verdict == "missing" for finding in diagnosis.findings)
    console.print(
        "compress can run on this machine."
        if diagnosis.can_run
        else f"compress cannot run on this machine. Missing requirements: {missing}."
    )


def print_push(push: "Push") -> None:
    """Print the address of an upload, or the files that a dry run has listed."""
    if push.url is not None:
        click.echo(push.url)
        return
    for name, size in push.files.items():
        click.echo(f"{size:>12,}  {name}")
    files, total = format.plural(len(push.files), "file"), format.megabytes(sum(push.files.values()))
    click.echo(f"{files}, {total}, for {push.repository}. Nothing was sent.")
