"""`compress compare`."""

from pathlib import Path

import click

from ..cli.errors import told


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN…")
@click.option(
    "--out", type=click.Path(path_type=Path), help="where the pages and tables go [default: comparison/]"
)
@click.option(
    "--threads", type=click.IntRange(1), help="at which latencies compare [default: where most were timed]"
)
@click.option("--json", "as_json", is_flag=True, help="print what comparison.json holds")
@click.option("--quiet", is_flag=True, help="print nothing")
def compare(
    runs: tuple[Path, ...], out: Path | None, threads: int | None, as_json: bool, quiet: bool
) -> None:
    """Put runs into one table and one picture, and say which differences are noise.

    RUN is a run folder, a folder of run folders (also of `resolutions`), or a report.json.
    """
    from ..api.compare import compare as compared

    found = told(lambda: compared(runs, out=out, threads=threads))
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    elif not quiet:
        from ..report.terminal import show_comparison

        show_comparison(found)
