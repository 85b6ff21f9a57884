"""The command line: a file for each command, imported when it is asked for."""

import errno
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..runs import main_process
from ..runs.interrupt import STOP
from .errors import OF_THE_SYSTEM, ended, unwritten, written

COMMANDS = {
    "Make": ("run", "resolutions", "export"),
    "Measure and look": ("predict", "validate", "bench", "compare", "report"),
    "Around it": ("models", "recipes", "store", "doctor"),
}
"""Names of commands by heading; ``commands.py`` is imported when one of them is needed."""


FUNCTIONS = {"recipes": "list_recipes"}
"""Functions in ``commands.py`` whose name is not the command's."""


class Shorthand(click.Group):
    """Commands under headings, each imported when it is needed; ``compress OPTIONS`` is ``compress run
    OPTIONS``.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for named in COMMANDS.values() for name in named]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        found = getattr(import_module(".commands", __package__), FUNCTIONS.get(cmd_name, cmd_name))
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args[0] not in names:
            near = get_close_matches(args[0], names, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
            ctx.fail(f"There is no command {args[0]!r}; {meant}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Options without a command are those of ``run`` here, too."""
        found = super().shell_complete(ctx, incomplete)
        run = self.get_command(ctx, "run")
        if run is not None and incomplete.startswith("-"):
            found += run.shell_complete(click.Context(run, parent=ctx), incomplete)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, named in COMMANDS.items():
            with formatter.section(heading):
                found = {name: self.get_command(ctx, name) for name in named}
                formatter.write_dl(
                    [(name, one.get_short_help_str(90)) for name, one in found.items() if one is not None]
                )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for before, one in zip(["", *args], args, strict=False):
            if not one or (one.startswith("--") and one.endswith("=")):
                named = one.rstrip("=") or (before if before.startswith("-") else "an argument")
                ended(f"Error: {named} is empty; say something, or leave it out.", 2)
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """What a command itself does not hear: that it is to stop while it is still being loaded, and that
        what it prints cannot be written.
        """
        try:
            with STOP.listens():
                try:
                    return super().invoke(ctx)
                finally:
                    written()
        except KeyboardInterrupt:
            ended("\nStopped.", 130)
        except OSError as error:
            if error.errno not in OF_THE_SYSTEM | {errno.EPIPE} or error.filename is not None:
                raise
            unwritten(error)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Of several processes one says what is wrong with the command line."""
        if main_process.leads():
            return super().main(*args, **extra)
        try:
            return super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            sys.exit(error.exit_code)


@click.group(
    cls=Shorthand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="questpress", prog_name="compress")
def cli() -> None:
    """Turn a big pretrained vision network into a small one that ships.

    \b
    compress --teacher resnet50 --student mobilenetv2                 the built-in digits, in minutes
    compress --teacher resnet50 --student mobilenetv2 --data photos/ --out runs/shop
    compress predict runs/shop photo.jpg                              ask the network that came out
    compress validate runs/shop --data new-photos/                    how it does on other labelled images
    compress compare runs/*                                           runs against each other
    compress models 'mobilenet*'                                      names, sizes, licences

    Options without a command go to `run`: `compress run --help` lists them.
    """
