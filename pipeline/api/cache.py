"""List cached teacher outputs and prune the cache (`compress cache`)."""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..data.views import FIRST_LISTED
from ..errors import UsageError
from ..runs import record
from ..runs.cache import CHECKSUMS, Cache, discard
from ..runs.hashes import digest
from ..training.teacher_cache import ABOUT, KIND


class _Output(BaseModel):
    readout: str
    top: int | None = None


class _About(BaseModel):
    """The part of an entry's ``about.json`` that is listed."""

    teacher: str
    data: str
    source: Any
    output: _Output
    images: int
    view: int
    bytes_per_image: int
    lost_mass: float | None


@dataclass(frozen=True)
class CachedOutputs:
    """All cached views of one output of one teacher for one set of images."""

    teacher: str
    data: str
    readout: str
    top: int | None
    """Visual words kept per position; None for outputs that are not words."""
    views: int
    listed: bool
    """True if the views are the list of all different views, False if they are drawn at random."""
    images: int
    bytes_per_view: int
    bytes: int
    lost_mass: float | None
    """Largest mean fraction of p_T dropped in a view; None for outputs that are not words."""
    last_used: str


@dataclass(frozen=True)
class Pruned:
    """The result of ``prune_cache``, in entries and bytes."""

    entries: int
    removed: int
    in_use: int
    """Entries that could not be removed."""
    bytes_removed: int
    bytes_left: int


def list_cache(cache: Path | None = None) -> tuple[list[CachedOutputs], int]:
    """Return the cached teacher outputs, last used first, and the number of unreadable entries."""
    groups: dict[str, list[tuple[_About, int, float]]] = defaultdict(list)
    unreadable = 0
    for folder, used, size in _entries(outputs_folder(cache).glob("*")):
        try:
            about = _About.model_validate(record.read_json(folder / ABOUT))
        except (OSError, ValueError):
            unreadable += 1
            continue
        key = digest([about.source, about.images, about.output.model_dump()])
        groups[key].append((about, size, used))
    last_used_first = sorted(groups.values(), key=lambda group: -max(used for *_, used in group))
    return [_summarize(group) for group in last_used_first], unreadable


def _summarize(group: list[tuple[_About, int, float]]) -> CachedOutputs:
    about = group[0][0]
    return CachedOutputs(
        teacher=about.teacher,
        data=about.data,
        readout=about.output.readout,
        top=about.output.top,
        views=len(group),
        listed=all(entry.view >= FIRST_LISTED for entry, *_ in group),
        images=about.images,
        bytes_per_view=about.images * about.bytes_per_image,
        bytes=sum(size for _, size, _ in group),
        lost_mass=max((entry.lost_mass for entry, *_ in group if entry.lost_mass is not None), default=None),
        last_used=time.strftime("%Y-%m-%d %H:%M", time.localtime(max(used for *_, used in group))),
    )


def prune_cache(keep: int, cache: Path | None = None) -> Pruned:
    """Remove the least recently used entries until at most ``keep`` bytes are left.

    Entries are teacher outputs, decoded images, trained and exported teachers, and vocabularies.
    """
    entries = sorted(_all_entries(cache), key=lambda entry: (entry[1], entry[0].name))
    total = left = sum(size for *_, size in entries)
    removed = in_use = 0
    for folder, _, size in entries:
        if left <= keep:
            break
        if discard(folder):
            left, removed = left - size, removed + 1
        else:
            in_use += 1
    return Pruned(len(entries), removed, in_use, total - left, left)


def measure_cache(cache: Path | None = None) -> int:
    """Return the bytes of all entries."""
    return sum(size for *_, size in _all_entries(cache))


def outputs_folder(cache: Path | None = None) -> Path:
    """Return the folder of cached teacher outputs."""
    return Cache(cache).root / KIND


def _all_entries(cache: Path | None) -> Iterator[tuple[Path, float, int]]:
    # A folder without checksums is not an entry, even if --cache names a folder that holds other files.
    return _entries(file.parent for file in Cache(cache).root.glob(f"*/*/{CHECKSUMS}"))


def _entries(folders: Iterable[Path]) -> Iterator[tuple[Path, float, int]]:
    """Yield the folder, last use (seconds since 1970) and bytes of each entry."""
    for entry in sorted(folders):
        if entry.name.startswith(".") or not entry.is_dir():
            continue  # being written or removed
        try:
            size = sum(file.stat().st_size for file in entry.iterdir())
            checksums = entry / CHECKSUMS
            used = (checksums if checksums.exists() else entry).stat().st_mtime
        except OSError:
            continue  # another process has just removed it
        yield entry, used, size


def parse_size(text: str) -> int:
    """Return the bytes of ``10GB``, ``500 MB``, ``2GiB``, ``1.5T`` or ``0``, or raise UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if match is None:
        raise UsageError(f"--keep must be a size such as 10GB, 500MB or 0, got {text}.")
    prefix = match[2] or ""
    return int(float(match[1]) * (1024 if prefix[1:] else 1000) ** " KMGT".index(prefix[:1] or " "))
