"""`compress completion`: what a shell needs to complete commands, options and their values."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the lines that make SHELL complete `compress`.

    \b
    compress completion bash >> ~/.bashrc
    compress completion zsh >> ~/.zshrc
    compress completion fish > ~/.config/fish/completions/compress.fish
    """
    from ..cli.main import cli

    made = get_completion_class(shell)
    assert made is not None  # click has one for each of these
    click.echo(made(cli, {}, "compress", "_COMPRESS_COMPLETE").source())
