"""Map exceptions to error messages and exit codes."""

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import click

from ...export.text import escape_controls
from ..errors import is_out_of_memory
from ..runs import process
from ..runs.process import STOP, TIME_LIMIT_EXIT, TimeLimit

T = TypeVar("T")

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
    """Run a job and turn its errors into one message and an exit code.

    Args:
        job: the function to call.
        resumable: True if running the same command again resumes the job.
    """
    resume = " Run the same command again to resume." if resumable else ""
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


def flush_output() -> None:
    """Flush what was printed, so that a write error can still be reported."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def fail_on_output(error: OSError) -> NoReturn:
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
