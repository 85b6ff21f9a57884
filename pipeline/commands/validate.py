"""`compress validate`."""

from pathlib import Path
from typing import Any

import click

from ..cli.errors import told
from ..config.limits import MOST_THREADS


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ARTIFACT…")
@click.option(
    "--data",
    help="labelled images: whatever --data of run may be [default: the test images of the run itself]",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="as of run: where a named set or images lie"
)
@click.option("--download", is_flag=True, help="download a named data set when it is not there")
@click.option(
    "--role",
    type=click.Choice(["train", "select", "test", "all"]),
    help="which of the images [default: test where they have roles, else all]",
)
@click.option(
    "--teacher", help="a run folder or an .onnx file to agree with, or none [default: the run's own]"
)
@click.option("--file", help="which .onnx of an artifact folder to ask [default: each]")
@click.option(
    "--ignore-unknown", is_flag=True, help="pass over images of classes that a network does not know"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="where the pages and lists go [default: validation/ in the one run folder, else here]",
)
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="threads [default: the cores allowed, at most 4]"
)
@click.option("--json", "as_json", is_flag=True, help="print what validation.json holds")
@click.option("--quiet", is_flag=True, help="no progress on standard error")
def validate(artifacts: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Ask shipped files about labelled images: accuracy, classes, calibration, mistakes.

    ARTIFACT is a run folder, an artifact folder or one of its .onnx files; several are compared on the same
    images.
    """
    from ..api.validate import as_json as dumped
    from ..api.validate import validate as asked

    found = told(lambda: asked(artifacts, **options))
    if as_json:
        click.echo(dumped(found))
    else:
        from ..report.terminal import show_validation

        show_validation(found)
