"""Atomic writes, folder locks and checks of output folders."""

import csv
import errno
import io
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...export import files
from ...export.text import escape_controls
from ..errors import JobError, UsageError

_log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
DIGITS = "digits"
"""Name of the built-in data set."""

DATA_PACKAGES = {
    "torch": "torchvision",
    "hfds": "datasets",
    "hfids": "datasets",
    "wds": "webdataset",
    "tfds": "tensorflow_datasets",
}
"""The package that each kind of data set by name requires, such as torch/cifar100."""

FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")


def atomic_write(path: Path) -> AbstractContextManager[Path]:
    """Return ``export.files.atomic_write`` with JobError for a full disk and a read-only folder."""
    return files.atomic_write(path, JobError)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_if_changed(path: Path, text: str) -> None:
    """Write a text unless the file has it already, so that its modification time stays."""
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_text(path, text)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_writable(folder: Path, option: str = "--out") -> None:
    """Raise UsageError unless a folder can be written, or created. Nothing is written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        reason = errno.ENOTDIR if existing.exists() else errno.EEXIST
    elif os.access(existing, os.W_OK | os.X_OK):
        return
    else:
        read_only = hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY
        reason = errno.EROFS if read_only else errno.EACCES
    raise UsageError(f"{option} {folder} cannot be written: {os.strerror(reason)}. Choose another folder.")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock during the block, or raise JobError if another process holds it.

    The system releases it after a crash. If the file system does not support locks, this is logged and the
    block runs without one.
    """
    file_lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        file_lock.acquire()
    except Timeout as error:
        raise JobError(
            f"{folder} is in use by another process. Wait for it to finish, or set another --out."
        ) from error
    except (OSError, NotImplementedError) as error:
        _log.warning("%s cannot be locked (%s). Make sure that no other process uses it.", folder, error)
    try:
        yield
    finally:
        file_lock.release()


def link_or_copy(source: Path, target: Path) -> None:
    """Replace ``target`` by a hard link to ``source``, or by a copy on another disk."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def check_unlocked(folder: Path) -> None:
    """Raise JobError if another process holds the folder's lock. Nothing is written."""
    if (folder / LOCK_FILE).exists():
        with lock(folder):
            pass


def data_path(data: str | Path) -> Path | None:
    """Return the file or folder that ``--data`` names; None for the name of a data set.

    A folder of that name has to be written as a path, such as ./digits or digits/.
    """
    path = Path(data).expanduser()
    prefix, _, name = str(data).partition("/")
    is_name = data == DIGITS or (prefix.lower() in DATA_PACKAGES and name != "" and not path.is_file())
    return None if is_name and isinstance(data, str) and not data.endswith("/") else path


def data_text(data: str | Path) -> str:
    """Return ``--data`` as text; a Path is always a file or folder."""
    is_path = isinstance(data, Path) and data_path(str(data)) is None
    return f"./{data}" if is_path else str(data)


def describe_namesake(data: str) -> str | None:
    """Return a note if a folder has the name of the data set that ``--data`` names."""
    if data_path(data) is not None or not Path(data).is_dir():
        return None
    return f"--data {data} is the data set of this name. For the folder of the same name, write ./{data}."


def check_outside_data(data: str | Path, outputs: Mapping[str, Path | None]) -> None:
    """Raise UsageError if an output folder, by option, is in a folder of images."""
    data_folder = data_path(data)
    if data_folder is None or not data_folder.is_dir():
        return
    root = data_folder.resolve()
    for option, folder in outputs.items():
        if folder is None or not folder.expanduser().resolve().is_relative_to(root):
            continue
        parts = folder.expanduser().resolve().relative_to(root).parts
        if not any(part.startswith(".") for part in parts):  # hidden folders are not read
            raise UsageError(
                f"{option} {escape_controls(str(folder))} is inside the data folder "
                f"{escape_controls(str(data))}, where its files would be read as images. Set it to another "
                "folder."
            )


def escape_cell(cell: str) -> str:
    """Escape a CSV cell: formulas for spreadsheets, and control characters for terminals.

    Many spreadsheets separate cells at semicolons, within quotes too.
    """
    parts = cell.split(";")
    guarded = (f"'{part}" if part.lstrip(' "').startswith(FORMULA_PREFIXES) else part for part in parts)
    return escape_controls(";".join(guarded))


def to_csv(rows: Iterable[Iterable[object]]) -> str:
    """Return a CSV table with escaped cells; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([escape_cell(v) if isinstance(v, str) else v for v in row] for row in rows)
    return text.getvalue()


def command_line() -> str:
    """Return the command of this process, without the path of the script."""
    name = Path(sys.argv[0]).name or "python"
    program = ["python", "-m", "questpress.pipeline"] if name == "__main__.py" else [name]
    return shlex.join([*program, *sys.argv[1:]])


def shorten_paths(paths: Sequence[Path]) -> list[str]:
    """Return the shortest end of each path that no other one has."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        names.append("/".join(own[-length:]))
    return names
