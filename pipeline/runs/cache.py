"""The cache shared by runs: entries named by the hash of their inputs, verified on every read."""

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ...export.files import concerns, flush
from ..errors import JobError
from .hashes import sha256

_log = logging.getLogger(__name__)

CHECKSUMS = "sha256.json"

STALE_SECONDS = 24 * 3600
"""Age after which the unfinished entry of a killed process is removed."""


class Cache:
    """A folder of entries ``KIND/KEY/``, each with the checksums of its files.

    An entry is written to a temporary folder and then renamed, so it is complete or absent even if several
    processes write it. ``get`` verifies every checksum and removes a damaged entry, which is then made again.

    If the folder cannot be written or the disk is full, this is logged once and entries are kept in a
    temporary folder until the process ends.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is None:
            import platformdirs

            root = Path(platformdirs.user_cache_dir("questpress", appauthor=False))
        self.root = root
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def get(self, kind: str, key: str) -> Path | None:
        """Return the folder of an entry with valid checksums, or None.

        Raises:
            JobError: the machine cannot read it, which is no reason to remove it.
        """
        folder = self.root / kind / key
        # Path.is_dir raises if a parent folder may not be entered.
        if self._temporary and not os.path.isdir(folder):  # noqa: PTH112
            folder = Path(self._temporary.name) / kind / key
        if not os.path.isdir(folder):  # noqa: PTH112
            return None
        try:
            damage = _find_damage(folder)
        except (OSError, MemoryError) as error:  # no sign of damage, and an entry may be worth hours
            raise JobError(
                f"The cache entry {folder} could not be read ({error}). It is kept. Run the same command "
                "again, or set another folder with --cache."
            ) from error
        if damage:
            _log.warning("The cache entry %s %s. It is removed and made again.", folder, damage)
            discard(folder)
            return None
        with suppress(OSError):  # a read-only cache
            (folder / CHECKSUMS).touch()  # last use, for `compress cache prune`
        return folder

    def has(self, kind: str, key: str) -> bool:
        """Return True if there is an entry, without verifying it."""
        return os.path.isdir(self.root / kind / key)  # noqa: PTH112

    def read_all(self, kind: str) -> Iterator[Path]:
        """Yield the folders of all entries of a kind, as ``get`` returns them."""
        roots = [self.root, *([Path(self._temporary.name)] if self._temporary else [])]
        for key in [path.name for root in roots for path in sorted((root / kind).glob("[!.]*"))]:
            if (folder := self.get(kind, key)) is not None:
                yield folder

    def put(self, kind: str, key: str, write: Callable[[Path], None]) -> Path:
        """Make an entry and return its folder, or that of another process that wrote it first.

        Args:
            kind: the subfolder.
            key: a hash of everything that the content depends on.
            write: fills an empty folder. It is called a second time, with a temporary folder, if the cache
                cannot be written.
        """
        try:
            return _put(self.root, kind, key, write)
        except OSError as error:
            if not concerns(error, self.root):
                raise
            if self._temporary is None:
                _log.warning(
                    "The cache folder %s cannot be written (%s), so nothing is cached. "
                    "Set another folder with --cache.",
                    self.root,
                    error.strerror or error,
                )
                self._temporary = tempfile.TemporaryDirectory(prefix="questpress-")
        try:
            return _put(Path(self._temporary.name), kind, key, write)
        except OSError as error:
            if not concerns(error, Path(self._temporary.name)):
                raise
            raise JobError(
                f"Neither the cache folder {self.root} nor {self._temporary.name} can be written "
                f"({error.strerror or error}). Free disk space or set another folder with --cache."
            ) from error


def _put(root: Path, kind: str, key: str, write: Callable[[Path], None]) -> Path:
    folder = root / kind / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    part = folder.with_name(f".{key}.{uuid.uuid4().hex}.part")
    try:
        part.mkdir()
        write(part)
        checksums = {file.relative_to(part).as_posix(): sha256(file) for file in _files(part)}
        (part / CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
        for path in (*part.rglob("*"), part):
            flush(path)
        placed = _rename(part, folder)
        flush(folder.parent)
        return placed
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _rename(part: Path, folder: Path) -> Path:
    """Rename a new entry to its final name, unless a valid entry exists there already."""
    for _ in range(3):
        try:
            return part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            if _find_damage(folder) is None:
                return folder
            discard(folder)
    return part.rename(folder)


def _find_damage(folder: Path) -> str | None:
    """Return what is wrong with an entry, or None; raise OSError if the machine cannot read it."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        files = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
        if files.keys() != checksums.keys():
            return "has missing or additional files"
        damaged = [name for name, file in files.items() if sha256(file) != checksums[name]]
        return f"is damaged ({damaged[0]} has changed)" if damaged else None
    except (
        FileNotFoundError, NotADirectoryError, IsADirectoryError,
        ValueError, AttributeError, TypeError, RecursionError,
    ) as error:  # fmt: skip
        return f"cannot be read ({error})"


def discard(folder: Path) -> bool:
    """Remove an entry and return True, or False if it is in use or the cache is read-only.

    The entry is renamed first, so that no other process finds half of it. A process that has mapped its files
    into memory can continue to read them, except on Windows, which refuses to remove them.
    """
    discarded = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.gone")
    try:
        folder.rename(discarded)
    except OSError:
        return not folder.exists()
    shutil.rmtree(discarded, ignore_errors=True)
    return True


def _remove_stale(folder: Path) -> None:
    for left in [*folder.glob(".*.part"), *folder.glob(".*.gone")]:
        with suppress(OSError):  # its process has just finished
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    # Path.rglob would leave out what it cannot list.
    walk = os.walk(folder, onerror=fail)
    files = sorted(Path(parent) / name for parent, _, names in walk for name in names)
    return [file for file in files if file != folder / CHECKSUMS]
