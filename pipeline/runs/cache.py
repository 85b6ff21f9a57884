"""What several runs share: files kept under the hash of what they were made from, and verified when read."""

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from ...export.files import concerns, flush
from ..errors import JobError
from .files import sha256

_log = logging.getLogger(__name__)

CHECKSUMS = "sha256.json"
# What a killed process left half-written is swept up by later ones after this many seconds.
STALE = 24 * 3600


class Cache:
    """A folder of entries ``KIND/KEY/``, each with the checksums of its files.

    An entry appears whole or not at all, also with several processes at once: it is written beside its place
    and then renamed. It is never trusted unverified: ``get`` compares every checksum, and removes an entry
    that doesn't hold, so that it is made again.

    Where the folder cannot be written (or the disk is full), that is logged once and entries live in a
    temporary folder until the process ends.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is None:
            import platformdirs

            root = Path(platformdirs.user_cache_dir("questpress", appauthor=False))
        self.root = root
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def get(self, kind: str, key: str) -> Path | None:
        """The folder of an entry whose every file is as it was written, or None."""
        place = self.root / kind / key
        if self._temporary and not os.path.isdir(place):  # noqa: PTH112
            place = Path(self._temporary.name) / kind / key
        if not os.path.isdir(place):  # noqa: PTH112 (Path.is_dir raises where a folder may not be entered)
            return None
        if trouble := _damage(place):
            _log.warning("The cache entry %s %s; it is removed and made again.", place, trouble)
            _discard(place)
            return None
        return place

    def has(self, kind: str, key: str) -> bool:
        """Whether there is an entry, unverified: ``get`` may find that it doesn't hold."""
        return (self.root / kind / key).is_dir()

    def put(self, kind: str, key: str, write: Callable[[Path], None]) -> Path:
        """Make an entry: ``write`` fills the empty folder it is given. Gives the entry's folder.

        Whatever ``write`` raises is passed on, except that an ``OSError`` is answered by a second try in a
        temporary folder. When another process was quicker, its entry stays and is the one returned.

        Raises:
            JobError: the temporary folder cannot be written either.
        """
        try:
            return _put(self.root, kind, key, write)
        except OSError as error:
            if not concerns(error, self.root):
                raise
            if self._temporary is None:
                _log.warning(
                    "The cache folder %s cannot be written (%s); nothing is kept. --cache names another.",
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
                f"({error.strerror or error}); free some space or name another folder with --cache."
            ) from error


def _put(root: Path, kind: str, key: str, write: Callable[[Path], None]) -> Path:
    place = root / kind / key
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place.parent)
    part = place.with_name(f".{key}.{uuid.uuid4().hex}.part")
    try:
        part.mkdir()
        write(part)
        checksums = {file.relative_to(part).as_posix(): sha256(file) for file in _files(part)}
        (part / CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
        _flush(part)
        settled = _settle(part, place)
        flush(place.parent)
        return settled
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _settle(part: Path, place: Path) -> Path:
    """Rename the new entry into its place, unless a whole one stands there already."""
    for _ in range(3):
        try:
            return part.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            if _damage(place) is None:
                return place
            _discard(place)
    return part.rename(place)


def _damage(place: Path) -> str | None:
    """What is wrong with an entry, if anything."""
    try:
        checksums = json.loads((place / CHECKSUMS).read_text(encoding="utf-8"))
        files = {file.relative_to(place).as_posix(): file for file in _files(place)}
        if files.keys() != checksums.keys():
            return "has lost or gained files"
        damaged = [name for name, file in files.items() if sha256(file) != checksums[name]]
        return f"is damaged ({damaged[0]} has changed)" if damaged else None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"cannot be read ({error})"


def _discard(place: Path) -> None:
    """Remove an entry; renamed first, so that no other process sees half of it."""
    gone = place.with_name(f".{place.name}.{uuid.uuid4().hex}.gone")
    try:
        place.rename(gone)
    except OSError:
        return  # another process was quicker, or the cache is read-only: `put` finds that out
    shutil.rmtree(gone, ignore_errors=True)


def _sweep(folder: Path) -> None:
    for left in [*folder.glob(".*.part"), *folder.glob(".*.gone")]:
        try:
            old = time.time() - left.stat().st_mtime > STALE
        except OSError:
            continue  # its owner has just finished
        if old:
            shutil.rmtree(left, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / CHECKSUMS]


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        flush(file)
    flush(folder)
