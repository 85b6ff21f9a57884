"""What goes wrong for the user is one sentence and an exit code; what went well is shown by the report."""

import errno
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

from ...export.text import spelled_out
from ..errors import out_of_memory
from ..runs import main_process
from ..runs.interrupt import STOP, TIME_LIMIT_EXIT, TimeLimit

if TYPE_CHECKING:
    from ..runs.results import Report

T = TypeVar("T")

OF_THE_SYSTEM = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENXIO", "ENODEV", "EBUSY",
        "ETIMEDOUT", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP", "EMFILE", "ENFILE", "ENOMEM",
    )
    if hasattr(errno, name)
}  # fmt: skip
"""What the file system refuses to anybody; other numbers, such as a file that is not there, tell of a defect
of ours, which wants a traceback."""


def told(job: Callable[[], T], *, resumes: bool = False) -> T:
    """Run a job; what goes wrong for the user is one sentence and an exit code, not a traceback.

    ``resumes``: whether the same command goes on where it was stopped.
    """
    try:
        # A scheduler or a container that wants its machine back says SIGTERM; that is Ctrl-C from afar.
        with STOP.listens():
            return job()
    except TimeLimit:
        ended(
            "\nStopped: the --time-limit is reached. The same command goes on where this one was.",
            TIME_LIMIT_EXIT,
        )
    except KeyboardInterrupt:
        ended("\nStopped." + (" The same command goes on where this one was." if resumes else ""), 130)
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM:
            raise
        ended(f"Error: {error.filename or 'a file'}: {error.strerror}; what was there is unchanged.", 1)
    except Exception as error:
        # The rooms have error classes of their own; each tells its exit code.
        code = getattr(error, "exit_code", None)
        if code is not None:
            ended(f"Error: {error}", code)
        if out_of_memory(error):
            ended(
                "Error: there is not enough memory here for it: end other programs, or take smaller images "
                "(--image-size), parts of steps (--micro-batch) or networks.",
                1,
            )
        if main_process.first_to_end():
            raise
        sys.exit(1)  # this process has lost the one that has told why


def written() -> None:
    """Bring what was printed out of this process, while it can still be told that it cannot be."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def unwritten(error: OSError) -> NoReturn:
    """End where the answers cannot be printed: their disk is full, or whoever read them has gone."""
    if sys.stdout is not None:  # or the interpreter tries once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        sys.exit(1)
    ended(f"Error: the output cannot be written: {error.strerror}.", 1)


def ended(sentence: str, code: int) -> NoReturn:
    if main_process.first_to_end():
        click.echo(_readable(sentence), err=True)
    sys.exit(code)


LONGEST = 4000
"""Characters of a sentence: a name in it may come from a file, and be of any length."""


def _readable(sentence: str) -> str:
    if len(sentence) > LONGEST:
        sentence = f"{sentence[: LONGEST * 3 // 4]} … {sentence[-LONGEST // 4 :]}"
    return spelled_out(sentence, but="\n")


def show_report(report: "Report", *, as_json: bool) -> None:
    from ..report.terminal import show

    if as_json:
        click.echo(report.model_dump_json(indent=2, by_alias=True))
    elif report.stages:
        show(report)
