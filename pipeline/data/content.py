"""Files become images: each is hashed once, and what cannot be taken is told."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .dataset import Image, Progress, Role, Skipped, printable, refuse_large

# Hashing waits for the disk as much as for the processor.
HASHING_THREADS = 8
_EMPTY = hashlib.sha256(b"").hexdigest()

Labels = int | tuple[int, ...]
"""The class of an image, or its several classes in a multi-label set."""


@dataclass
class Walk:
    """What a walk through a data folder meets besides images."""

    root: Path  # resolved: what lies outside of it is not followed
    top: Path  # as given: names are relative to it
    skipped: list[Skipped] = field(default_factory=list)
    ignored: int = 0

    def skip(self, path: Path, reason: str, unreadable: bool = False) -> None:
        self.skipped.append(Skipped(self.name(path), reason, unreadable))

    def name(self, path: Path) -> str:
        return printable(path.relative_to(self.top).as_posix())


def hashed(
    files: Mapping[Role, Sequence[tuple[Path, Labels]]], walk: Walk, progress: Progress | None
) -> dict[Role, list[Image]]:
    """The images in these files; those that are empty or cannot be read are skipped."""
    total, done = sum(map(len, files.values())), 0
    given: dict[Role, list[Image]] = {}
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for role, found in files.items():
            given[role] = []
            # In slices, so that an interrupt waits for few files and not for all.
            keys = (
                key
                for start in range(0, len(found), 512)
                for key in threads.map(_content_key, [file for file, _ in found[start : start + 512]])
            )
            for (file, labels), key in zip(found, keys, strict=True):
                done += 1
                if isinstance(key, OSError):
                    walk.skip(file, f"could not be read: {key.strerror or key}", unreadable=True)
                elif key == _EMPTY:  # all such files would count as one image under many classes
                    walk.skip(file, "the file is empty", unreadable=True)
                elif isinstance(labels, tuple):
                    given[role].append(Image.of_several(walk.name(file), labels, key, file))
                else:
                    given[role].append(Image(walk.name(file), labels, key, file))
                if progress:
                    progress(done, total)
    return given


def _content_key(file: Path) -> str | OSError:
    try:
        with file.open("rb") as stream:
            refuse_large(stream)
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return error
