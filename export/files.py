"""Files that are written whole or not at all: what has the name is complete, and on the disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError

LEAST_ROOM = 1 << 20
"""Bytes that must still fit where a writer failed: else that is why."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, gone with the block.

    Raises ExportError where there is no room for it: not every library's writer says so by itself, and what
    it has cut short fails only when it is read.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="questpress-")
    except OSError as error:
        raise ExportError(_no_room(error.strerror or str(error))) from error
    with folder as name:
        try:
            yield Path(name)
        except Exception as error:
            if hasattr(error, "exit_code") or _has_room(Path(name)):
                raise
            raise ExportError(_no_room("the disk is full")) from error


def _has_room(folder: Path) -> bool:
    try:
        (folder / "room").write_bytes(bytes(LEAST_ROOM))
        (folder / "room").unlink()
    except OSError:
        return False
    return True


def _no_room(why: str) -> str:
    return (
        f"there is no room for temporary files in {tempfile.gettempdir()} ({why}): free some, or name "
        "another folder by the environment variable TMPDIR"
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to the disk, and take `path`'s place in one step.

    Raises ExportError where that fails; what was there before is unchanged then.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            part.write_bytes(content)
            flush(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        flush(path.parent)
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from error


def flush(path: Path) -> None:
    """Bring a file to the disk, or a folder's list of files, without which a new name may be gone after a
    power cut.
    """
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder to flush it
    # Windows flushes what may be written alone.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
