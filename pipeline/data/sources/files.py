"""Image files of a data set: hashed by content; empty and unreadable files are skipped."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..dataset import Image, Progress, Skipped, Split, check_file_size, printable

HASHING_THREADS = 8
"""Hashing waits for the disk as much as for the processor."""

_EMPTY = hashlib.sha256(b"").hexdigest()

Labels = int | tuple[int, ...]
"""The class of an image, or its classes in a multi-label set."""


@dataclass
class FolderScan:
    """A data folder with what was found in it besides images."""

    root: Path
    """Resolved; links that lead out of it are not followed."""
    top: Path
    """As specified by the user; names are relative to it."""
    skipped: list[Skipped] = field(default_factory=list)
    ignored: int = 0

    def skip(self, path: Path, reason: str, unreadable: bool = False) -> None:
        self.skipped.append(Skipped(self.name(path), reason, unreadable))

    def name(self, path: Path) -> str:
        return printable(path.relative_to(self.top).as_posix())


def hash_files(
    files: Mapping[Split, Sequence[tuple[Path, Labels]]], scan: FolderScan, progress: Progress | None
) -> dict[Split, list[Image]]:
    """Return the images in these files; empty and unreadable files are added to ``scan.skipped``."""
    total, done = sum(map(len, files.values())), 0
    images: dict[Split, list[Image]] = {split: [] for split in files}
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for split, labeled in files.items():
            # In blocks, so that an interrupt waits for few files.
            keys = (
                key
                for start in range(0, len(labeled), 512)
                for key in threads.map(_hash_file, [file for file, _ in labeled[start : start + 512]])
            )
            for (file, labels), key in zip(labeled, keys, strict=True):
                done += 1
                if isinstance(key, OSError):
                    scan.skip(file, f"could not be read: {key.strerror or key}", unreadable=True)
                elif key == _EMPTY:  # all empty files would count as one image with many classes
                    scan.skip(file, "the file is empty", unreadable=True)
                elif isinstance(labels, tuple):
                    images[split].append(Image.with_labels(scan.name(file), labels, key, file))
                else:
                    images[split].append(Image(scan.name(file), labels, key, file))
                if progress:
                    progress(done, total)
    return images


def _hash_file(file: Path) -> str | OSError:
    try:
        with file.open("rb") as stream:
            check_file_size(stream)
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return error
