"""What a data set is: images with their classes, each in one of three roles."""

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np

from ...export.text import spelled_out
from ..runs.files import digest

Role = Literal["train", "select", "test"]
ROLES: tuple[Role, ...] = get_args(Role)

# Called with (done, total) from the thread that started the work.
Progress = Callable[[int, int], None]

LARGEST = 1 << 30
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
                refuse_large(file)
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
    kept: Role
    removed: tuple[str, ...] = ()
    two_classes: bool = False


@dataclass(frozen=True)
class ImageSet:
    """Images in three roles: ``train``, ``select`` (for choosing while training) and ``test``.

    Within a role the images are ordered by class, content and name, so that equal fingerprints mean an equal
    order wherever the files lie and whatever they are called.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: tuple[Image, ...]
    select: tuple[Image, ...]
    test: tuple[Image, ...]
    skipped: tuple[Skipped, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    ignored: int = 0  # files that are no images
    multi_label: bool = False
    """Whether an image may have several classes, or none."""

    def role(self, role: Role) -> tuple[Image, ...]:
        return {"train": self.train, "select": self.select, "test": self.test}[role]

    def __len__(self) -> int:
        return len(self.train) + len(self.select) + len(self.test)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the classes and each image's content, class and role; names don't count."""
        every = [(image, role) for role in ROLES for image in self.role(role)]
        if self.multi_label:
            of_several = sorted((image.key, image.labels, role) for image, role in every)
            return digest({"classes": self.classes, "images": of_several, "multi_label": True})
        images = sorted((image.key, image.label, role) for image, role in every)
        return digest({"classes": self.classes, "images": images})

    @property
    def counts(self) -> dict[Role, list[int]]:
        """Images of each class (in the order of ``classes``), by role."""
        counts = {role: [0] * len(self.classes) for role in ROLES}
        for role in ROLES:
            for image in self.role(role):
                for label in image.labels:
                    counts[role][label] += 1
        return counts


def refuse_large(file: BinaryIO) -> None:
    """
    Raises:
        OSError: an open file is larger than an image is.
    """
    size = os.fstat(file.fileno()).st_size
    if size > LARGEST:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {LARGEST:,} allowed")


def in_order(images: Sequence[Image]) -> tuple[Image, ...]:
    return tuple(sorted(images, key=lambda image: (image.labels, image.key, image.name)))


def array_key(pixels: np.ndarray) -> str:
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
