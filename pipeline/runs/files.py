"""Files that are written whole or not at all."""

import errno
import hashlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from ...export import files
from ...export.text import spelled_out
from ..errors import JobError, UsageError


def atomic_write(path: Path) -> AbstractContextManager[Path]:
    """Return ``export.files.atomic_write`` with the pipeline's error class.

    Raises:
        JobError: the disk is full or the folder cannot be written.
    """
    return files.atomic_write(path, JobError)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_changed(path: Path, text: str) -> None:
    """Write a text unless it stands there already: then the file keeps its time of change."""
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_text(path, text)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: Any) -> str:
    """SHA-256 of a JSON-like value in its canonical form: the key of stages and cache entries."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_writable(folder: Path, option: str = "--out") -> None:
    """Check that a folder can be written, or created. Nothing is written.

    Raises:
        UsageError: it cannot.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        reason = errno.ENOTDIR if existing.exists() else errno.EEXIST
    elif os.access(existing, os.W_OK | os.X_OK):
        return
    else:
        read_only = hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY
        reason = errno.EROFS if read_only else errno.EACCES
    raise UsageError(f"{option} {folder} cannot be written: {os.strerror(reason)}. Choose another folder.")


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


def refuse_inside_data(data: str | Path, written: Mapping[str, Path | None]) -> None:
    """
    Args:
        data: what ``--data`` names.
        written: the folders to write to, by their options.

    Raises:
        UsageError: one of them lies in the data folder, where the next command would take it for a class.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return
    inside = folder.resolve()
    for option, place in written.items():
        if place is None or not place.expanduser().resolve().is_relative_to(inside):
            continue
        below = place.expanduser().resolve().relative_to(inside)
        if not any(part.startswith(".") for part in below.parts):  # hidden folders are passed over
            raise UsageError(
                f"{option} {spelled_out(str(place))} lies in the data folder {spelled_out(str(data))}, "
                f"where it would be taken for a class; name a folder elsewhere with {option}."
            )


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of one."""


def harmless(cell: str) -> str:
    """The cell; with an apostrophe before it where a spreadsheet would compute it, and without characters
    that would steer the terminal of whoever looks at the file.
    """
    guarded = f"'{cell}" if cell.lstrip(" ").startswith(FORMULA) else cell
    return spelled_out(guarded)


def command() -> str:
    """The command line of this process; a script's own path is of no use elsewhere."""
    name = Path(sys.argv[0]).name or "python"
    begun = ["python", "-m", "questpress.pipeline"] if name == "__main__.py" else [name]
    return shlex.join([*begun, *sys.argv[1:]])
