"""The command group ``compress cache``."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from .main import exit_on_error
from .options import cache_option, json_option


@click.group()
def cache() -> None:
    """List cached teacher outputs, or prune the cache."""


@cache.command("list")
@cache_option
@json_option
def list_command(cache: Path | None, as_json: bool) -> None:
    """List cached teacher outputs with size and last use."""
    from ..api.cache import list_cache, measure_cache, outputs_folder
    from .tables import print_cache

    outputs, unreadable = exit_on_error(lambda: list_cache(cache))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in outputs], indent=2))
    else:
        print_cache(outputs, unreadable, outputs_folder(cache), measure_cache(cache))


@cache.command()
@click.option("--keep", required=True, metavar="SIZE", help="size to keep, such as 10GB, 500MB or 0")
@cache_option
def prune(keep: str, cache: Path | None) -> None:
    """Remove the least recently used entries until at most SIZE is left."""
    from ..api.cache import outputs_folder, parse_size, prune_cache
    from ..report.format import megabytes

    pruned = exit_on_error(lambda: prune_cache(parse_size(keep), cache))
    click.echo(
        f"Removed {pruned.removed:,} of {pruned.entries:,} entries ({megabytes(pruned.bytes_removed)}). "
        f"{megabytes(pruned.bytes_left)} left."
    )
    if pruned.in_use:
        click.echo(
            f"{pruned.in_use:,} entries could not be removed: they are in use, or the cache "
            f"{outputs_folder(cache).parent} is not writable."
        )
