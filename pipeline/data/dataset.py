"""What a data set is: images with their classes, each in one of three roles."""

import errno
import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from ...export.text import spelled_out
from ..runs.files import digest
from ..runs.scores import TaskName

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Called with (done, total) from the thread that started the work.
Progress = Callable[[int, int], None]

MAX_IMAGE_BYTES = 1 << 30
"""Bytes of an encoded image."""

Source = Path | bytes | np.ndarray | Callable[[], bytes]


@dataclass(frozen=True)
class Image:
    """One image and its class, or the ``several`` (ascending, perhaps none) of a multi-label set.

    ``name`` is for people: the path relative to the data set, never absolute. ``key`` is the SHA-256 of the
    content in hexadecimal digits; images with the same key are the same image.
    """

    name: str
    label: int
    key: str
    source: Source = field(repr=False, compare=False)
    several: tuple[int, ...] | None = None

    @classmethod
    def of_several(cls, name: str, labels: Sequence[int], key: str, source: Source) -> "Image":
        """An image of a multi-label set; its ``label`` is the first of its classes, or −1."""
        several = tuple(sorted(set(labels)))
        return cls(name, several[0] if several else -1, key, source, several)

    @property
    def number(self) -> int:
        """The first 63 bits of its key, as views are drawn from them."""
        return int(self.key[:16], 16) >> 1

    @property
    def labels(self) -> tuple[int, ...]:
        """All its classes: the one of a single-label set."""
        return (self.label,) if self.several is None else self.several

    def read(self) -> bytes | np.ndarray:
        """The encoded file, or the pixels (uint8 [H, W, 3]) of an image that never was a file.

        Raises:
            OSError: the file cannot be read, or is larger than an image is.
        """
        if isinstance(self.source, Path):
            with self.source.open("rb") as file:
                check_file_size(file)
                return file.read()
        if isinstance(self.source, bytes | np.ndarray):
            return self.source
        return self.source()


@dataclass(frozen=True)
class Skipped:
    """A file or folder left out, and why; ``unreadable`` where it is an image that cannot be read."""

    name: str
    reason: str
    unreadable: bool = False


@dataclass(frozen=True)
class Duplicate:
    """The same content more than once: under two classes, or in two of the given folders.

    ``kept`` says where it stands now; ``removed`` are the copies taken out so that no image has two roles.
    """

    names: tuple[str, ...]
    kept: Split
    removed: tuple[str, ...] = ()
    two_classes: bool = False


@dataclass(frozen=True)
class ImageSet:
    """Images in three roles: ``train``, ``val`` (for choosing while training) and ``test``.

    Within a role the images are ordered by class, content and name, so that equal fingerprints mean an equal
    order wherever the files lie and whatever they are called.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: tuple[Image, ...]
    val: tuple[Image, ...]
    test: tuple[Image, ...]
    skipped: tuple[Skipped, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    ignored: int = 0  # files that are no images
    task: TaskName = "classification"

    def split(self, split: Split) -> tuple[Image, ...]:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def __len__(self) -> int:
        return len(self.train) + len(self.val) + len(self.test)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the classes and each image's content, class and role; names don't count."""
        every = [(image, role) for role in SPLITS for image in self.split(role)]
        images = sorted((image.key, image.labels, role) for image, role in every)
        return digest({"classes": self.classes, "images": images, "task": self.task})

    @property
    def counts(self) -> dict[Split, list[int]]:
        """Images of each class (in the order of ``classes``), by role."""
        counts = {role: [0] * len(self.classes) for role in SPLITS}
        for role in SPLITS:
            for image in self.split(role):
                for label in image.labels:
                    counts[role][label] += 1
        return counts


def check_file_size(file: BinaryIO) -> None:
    """
    Raises:
        OSError: an open file is larger than an image is.
    """
    size = os.fstat(file.fileno()).st_size
    if size > MAX_IMAGE_BYTES:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed")


def sort_images(images: Sequence[Image]) -> tuple[Image, ...]:
    return tuple(sorted(images, key=lambda image: (image.labels, image.key, image.name)))


def hash_array(pixels: np.ndarray) -> str:
    """SHA-256 of an array's shape and bytes."""
    shape = "x".join(map(str, pixels.shape))
    return hashlib.sha256(
        f"{pixels.dtype} {shape}\n".encode() + np.ascontiguousarray(pixels).tobytes()
    ).hexdigest()


def printable(name: str) -> str:
    """A name that can be printed and written as UTF-8, whatever bytes or characters it is made of: what would
    steer a terminal or turn the direction of writing is spelled out.
    """
    return spelled_out(name)


@dataclass(frozen=True, slots=True)
class FileSpan:
    """``size`` bytes of a file from ``offset`` on: a member of a tar file, say."""

    file: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        """
        Raises:
            OSError: the file cannot be read, or is shorter than it was.
        """
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.file.name} is shorter than it was")
        return content


class ReaderTable:
    """A reader of timm's that gives (file, label) by number, such as that of Hugging Face's data sets.

    It is pickled once and opened once in each process: its rows travel with every batch, it does not.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def read(self, row: int) -> bytes:
        content, _ = self.reader[row]
        with content:
            found: bytes = content.read()
            return found

    @cached_property
    def _pickled(self) -> tuple[str, "_Once"]:
        content = pickle.dumps(self.reader)
        return hashlib.sha256(content).hexdigest(), _Once(content)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, self._pickled


@dataclass(frozen=True)
class _Once:
    """Equal to any other, so that a table is known by its hash alone."""

    pickled: bytes = field(compare=False, hash=False, repr=False)


@lru_cache(maxsize=8)
def _opened(_: str, once: _Once) -> ReaderTable:
    return ReaderTable(pickle.loads(once.pickled))


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table."""

    table: ReaderTable
    row: int

    def __call__(self) -> bytes:
        return self.table.read(self.row)


# Hashing waits for the disk as much as for the processor.
HASHING_THREADS = 8
_EMPTY = hashlib.sha256(b"").hexdigest()

Labels = int | tuple[int, ...]
"""The class of an image, or its several classes in a multi-label set."""


@dataclass
class FolderScan:
    """What a walk through a data folder meets besides images."""

    root: Path  # resolved: what lies outside of it is not followed
    top: Path  # as given: names are relative to it
    skipped: list[Skipped] = field(default_factory=list)
    ignored: int = 0

    def skip(self, path: Path, reason: str, unreadable: bool = False) -> None:
        self.skipped.append(Skipped(self.name(path), reason, unreadable))

    def name(self, path: Path) -> str:
        return printable(path.relative_to(self.top).as_posix())


def hash_files(
    files: Mapping[Split, Sequence[tuple[Path, Labels]]], walk: FolderScan, progress: Progress | None
) -> dict[Split, list[Image]]:
    """The images in these files; those that are empty or cannot be read are skipped."""
    total, done = sum(map(len, files.values())), 0
    given: dict[Split, list[Image]] = {}
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
            check_file_size(stream)
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return error
