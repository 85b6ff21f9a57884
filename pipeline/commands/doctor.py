"""`compress doctor`."""

import sys
from pathlib import Path

import click

from ..cli.errors import told


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), help="folder that runs share [default: the user's]")
@click.option("--offline", is_flag=True, help="don't ask the internet whether weights can be downloaded")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def doctor(cache: Path | None, offline: bool, as_json: bool) -> None:
    """Say what this machine has for the job, what is missing, and how to get it.

    The exit code is 1 where the job cannot run here.
    """
    from ..api.doctor import doctor as examine
    from ..report.terminal import show_diagnosis

    found = told(lambda: examine(cache=cache, offline=offline))
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        show_diagnosis(found)
    sys.exit(0 if found.fit else 1)
