"""Files that are written whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from ...export.files import flush
from ..errors import JobError
import logging
import time
from collections.abc import Mapping
from ...export.text import spelled_out
from ..errors import UsageError
import shlex
import sys



_MASK = os.umask(0)
os.umask(_MASK)
_MODE = 0o666 & ~_MASK  # safetensors makes files that only their owner can read


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; when the block ends well, the file written there is flushed to
    the disk and takes ``path``'s place in one step. When it does not, ``path`` stays as it was.

    Raises:
        JobError: the disk is full or the place cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _replace(part, path)
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None or hasattr(error, "exit_code") or not concerns(refusal, path.parent):
            raise
        raise JobError(
            f"Could not write {path}: {refusal.strerror or refusal}; what was there before is unchanged."
        ) from error
    finally:
        with suppress(OSError):  # where it could not be made, it cannot be removed either
            remove(part)


def _refusal(error: BaseException | None) -> OSError | None:
    """What the operating system said, where an error comes from that: torch's writer raises another error on
    top, and safetensors' has only its number in the text.
    """
    while error is not None and not isinstance(error, OSError):
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return error


def concerns(error: OSError, folder: Path) -> bool:
    """Whether an error is, or may be, of writing below a folder, and not of a file elsewhere."""
    if not isinstance(error.filename, str | bytes):
        return True
    named = Path(os.fsdecode(error.filename)).absolute()
    place = folder.absolute()
    return named == place or place in named.parents or named in place.parents


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


def _replace(part: Path, path: Path) -> None:
    part.chmod(_MODE)
    flush(part)
    part.replace(path)
    flush(path.parent)


def remove(path: Path) -> None:
    """A file, or a folder and all that is in it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def unwritable(folder: Path) -> str | None:
    """Why a folder cannot be written, or made where there is none; None where nothing is seen against it.
    Nothing is written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        return os.strerror(errno.ENOTDIR if there.exists() else errno.EEXIST)
    if os.access(there, os.W_OK | os.X_OK):
        return None
    read_only = hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if read_only else errno.EACCES)


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
