"""WebDataset shards that are plain tar files on this machine: indexed once, then read at random.

What a sample is, is as in timm's reader (``timm.data.readers.reader_wds``): files of one name up to the first
dot, one after the other in the tar; the image is its ``.jpg`` (or ``.jpeg``), ``.png`` or ``.webp``, the
class the number in its ``.cls``, or in its ``.json`` under the split's ``alt_label``.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..dataset import Image, Progress, Split, Skipped, Span, printable

INFO = ("_info.json", "info.json")
SYNONYMS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validation", "val", "valid"),
    "test": ("test",),
}
IMAGES = ("jpg", "jpeg", "png", "webp")
# Hashing waits for the disk as much as for the processor.
THREADS = 8
MOST_CLASSES = 1_000_000
LARGEST_TEXT = 1 << 20
"""Bytes of a sample's ``.cls`` or ``.json``."""
_SAMPLE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_APART = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardSplit:
    """The shards of a role, and the field of the ``.json`` that holds the class ('' for ``.cls``)."""

    shards: tuple[Path, ...]
    label: str


@dataclass
class Indexed:
    """What shards hold; ``skipped`` are samples without an image or a class."""

    given: dict[Split, list[Image]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def local_splits(folder: Path) -> dict[Split, ShardSplit] | None:
    """The splits that ``_info.json`` lists, or else the shards that are called ``train*.tar`` and so on; None
    where there are none, or some of them are no plain tar files.

    Raises:
        UsageError: ``_info.json`` names a file outside of ``folder``, or is of another form.
    """
    listed = _listed(folder)
    splits: dict[Split, ShardSplit] = {}
    for role, names in SYNONYMS.items():
        for name in names:
            if listed is None:
                shards, label = tuple(sorted(folder.glob(f"{name}[-_.0-9]*tar"))), ""
            elif name in listed:
                shards, label = _of_split(folder, name, listed[name])
            else:
                continue
            for shard in shards:
                _refuse_outside(folder, shard)
            if shards:
                splits[role] = ShardSplit(shards, label)
                break
    if "train" not in splits or not all(_plain(shard) for split in splits.values() for shard in split.shards):
        return None
    return splits


def index(splits: Mapping[Split, ShardSplit], progress: Progress | None = None) -> Indexed:
    """Every labelled image, in the order of shards and members. Each shard is read through once.

    Raises:
        UsageError: a shard is damaged, or a label is no number.
    """
    found = Indexed()
    jobs = [(role, shard, split.label) for role, split in splits.items() for shard in split.shards]
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            for done, ((role, *_), (images, skipped)) in enumerate(
                zip(jobs, threads.map(lambda job: _samples(*job), jobs), strict=True), 1
            ):
                found.given.setdefault(role, []).extend(images)
                found.skipped.extend(skipped)
                if progress:
                    progress(done, len(jobs))
        finally:
            threads.shutdown(cancel_futures=True)
    return found


def not_plain(folder: Path) -> Path | None:
    """The first shard that is packed, empty or damaged."""
    return next((shard for shard in sorted(folder.glob("*.tar*")) if not _plain(shard)), None)


def _listed(folder: Path) -> dict[str, Any] | None:
    for name in INFO:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("splits"), dict):
            return dict(content["splits"])
    return None


def _of_split(folder: Path, name: str, said: Any) -> tuple[tuple[Path, ...], str]:
    files = said.get("filenames", ()) if isinstance(said, dict) else None
    if not isinstance(files, list | tuple) or not all(isinstance(file, str) for file in files):
        raise UsageError(
            f"{printable(str(folder))}: the list of shards names no files for the split '{name}'; make it "
            "anew."
        )
    return tuple(folder / file for file in files), str(said.get("alt_label", "") or "")


def _refuse_outside(folder: Path, shard: Path) -> None:
    try:
        inside = shard.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # no name of a file, or links in a circle
        inside = False
    if not inside:
        raise UsageError(
            f"The shard {printable(str(shard))} is not in {printable(str(folder))}, and nothing outside of "
            "it is read; put it there."
        )


def _plain(shard: Path) -> bool:
    try:
        with tarfile.open(shard, "r:"):
            return True
    except (OSError, ValueError, tarfile.TarError):
        return False


@dataclass
class _Sample:
    """The members of one sample, by their ending."""

    name: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def _samples(role: Split, shard: Path, label: str) -> tuple[list[Image], list[Skipped]]:
    images, skipped = [], []
    try:
        with tarfile.open(shard, "r:") as tar, shard.open("rb") as stream:
            for sample in _grouped(tar):
                name = printable(f"{role}/{shard.name}/{sample.name}")
                image = next((sample.members[end] for end in IMAGES if end in sample.members), None)
                number = _label(sample, stream, label, name)
                if image is None or number is None:
                    skipped.append(Skipped(name, "has no " + ("image" if image is None else "class")))
                elif image.sparse is not None:
                    skipped.append(Skipped(name, "a sparse file in a tar file"))
                else:
                    key = hashlib.sha256(_content(stream, image)).hexdigest()
                    source = Span(shard, image.offset_data, image.size)
                    images.append(Image(f"{name}{Path(image.name).suffix}", number, key, source))
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        raise UsageError(
            f"The shard {printable(str(shard))} is damaged ({error}); fetch it again or take it out."
        ) from error
    return images, skipped


def _grouped(tar: tarfile.TarFile) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for member in tar:
        matched = _SAMPLE.match(member.name)
        if not member.isreg() or matched is None or _APART.match(member.name):
            continue
        name, ending = matched[1], matched[2].lower()
        if sample is None or sample.name != name:
            if sample is not None:
                yield sample
            sample = _Sample(name)
        sample.members.setdefault(ending, member)
        tar.members = []  # type: ignore[attr-defined]  # it would keep them all
    if sample is not None:
        yield sample
    # A header that is cut off or damaged counts as the end for tarfile; the end is zeros.
    stream: Any = tar.fileobj
    stream.seek(tar.offset)
    if any(stream.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError("it ends in the middle of a file")


def _label(sample: _Sample, stream: Any, label: str, name: str) -> int | None:
    member = sample.members.get("json" if label else "cls")
    if member is None:
        return None
    if member.size > LARGEST_TEXT:
        raise UsageError(f"The label of {name} is no class number: it has {member.size:,} bytes.")
    text = _content(stream, member)
    try:
        number = int(text) if not label else _in_json(text, label)
    except KeyError:
        return None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"The label of {name} is no class number ({str(error)[:200]}).") from error
    if number >= MOST_CLASSES:
        raise UsageError(f"The label of {name} is {number}, and there are {MOST_CLASSES:,} classes at most.")
    return number


def _in_json(text: bytes, label: str) -> int:
    from timm.data.readers.targets import get_field

    return int(get_field(json.loads(text), label))


def _content(stream: Any, member: tarfile.TarInfo) -> bytes:
    # Not what the header says, for which there may be neither bytes nor memory.
    if not 0 <= member.size <= os.fstat(stream.fileno()).st_size - member.offset_data:
        raise tarfile.ReadError("it ends in the middle of a file")
    stream.seek(member.offset_data)
    content: bytes = stream.read(member.size)
    return content
