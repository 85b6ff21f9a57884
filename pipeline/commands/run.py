"""`compress run`, `compress resolutions` and `compress export`: what trains and what ships."""

from pathlib import Path
from typing import Any

import click

from .. import voice
from ..cli.errors import show_report, told
from ..cli.options import Grouped, all_options, given
from ..config.options import group


@click.command(cls=Grouped)
def run(**options: Any) -> None:
    """Distill, export, quantize, validate and measure: the whole job.

    The same command again does only what is missing; an interrupted one goes on where it stopped.
    """

    from ..api.run import compress

    asked = given(options)
    report = told(lambda: compress(**asked), resumes=True)
    if voice.leads():
        show_report(report, as_json=bool(options["json_"]))


run.params += all_options()


@click.command(cls=Grouped)
@click.option(
    "--sizes", required=True, metavar="S,S,…", help="sides of the students' input in pixels, as in 64,96,128"
)
def resolutions(sizes: str, **options: Any) -> None:
    """One student for each image size, all from one teacher, and accuracy over latency in one report.

    Takes the options of `run`; each student has a run folder of its own below --out. The same command again
    does only what is missing.
    """
    from ..api.sweep import resolutions as of_sizes
    from ..api.sweep import whole_numbers

    asked = given(options)
    found = told(lambda: of_sizes(whole_numbers(sizes), **asked), resumes=True)
    if options["json_"]:
        click.echo(found.model_dump_json(indent=2))
    else:
        from ..report.terminal import show_sizes

        show_sizes(found)


@click.command(cls=Grouped)
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
def export(folder: Path, **options: Any) -> None:
    """Make what ships of a finished run's student anew, for other processors or with other options.

    RUN is a run folder; what is not said stays as it was. Nothing that was trained is trained again.
    """
    from ..export_again import export_again

    asked = given(options)
    report = told(lambda: export_again(folder, **asked), resumes=True)
    show_report(report, as_json=bool(options["json_"]))


export.params += [
    one for one in run.params if one.name in ("quiet", "verbose", "json_") or group(str(one.name)) == "Export"
]


# The student's size is the one thing that differs, and none of its stages can be left out.
resolutions.params += [one for one in run.params if one.name not in ("student_size", "until", "dry_run")]
