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

_MASK = os.umask(0)
os.umask(_MASK)
_MODE = 0o666 & ~_MASK  # safetensors makes files that only their owner can read


@contextmanager
def whole(path: Path) -> Iterator[Path]:
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
    with whole(path) as part:
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
