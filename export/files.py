"""Atomic file writing and temporary folders."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ExportError

MIN_FREE_BYTES = 1 << 20
"""If this much cannot be written after a failure, the failure is reported as a full disk."""

_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def atomic_write(path: Path, error_class: type[Exception] = ExportError) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success flush it to the disk and rename it to `path`.

    If the block raises, `path` keeps its previous content. Raises `error_class` if the disk is full or the
    folder cannot be written. Errors that concern files elsewhere pass unchanged.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.chmod(0o666 & ~_UMASK)  # safetensors creates files that only their owner can read
        flush(part)
        part.replace(path)
        flush(path.parent)
    except Exception as error:
        os_error = _find_os_error(error)
        if os_error is None or hasattr(error, "exit_code") or not concerns(os_error, path.parent):
            raise
        raise error_class(
            f"Could not write {path}: {os_error.strerror or os_error}. Its previous content is unchanged."
        ) from error
    finally:
        with suppress(OSError):
            remove(part)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises ExportError."""
    with atomic_write(path) as part:
        part.write_bytes(content)


def _find_os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError behind an exception.

    torch's writer raises another error on top of it, and safetensors' only has its number in the text.
    """
    while error is not None and not isinstance(error, OSError):
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return error


def concerns(error: OSError, folder: Path) -> bool:
    """Return True if an error comes, or may come, from a path in `folder` and not from a file elsewhere."""
    if not isinstance(error.filename, str | bytes):
        return True
    path, folder = Path(os.fsdecode(error.filename)).absolute(), folder.absolute()
    return path == folder or folder in path.parents or path in folder.parents


def remove(path: Path) -> None:
    """Delete a file, or a folder with all its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file to the disk, or a folder's entries: without it a new name may be lost in a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder to flush it
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes writable files only
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a temporary folder that is deleted with the block.

    Raises ExportError if the disk is full: not every library's writer reports this, and a truncated file
    fails only when it is read.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="questpress-")
    except OSError as error:
        raise _disk_full(error.strerror or str(error)) from error
    with folder as name:
        try:
            yield Path(name)
        except Exception as error:
            if hasattr(error, "exit_code") or _has_free_space(Path(name)):
                raise
            raise _disk_full("the disk is full") from error


def _has_free_space(folder: Path) -> bool:
    try:
        (folder / "probe").write_bytes(bytes(MIN_FREE_BYTES))
        (folder / "probe").unlink()
    except OSError:
        return False
    return True


def _disk_full(reason: str) -> ExportError:
    return ExportError(
        f"Could not write temporary files to {tempfile.gettempdir()}: {reason}. Free some space, or set the "
        "environment variable TMPDIR to another folder."
    )
