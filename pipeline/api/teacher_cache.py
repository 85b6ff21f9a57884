"""What lies in the store, and making room: ``compress store list`` and ``compress store prune``."""

import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.views import LISTED
from ..errors import UsageError
from ..report import format
from ..runs import record
from ..runs.cache import Cache
from ..runs.console import safe_console
from ..runs.files import digest
from ..training.teacher_cache import ABOUT, KIND


class _Answer(BaseModel):
    readout: str
    top: int | None = None


class _About(BaseModel):
    """The form of what an entry says of itself, as far as it is listed."""

    teacher: str
    data: str
    source: Any
    answer: _Answer
    images: int
    view: int
    bytes_per_image: int
    lost_mass: float | None


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Stored:
    """All views of one part of one teacher's answers to one set of images."""

    teacher: str
    data: str
    readout: str
    top: int | None
    """m, where the answers are words."""
    views: int
    listed: bool
    """Whether these are from the list of all different views, and not fixed ones in turn."""
    images: int
    bytes_per_view: int
    bytes: int
    lost_mass: float | None
    """The largest mean share of p_T that a view has lost, where the answers are words."""
    last_used: str


def list_store(cache: Cache, *, as_json: bool) -> None:
    """Print what is stored, one line for each teacher, data and readout; the last used comes first."""
    found, broken = stored(cache)
    console = _console()
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    if not found:
        console.print(Text(f"No answers are stored in {cache.root / KIND}."))
    else:
        console.print(_table(found))
        total = sum(one.bytes for one in found)
        console.print(
            Text(f"{format.megabytes(total)} in all, in {cache.root / KIND}"), style="dim", soft_wrap=True
        )
    if broken:
        console.print(
            Text(f"{broken} of the entries cannot be read; a run that wants one makes it anew."),
            soft_wrap=True,
        )


def _console() -> Console:
    console = safe_console(highlight=False)
    # What is read by a program or a file's reader is not folded to the width of a terminal.
    return console if console.is_terminal else safe_console(highlight=False, width=160)


def _table(found: list[Stored]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("teacher", "data", "readout"):
        table.add_column(column, overflow="fold", min_width=5)
    for column in ("top", "views", "images", "a view", "in all", "p_T lost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for one in found:
        table.add_row(
            Text(one.teacher),
            Text(one.data),
            Text(one.readout),
            "–" if one.top is None else str(one.top),
            f"{one.views:,}{' (listed)' if one.listed else ''}",
            f"{one.images:,}",
            format.megabytes(one.bytes_per_view),
            format.megabytes(one.bytes),
            "–" if one.lost_mass is None else f"{format.significant(100 * one.lost_mass)} %",
            one.last_used,
        )
    return table


def stored(cache: Cache) -> tuple[list[Stored], int]:
    """What is stored, the last used first, and how many entries cannot be read."""
    groups: dict[str, list[tuple[Mapping[str, Any], int, float]]] = {}
    broken = 0
    for folder, used, size in entries(cache):
        try:
            about = record.read(folder / ABOUT)
            _About.model_validate(about)
        except (OSError, ValueError):
            broken += 1
            continue
        of_what = {"source": about["source"], "images": about["images"], "answer": about["answer"]}
        groups.setdefault(digest(of_what), []).append((about, size, used))
    found = sorted(groups.values(), key=lambda group: -max(used for *_, used in group))
    return [_stored(group) for group in found], broken


def _stored(group: list[tuple[Mapping[str, Any], int, float]]) -> Stored:
    about = group[0][0]
    lost = [each["lost_mass"] for each, *_ in group if each["lost_mass"] is not None]
    last = max(used for *_, used in group)
    return Stored(
        teacher=about["teacher"],
        data=about["data"],
        readout=about["answer"]["readout"],
        top=about["answer"].get("top"),
        views=len(group),
        listed=all(each["view"] >= LISTED for each, *_ in group),
        images=about["images"],
        bytes_per_view=about["images"] * about["bytes_per_image"],
        bytes=sum(size for _, size, _ in group),
        lost_mass=max(lost, default=None),
        last_used=time.strftime("%Y-%m-%d %H:%M", time.localtime(last)),
    )


def prune(cache: Cache, keep: int) -> None:
    """Remove what was used longest ago until no more than ``keep`` bytes are left, and say so."""
    found = sorted(entries(cache), key=lambda entry: (entry[1], entry[0].name))
    left, removed, freed, held = sum(size for *_, size in found), 0, 0, 0
    for folder, _, size in found:
        if left <= keep:
            break
        if not remove(folder):
            held += 1
            continue
        left, removed, freed = left - size, removed + 1, freed + size
    console = _console()
    told = f"Removed {removed:,} of {len(found):,} entries ({format.megabytes(freed)}); "
    told += f"{format.megabytes(left)} are left."
    if held:
        told += f" {held:,} could not be removed: they are in use, or {cache.root / KIND} cannot be written."
    console.print(Text(told), soft_wrap=True)


def entries(cache: Cache) -> Iterator[tuple[Path, float, int]]:
    """Each entry's folder, when it was last used (seconds since 1970) and its bytes."""
    place = cache.root / KIND
    for folder in sorted(place.iterdir()) if place.is_dir() else []:
        if folder.name.startswith(".") or not folder.is_dir():
            continue  # being written or removed
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            about = folder / ABOUT
            used = (about if about.exists() else folder).stat().st_mtime
        except OSError:
            continue  # another process has just removed it
        yield folder, used, size


def remove(folder: Path) -> bool:
    """Remove an entry. It is renamed first, so that no other process finds half of it; one that reads it goes
    on reading, since what is mapped into memory stays. On Windows what is being read cannot be removed.
    """
    gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.gone")
    try:
        folder.rename(gone)
    except OSError:
        return not folder.exists()
    shutil.rmtree(gone, ignore_errors=True)
    return True


def size(text: str) -> int:
    """Bytes, from ``10GB``, ``500 MB``, ``2GiB``, ``1.5T`` or ``0``.

    Raises:
        UsageError: this is no size.
    """
    told = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if told is None:
        raise UsageError(f"--keep {text}: say how much to keep, as in 10GB, 500MB or 0.")
    return int(float(told[1]) * (_UNITS | _BINARY)[told[2] or ""])
