"""WebDataset shards that are uncompressed local tar files: indexed once, then read at random.

A sample is defined as in timm's reader (``timm.data.readers.reader_wds``): consecutive files of the tar with
the same name up to the first dot. The image is its ``.jpg`` (or ``.jpeg``), ``.png`` or ``.webp``, or of
another format that is read. The class is the number in its ``.cls``, or in its ``.json`` under the split's
``alt_label``.
"""

import errno
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ....export.runtime import readable_formats
from ...errors import UsageError, is_system_fault
from ..dataset import Image, Progress, Skipped, Split, fail_to_read, printable
from .folders import HASHING_THREADS

INFO = ("_info.json", "info.json")
SYNONYMS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validation", "val", "valid"),
    "test": ("test",),
}
IMAGES = tuple(
    dict.fromkeys(("jpg", "jpeg", "png", "webp", *sorted(suffix[1:] for suffix in readable_formats())))
)
"""Endings of images, of which a sample's first one is read."""
MAX_CLASSES = 1_000_000
MAX_LABEL_BYTES = 1 << 20
"""Maximum size of a sample's ``.cls`` or ``.json``."""
_SAMPLE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_METADATA = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardSplit:
    """The shards of a split, and the field of the ``.json`` that holds the class ('' for ``.cls``)."""

    shards: tuple[Path, ...]
    label: str


def find_shards(folder: Path) -> dict[Split, ShardSplit] | None:
    """Return the splits that ``_info.json`` lists, or else the shards named ``train*.tar`` and so on.

    None if there is no train split, or a shard is not an uncompressed tar file.

    Raises:
        UsageError: ``_info.json`` names a file outside of ``folder``, or is of another form.
    """
    info = _read_info(folder)
    splits: dict[Split, ShardSplit] = {}
    for split, names in SYNONYMS.items():
        for name in names:
            if info is None:
                shards = ShardSplit(tuple(sorted(folder.glob(f"{name}[-_.0-9]*tar"))), "")
            elif name in info:
                shards = _parse_split(folder, name, info[name])
            else:
                continue
            for shard in shards.shards:
                _check_inside(folder, shard)
            if shards.shards:
                splits[split] = shards
                break
    plain = all(_is_plain_tar(shard) for shards in splits.values() for shard in shards.shards)
    return splits if "train" in splits and plain else None


def index_shards(
    splits: Mapping[Split, ShardSplit], progress: Progress | None = None
) -> tuple[dict[Split, list[Image]], list[Skipped]]:
    """Return the images in the order of shards and members, and the samples without an image or a class.

    Each shard is read through once.

    Raises:
        UsageError: a shard is damaged, or a label is not a number.
    """
    all_images: dict[Split, list[Image]] = {}
    all_skipped: list[Skipped] = []
    jobs = [(split, shard, shards.label) for split, shards in splits.items() for shard in shards.shards]
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        try:
            results = threads.map(lambda job: _index_shard(*job), jobs)
            for done, ((split, *_), (images, skipped)) in enumerate(zip(jobs, results, strict=True), 1):
                all_images.setdefault(split, []).extend(images)
                all_skipped.extend(skipped)
                if progress:
                    progress(done, len(jobs))
        finally:
            threads.shutdown(cancel_futures=True)
    return all_images, all_skipped


def find_unreadable_shard(folder: Path) -> Path | None:
    """Return the first shard that is compressed, empty or damaged."""
    return next((shard for shard in sorted(folder.glob("*.tar*")) if not _is_plain_tar(shard)), None)


def _read_info(folder: Path) -> dict[str, Any] | None:
    for name in INFO:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("splits"), dict):
            return dict(content["splits"])
    return None


def _parse_split(folder: Path, name: str, entry: Any) -> ShardSplit:
    files = entry.get("filenames", ()) if isinstance(entry, dict) else None
    if not isinstance(files, list | tuple) or not all(isinstance(file, str) for file in files):
        raise UsageError(
            f"{printable(str(folder))}: {INFO[0]} must list file names for the split '{name}'. Fix it."
        )
    return ShardSplit(tuple(folder / file for file in files), str(entry.get("alt_label", "") or ""))


def _check_inside(folder: Path, shard: Path) -> None:
    try:
        inside = shard.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # not a valid file name, or links in a circle
        inside = False
    if not inside:
        raise UsageError(
            f"The shard {printable(str(shard))} is outside of {printable(str(folder))}. Move it there."
        )


def _is_plain_tar(shard: Path) -> bool:
    try:
        with tarfile.open(shard, "r:"):
            return True
    except (OSError, ValueError, tarfile.TarError):
        return False


_Members = dict[str, tarfile.TarInfo]
"""The members of a sample by their ending."""


def _index_shard(split: Split, shard: Path, label: str) -> tuple[list[Image], list[Skipped]]:
    images, skipped = [], []
    try:
        with tarfile.open(shard, "r:") as tar, shard.open("rb") as stream:
            for sample, members in _group_samples(tar):
                name = printable(f"{split}/{shard.name}/{sample}")
                image = next((members[end] for end in IMAGES if end in members), None)
                number = _read_label(members, stream, label, name)
                if image is None or number is None:
                    skipped.append(Skipped(name, "it has no " + ("image" if image is None else "class")))
                elif image.sparse is not None:
                    skipped.append(Skipped(name, "a sparse file in a tar file"))
                else:
                    key = hashlib.sha256(_read_member(stream, image)).hexdigest()
                    source = partial(_read_span, shard, image.offset_data, image.size)
                    images.append(Image(f"{name}{Path(image.name).suffix}", number, key, source))
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        # A damaged header leads to a position that no file has (EINVAL).
        is_damage = getattr(error, "errno", None) in (errno.ENOENT, errno.EINVAL)
        if is_system_fault(error) and not is_damage:
            raise fail_to_read(printable(shard.name), error) from error
        raise UsageError(
            f"The shard {printable(str(shard))} is damaged ({error}). Download it again or remove it."
        ) from error
    return images, skipped


def _group_samples(tar: tarfile.TarFile) -> Iterator[tuple[str, _Members]]:
    sample, members = "", _Members()
    for member in tar:
        match = _SAMPLE.match(member.name)
        if not member.isreg() or match is None or _METADATA.match(member.name):
            continue
        if members and sample != match[1]:
            yield sample, members
            members = {}
        sample = match[1]
        members.setdefault(match[2].lower(), member)
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
    if members:
        yield sample, members
    # tarfile takes a truncated or damaged header for the end; the real end is zeros.
    stream: Any = tar.fileobj
    stream.seek(tar.offset)
    if any(stream.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError("it is truncated")


def _read_label(members: _Members, stream: BinaryIO, label: str, name: str) -> int | None:
    member = members.get("json" if label else "cls")
    if member is None:
        return None
    from timm.data.readers.targets import get_field

    if member.size > MAX_LABEL_BYTES:
        raise UsageError(f"The label of {name} is not a class number: it has {member.size:,} bytes.")
    text = _read_member(stream, member)
    try:
        number = int(text) if not label else int(get_field(json.loads(text), label))
    except KeyError:
        return None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"The label of {name} is not a class number ({str(error)[:200]}).") from error
    if number >= MAX_CLASSES:
        raise UsageError(f"The label of {name} must be less than {MAX_CLASSES:,}, got {number}.")
    return number


def _read_span(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) < size:
        raise OSError(f"{file.name} is shorter than before")
    return content


def _read_member(stream: BinaryIO, member: tarfile.TarInfo) -> bytes:
    # A damaged header may specify more bytes than the file has, or than fit in memory.
    if not 0 <= member.size <= os.fstat(stream.fileno()).st_size - member.offset_data:
        raise tarfile.ReadError("it is truncated")
    stream.seek(member.offset_data)
    return stream.read(member.size)
