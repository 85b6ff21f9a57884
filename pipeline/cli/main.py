"""The command group ``compress``. The commands are imported when one is needed."""

import errno
import io
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from ...export.text import escape_controls
from ..errors import is_out_of_memory
from ..runs import process
from ..runs.process import STOP, TIME_LIMIT_EXIT, TimeLimit

T = TypeVar("T")

COMMANDS = {
    "Train and export": ("run", "sweep", "export", "push"),
    "Inspect and measure": ("predict", "validate", "bench", "compare", "report"),
    "Setup": ("models", "recipes", "cache", "doctor"),
}
"""Command names, each a function in ``commands.py``, by heading."""

SYSTEM_ERRORS = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENXIO", "ENODEV", "EBUSY",
        "ETIMEDOUT", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP", "EMFILE", "ENFILE", "ENOMEM",
    )
    if hasattr(errno, name)
}  # fmt: skip
"""Errors of the file system. Others, such as a missing file, are bugs and are shown with a traceback."""

MAX_MESSAGE = 4000
"""Characters of a message, which may contain names of any length from files."""

SIGINT_EXIT = 130


def exit_on_error(job: Callable[[], T], *, resumable: bool = False) -> T:
    """Call ``job`` and turn its errors into one message, with advice if it is resumable, and an exit code."""
    resume = " Run the same command again to resume." if resumable else ""
    if resumable and (ignored := process.describe_ignored_variables()) is not None:
        click.echo(f"Warning: {escape_controls(ignored)}", err=True)
    try:
        with STOP.handle_signals():  # SIGTERM, sent by schedulers and containers, counts as Ctrl-C
            return job()
    except TimeLimit:
        fail(f"\nStopped at --time-limit.{resume}", TIME_LIMIT_EXIT)
    except KeyboardInterrupt:
        fail(f"\nStopped.{resume}", SIGINT_EXIT)
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        fail(f"Error: {error.filename or 'a file'}: {error.strerror}. Existing files are unchanged.", 1)
    except Exception as error:
        # models/ and export/ have their own error classes with an exit code.
        code = getattr(error, "exit_code", None)
        if code is not None:
            fail(f"Error: {error}", code)
        if is_out_of_memory(error):
            fail(
                "Error: out of memory. Close other programs, or reduce --image-size, --micro-batch or the "
                "size of the networks.",
                1,
            )
        if process.is_first_to_exit():
            raise
        sys.exit(1)  # another process has failed and reported the reason


def _fail_on_output(error: OSError) -> NoReturn:
    """Exit because the output cannot be written: the disk is full, or its reader has exited."""
    if sys.stdout is not None:  # otherwise the interpreter tries to flush it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        sys.exit(1)
    fail(f"Error: the output cannot be written: {error.strerror}.", 1)


def fail(message: str, code: int) -> NoReturn:
    """Print a message, by one process only, and exit."""
    if process.is_first_to_exit():
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE * 3 // 4]} … {message[-MAX_MESSAGE // 4 :]}"
        click.echo(escape_controls(message, keep="\n"), err=True)
    sys.exit(code)


class DefaultGroup(click.Group):
    """A group with headings, in which ``compress OPTIONS`` means ``compress run OPTIONS``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in COMMANDS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(import_module(".commands", __package__), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Reject an unknown command with the nearest name."""
        names = self.list_commands(ctx)
        if args[0] not in names:
            near = get_close_matches(args[0], names, n=1)
            ctx.fail(
                f"Unknown command {args[0]!r}. "
                + (f"Did you mean {near[0]}?" if near else f"Available commands: {', '.join(names)}.")
            )
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the options of ``run`` too."""
        items = super().shell_complete(ctx, incomplete)
        run = self.get_command(ctx, "run")
        if run is not None and incomplete.startswith("-"):
            items += run.shell_complete(click.Context(run, parent=ctx), incomplete)
        return items

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, names in COMMANDS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(heading):
                formatter.write_dl([(name, cmd.get_short_help_str(90)) for name, cmd in commands if cmd])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reject empty values, and insert ``run`` before options without a command."""
        for previous, argument in zip(["", *args], args, strict=False):
            if not argument or (argument.startswith("--") and argument.endswith("=")):
                name = argument.rstrip("=") or (previous if previous.startswith("-") else "an argument")
                fail(f"Error: {name} requires a value.", 2)
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Handle signals while the command is imported, and output that cannot be written."""
        try:
            with STOP.handle_signals():
                try:
                    return super().invoke(ctx)
                finally:  # a write error can still be reported
                    for stream in (sys.stdout, sys.stderr):
                        if stream is not None:
                            stream.flush()
        except KeyboardInterrupt:
            fail("\nStopped.", SIGINT_EXIT)
        except OSError as error:
            if error.errno not in SYSTEM_ERRORS | {errno.EPIPE} or error.filename is not None:
                raise
            _fail_on_output(error)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Escape what the output cannot encode, and report usage errors on the main process only."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        process.keep_freed_memory()
        process.limit_spinning()
        if process.is_main():
            return super().main(*args, **extra)
        try:
            return super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            sys.exit(error.exit_code)


HELP = """Distill a large pretrained vision network into a small one, as int8 ONNX.

\b
compress --teacher resnet50 --student mobilenetv2                 train on the built-in digits, in minutes
compress --teacher resnet50 --student mobilenetv2 --data photos/ --out runs/shop
compress predict runs/shop photo.jpg                              classify an image
compress validate runs/shop --data new-photos/                    measure accuracy on other labeled images
compress compare runs/*                                           compare runs
compress models 'mobilenet*'                                      list networks, sizes and licenses

Options without a command are options of `run`. See compress run --help.
"""


@click.group(
    cls=DefaultGroup,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="questpress", prog_name="compress")
def cli() -> None:
    """Dispatch to the commands."""
