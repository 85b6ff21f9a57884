"""`compress models` and `compress recipes`: what there is to choose from."""

import click

from ..cli.errors import told


@click.command("recipes")
def list_recipes() -> None:
    """List the papers' recipes, for --recipe."""
    from ..config import recipes

    for name in recipes.names():
        recipe = recipes.load(name)
        click.echo(f"{name:<22}{recipe.about}\n{'':<22}{recipe.source}")


@click.command()
@click.argument("pattern", default="*")
@click.option(
    "--image-size", type=click.IntRange(8), help="side in pixels that GMACs are counted for [default: own]"
)
def models(pattern: str, image_size: int | None) -> None:
    """List networks by name, with parameters, GMACs and the licence of their weights.

    PATTERN is a name or one with wildcards, such as 'mobilenet*'.
    """
    from ..list_models import list_models

    told(lambda: list_models(pattern, image_size))
