"""`compress report`."""

from pathlib import Path

import click

from ..cli.errors import told


@click.command()
@click.argument("folder", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="folder to write to [default: RUN]")
@click.option("--schema", is_flag=True, help="print the JSON schema of report.json, and nothing else")
@click.option("--json", "as_json", is_flag=True, help="print what report.json holds")
@click.option("--quiet", is_flag=True, help="print nothing")
def report(folder: Path | None, out: Path | None, schema: bool, as_json: bool, quiet: bool) -> None:
    """Write report.html, report.md and report.json of a run anew, finished or not.

    RUN is a run folder. Nothing is computed: what its stages have found is shown as this version shows it.
    Without --out the artifact's README.md is written anew too.
    """
    from ..api.again import report_again
    from ..api.again import schema as schema_of

    if schema:
        if folder is not None or out is not None or as_json or quiet:
            raise click.UsageError("--schema stands alone: it is the same for every run.")
        click.echo(schema_of(), nl=False)
        return
    if folder is None:
        raise click.UsageError("Name a run folder, as in: compress report runs/shop")
    found, files = told(lambda: report_again(folder, out))
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    elif not quiet:
        for file in files:
            click.echo(file)
