"""`compress store`: list, verify and prune."""

from pathlib import Path

import click

from ..cli.errors import told


@click.group()
def store() -> None:
    """What teachers have said to fixed views of images, kept for later runs."""


_cache = click.option(
    "--cache", type=click.Path(path_type=Path), help="folder that runs share [default: the user's]"
)


@store.command("list")
@_cache
@click.option("--json", "as_json", is_flag=True, help="one JSON list")
def list_store(cache: Path | None, as_json: bool) -> None:
    """List the answers by teacher, data and readout: how many views, how large, when last used."""
    from ..api.teacher_cache import list_store as show_list
    from ..runs.cache import Cache

    told(lambda: show_list(Cache(cache), as_json=as_json))


@store.command()
@click.argument("run", type=click.Path(path_type=Path))
@_cache
@click.option(
    "--share",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="of each view's batches, one at least",
)
def verify(run: Path, cache: Path | None, share: float) -> None:
    """Compute some of the answers that RUN has learned from again, and compare.

    RUN is a run folder. Where its answers are wrong or damaged, the exit code is 1.
    """
    from ..api.verify_cache import verify as verified

    told(lambda: verified(run, cache, share))


@store.command()
@click.option("--keep", required=True, metavar="SIZE", help="how much to keep, as in 10GB, 500MB or 0")
@_cache
def prune(keep: str, cache: Path | None) -> None:
    """Remove the answers that were used longest ago, until no more than SIZE is left."""
    from ..api.teacher_cache import prune as make_room
    from ..api.teacher_cache import size
    from ..runs.cache import Cache

    told(lambda: make_room(Cache(cache), size(keep)))
