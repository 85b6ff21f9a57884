"""`compress predict`."""

import sys
from pathlib import Path

import click

from ..cli.errors import told
from ..config.limits import MOST_THREADS


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", default=3, show_default=True, type=click.IntRange(1), help="answers for each image")
@click.option("--file", "file", help="which .onnx of the artifact answers [default: the int8 one]")
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="threads [default: the cores allowed, at most 4]"
)
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
def predict(
    artifact: Path, images: tuple[Path, ...], top: int, file: str | None, threads: int | None, as_json: bool
) -> None:
    """Ask a compressed network what it sees.

    ARTIFACT is a run folder, an artifact folder or one of its .onnx files; IMAGES are files, or folders of
    them.
    """
    from ..predict import predict as answer

    unread = told(lambda: answer(artifact, images, top=top, file=file, threads=threads, as_json=as_json))
    sys.exit(1 if unread else 0)
