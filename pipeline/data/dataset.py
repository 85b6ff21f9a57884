"""A data set: labeled images in the splits train, val and test, and images without labels for training."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np

from ...export.text import escape_controls
from ..config import TaskName
from ..errors import JobError
from ..runs.hashes import digest
from .boxes import Box

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Placement = Literal["device", "host", "workers"]
"""Storage of decoded training images: memory of the device, of the host, or none."""

Progress = Callable[[int, int], None]
"""Called with (done, total) from the thread that started the work."""

MAX_IMAGE_BYTES = 1 << 30
"""Maximum size of an encoded image."""

UNLABELED = -1
"""The label of an image without labels."""

Source = Path | bytes | np.ndarray | Callable[[], bytes]


@dataclass(frozen=True)
class Image:
    """One image and its class, or the ``label_set`` (ascending, possibly empty) of a multi-label image.

    ``name`` is for display: a path relative to the data set, never absolute. ``key`` is the SHA-256 of the
    content in hexadecimal; images with the same key are the same image.
    """

    name: str
    label: int
    key: str
    source: Source = field(repr=False, compare=False)
    label_set: tuple[int, ...] | None = None
    gray_bits: int = 16
    """Number of bits that 16-bit gray images of the data use, see ``runtime.decode_image``."""
    boxes: tuple[Box, ...] | None = None
    """The objects of a detection image, whose ``label_set`` has their classes; None for other images."""
    size: tuple[int, int] | None = None
    """Height and width in pixels of an upright image with boxes."""

    @classmethod
    def with_labels(cls, name: str, labels: Sequence[int], key: str, source: Source) -> "Image":
        """Create an image of a multi-label set; its ``label`` is the first class, or −1."""
        label_set = tuple(sorted(set(labels)))
        return cls(name, label_set[0] if label_set else -1, key, source, label_set)

    @property
    def number(self) -> int:
        """The first 63 bits of the key, which seed the image's views."""
        return int(self.key[:16], 16) >> 1

    @property
    def labels(self) -> tuple[int, ...]:
        return (self.label,) if self.label_set is None else self.label_set

    @property
    def is_labeled(self) -> bool:
        return self.label != UNLABELED or self.label_set is not None

    def without_labels(self) -> "Image":
        return replace(self, label=UNLABELED, label_set=None, boxes=None)

    def read(self) -> bytes | np.ndarray:
        """Return the encoded file, or the pixels (uint8 [H, W, 3]) of an image without a file.

        Raises:
            OSError: the file cannot be read, or is larger than ``MAX_IMAGE_BYTES``.
        """
        if isinstance(self.source, Path):
            with self.source.open("rb") as file:
                check_file_size(file)
                return file.read()
        return self.source if isinstance(self.source, bytes | np.ndarray) else self.source()


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is skipped. ``unreadable`` marks images; see ``decode.check_unreadable``."""

    name: str
    reason: str
    unreadable: bool = False


@dataclass(frozen=True)
class Duplicate:
    """The same content several times: with different classes, in several splits of the data, or in test."""

    names: tuple[str, ...]
    kept: Split
    removed: tuple[str, ...] = ()
    """Copies that were removed so that no image is in two splits, or twice in test."""
    two_classes: bool = False


@dataclass(frozen=True)
class Copies:
    """The smallest key of the images that an image equals, by its key; without an entry, it has no copy."""

    equal: Mapping[str, str] = field(default_factory=dict)
    """Images with equal pixels."""
    near: Mapping[str, str] = field(default_factory=dict)
    """Images with equal pixels, and near copies with the same labels."""

    def content(self, image: Image) -> str:
        return self.equal.get(image.key, image.key)

    def group(self, image: Image) -> str:
        return self.near.get(image.key, image.key)


@dataclass(frozen=True)
class Leak:
    """Near copies in several splits, which the source of the data assigns or which a class has too few of."""

    names: tuple[str, ...]
    in_test: int
    """Number of these images in test."""


@dataclass(frozen=True)
class ImageSet:
    """Images in the splits ``train``, ``val`` and ``test``.

    Within a split the images are ordered by class, content and name, so that equal fingerprints imply an
    equal order, regardless of paths.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: tuple[Image, ...]
    val: tuple[Image, ...]
    test: tuple[Image, ...]
    skipped: tuple[Skipped, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    leaks: tuple[Leak, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Number of ignored files by suffix, or another description."""
    task: TaskName = "classification"
    notes: tuple[str, ...] = ()
    """What was not used, or is read in an unusual way; for the terminal and the report."""
    unlabeled: tuple[Image, ...] = ()
    """Images that the student learns from by its teachers' outputs alone."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of unlabeled images that are left out as copies, by what they are copies of."""

    @property
    def learned(self) -> tuple[Image, ...]:
        """All images that the student learns from: those of train, then those without labels."""
        return (*self.train, *self.unlabeled)

    def split(self, split: Split) -> tuple[Image, ...]:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def __len__(self) -> int:
        return len(self.train) + len(self.val) + len(self.test)

    @property
    def gray_bits(self) -> int:
        return next((image.gray_bits for split in SPLITS for image in self.split(split)), 16)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the classes and of each labeled image's content, labels, boxes and split."""
        images = sorted(
            (image.key, image.labels, split, *(() if image.boxes is None else (image.boxes,)))
            for split in SPLITS
            for image in self.split(split)
        )
        bits = {} if self.gray_bits == 16 else {"gray_bits": self.gray_bits}  # it changes the pixels
        return digest({"classes": self.classes, "images": images, "task": self.task, **bits})

    @property
    def unlabeled_fingerprint(self) -> str | None:
        """SHA-256 of the contents of the unlabeled images; None if there are none."""
        return digest(sorted(image.key for image in self.unlabeled)) if self.unlabeled else None

    @property
    def counts(self) -> dict[Split, list[int]]:
        """Number of images of each class, in the order of ``classes``, by split."""
        counts = {split: [0] * len(self.classes) for split in SPLITS}
        for split in SPLITS:
            for image in self.split(split):
                for label in image.labels:
                    counts[split][label] += 1
        return counts


def check_file_size(file: BinaryIO) -> None:
    """Raise OSError if an open image file is larger than ``MAX_IMAGE_BYTES``."""
    size = os.fstat(file.fileno()).st_size
    if size > MAX_IMAGE_BYTES:
        raise OSError(errno.EFBIG, f"the file has {size:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}")


def fail_to_read(name: str, error: Exception | str) -> JobError:
    """Return the error for an image that the machine cannot read; nothing is known about the image itself."""
    reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
    return JobError(
        f"{name} could not be read: {reason}. Check disk, memory and permissions, or remove the file; then "
        "run the same command again."
    )


def set_gray_bits(images: Iterable[Image], bits: int) -> tuple[Image, ...]:
    return tuple(replace(image, gray_bits=bits) for image in images)


def sort_images(images: Sequence[Image]) -> tuple[Image, ...]:
    return tuple(sorted(images, key=lambda image: (image.labels, image.key, image.name)))


def hash_array(pixels: np.ndarray) -> str:
    """Return the SHA-256 of an array's dtype, shape and bytes."""
    header = f"{pixels.dtype} {'x'.join(map(str, pixels.shape))}\n".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).hexdigest()


printable = escape_controls
"""Escapes what cannot be printed or written as UTF-8, and control characters of terminals."""
