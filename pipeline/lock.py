"""One process at a time works on a run folder; the system lets go of the lock when the process ends."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import JobError

_log = logging.getLogger(__name__)

FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock while the block runs. It is the system's own lock on a file, and so outlives no
    crash; where a file system has none, that is logged, and two processes are not told of each other.

    Raises:
        JobError: another process holds it.
    """
    with (folder / FILE).open("a+") as file:
        if not _take(file.fileno()):
            raise _busy(folder)
        with suppress(OSError):  # on a full disk nobody learns who it is; the lock holds all the same
            os.truncate(file.fileno(), 0)
            os.write(
                file.fileno(),
                json.dumps({"process": os.getpid(), "since": time.strftime("%H:%M:%S")}).encode(),
            )
        try:
            yield
        finally:
            os.truncate(file.fileno(), 0)


def refuse_locked(folder: Path) -> None:
    """Look whether the folder's lock is free, and write nothing.

    Raises:
        JobError: another process holds it.
    """
    if not (folder / FILE).exists():
        return
    with (folder / FILE).open("r+") as file:
        if not _take(file.fileno()):
            raise _busy(folder)


def _busy(folder: Path) -> JobError:
    return JobError(
        f"{folder} is being worked on by another process{_holder(folder)}: wait for it to end, or "
        "name another --out."
    )


def _take(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            # Beyond what is written, so that others can still read who it is.
            os.lseek(handle, 1 << 20, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # on NFS the one, on others the other
        return False
    except OSError as error:
        _log.warning("This file system has no locks (%s): see that no other process works here.", error)
        return True
    return True


def _holder(folder: Path) -> str:
    try:
        told = json.loads((folder / FILE).read_text())
        return f" (number {told['process']}, since {told['since']})"
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # it has only just taken it, or is about to end
        return ""
