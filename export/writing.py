"""Files that are written whole or not at all: what has the name is complete, and on the disk."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ExportError


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to the disk, and take `path`'s place in one step.

    Raises ExportError where that fails; what was there before is unchanged then.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        flush_folder(path.parent)
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from error


def flush_folder(folder: Path) -> None:
    """Bring a folder's list of files to the disk, without which a new name may be gone after a power cut."""
    if os.name == "nt":  # it cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
