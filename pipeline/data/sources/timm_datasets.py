"""Data sets by names of timm (torch/cifar100, hfds/…, hfids/…, wds/…, tfds/…), and the built-in digits."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageOps

from ...errors import UsageError
from ...runs.files import DATA_PACKAGES
from ...runs.hashes import sha256
from ..dataset import Image, Progress, Skipped, Split, hash_array, printable
from ..splits import UnsplitDataset
from .webdataset import SYNONYMS, find_shards, find_unreadable_shard, index_shards

MAX_BYTES_IN_MEMORY = 4 << 30
"""Decoded pixels of a data set without random access, which is held in memory."""


def read_named(
    name: str, *, data_dir: Path | None = None, download: bool = False, progress: Progress | None = None
) -> UnsplitDataset:
    """Read a data set by its name in timm (``timm.data.create_dataset``), with its own splits.

    Its validation split becomes val if there is a labeled test split as well, and test otherwise. Encoded
    images stay where they are (Hugging Face's tables, WebDataset's tar files in ``data_dir``). Data that a
    reader only streams, and torchvision's small sets, are held in memory, up to 4 GiB of pixels.

    Raises:
        UsageError: the set or its package is missing, it has no classes, or it is too large.
    """
    prefix = name.partition("/")[0].lower()
    if prefix == "wds" and data_dir is not None and (shards := find_shards(data_dir)):
        indexed, skipped = index_shards(shards, progress)
        return _drop_unlabeled(name, indexed, None, skipped)
    if find_spec(DATA_PACKAGES[prefix]) is None:
        package = DATA_PACKAGES[prefix].replace("_", "-")
        if prefix == "wds" and data_dir is not None and (shard := find_unreadable_shard(data_dir)):
            raise UsageError(
                f"{name}: {printable(str(shard))} is not an uncompressed .tar file. Unpack it, or install "
                f"a package that reads it: pip install {package}"
            )
        raise UsageError(f"{name} requires the package {package}. Install it: pip install {package}")
    if prefix in ("torch", "wds", "tfds") and data_dir is None:
        how = ", and --download to fetch them" if prefix != "wds" else ""
        raise UsageError(f"{name} requires --data-dir, the folder of its files{how}.")
    datasets = _open_splits(name, prefix, data_dir, download)
    images: dict[Split, list[Image]] = {split: [] for split in datasets}
    for split, dataset in datasets.items():
        for number, image in enumerate(_read_images(name, split, dataset), 1):
            images[split].append(image)
            if progress:
                progress(number, max(number, len(dataset)))
    return _drop_unlabeled(name, images, datasets["train"])


def _drop_unlabeled(
    name: str, images: dict[Split, list[Image]], dataset: Any, skipped: Sequence[Skipped] = ()
) -> UnsplitDataset:
    # Published test splits often have no labels, written as −1.
    labeled = {split: [image for image in images[split] if image.label >= 0] for split in images}
    labeled = {split: split_images for split, split_images in labeled.items() if split_images}
    unlabeled = [image.name for split in labeled for image in images[split] if image.label < 0]
    skipped = (*skipped, *(Skipped(image, "it has no label (−1)") for image in unlabeled))
    if "train" not in labeled:
        raise UsageError(f"{name} has no labeled training images.")
    count = 1 + max(image.label for split_images in labeled.values() for image in split_images)
    classes = _class_names(dataset, count)
    return UnsplitDataset(name, name, classes, labeled, len(labeled) > 1, skipped)


def _open_splits(name: str, prefix: str, data_dir: Path | None, download: bool) -> dict[Split, Any]:
    """Return timm's data set of each existing split; ``train`` always."""
    datasets: dict[Split, Any] = {"train": _create(name, "train", data_dir, download)}
    # torchvision's sets have two parts: any name but 'train' is the other one.
    splits: tuple[Split, ...] = ("val",) if prefix == "torch" else ("val", "test")
    for split in splits:
        for synonym in SYNONYMS[split]:
            try:
                datasets[split] = _create(name, synonym, data_dir, download)
                break
            except _NoSplitError:
                continue
    return datasets


class _NoSplitError(UsageError):
    """The data set has no split of this name."""


def _create(name: str, split: str, data_dir: Path | None, download: bool) -> Any:
    from timm.data import create_dataset

    in_folder = f" in {printable(str(data_dir))}" if data_dir else ""
    try:
        return create_dataset(
            name,
            root=str(data_dir) if data_dir else None,
            split=split,
            download=download,
            # Colors are converted by `_to_rgb`; the tfds reader decodes by itself.
            input_img_mode="RGB" if name.lower().startswith("tfds") else "",
        )
    except Exception as error:  # readers and their packages raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, URLError | ConnectionError):
            raise UsageError(
                f"{name} could not be downloaded ({reason}). Check the network, or set --data-dir to a "
                "folder with its files."
            ) from error
        if "length is unknown" in reason and split == "train":
            raise UsageError(
                f"{name} does not provide its number of images. Use --download, or hfds/ instead of hfids/."
            ) from error
        if "split" in reason.lower() or "length is unknown" in reason:
            raise _NoSplitError(f"{name} has no split '{split}'{in_folder}: {reason}") from error
        if "not found" in reason.lower() and not download:
            raise UsageError(
                f"{name} was not found{in_folder} ({reason}). Use --download to fetch it."
            ) from error
        raise UsageError(f"{name} could not be opened{in_folder}: {reason}") from error


def _read_images(name: str, split: Split, dataset: Any) -> Iterator[Image]:
    files = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if files:  # torchvision's sets of files
        folder = os.path.commonpath([Path(path).parent for path, _ in files])
        for file, label in ((Path(path), label) for path, label in files):
            shown = printable(file.relative_to(folder).as_posix())
            yield Image(f"{split}/{shown}", _to_label(name, label), sha256(file), file)
    elif type(getattr(dataset, "reader", None)).__name__ == "ReaderHfds":  # encoded files, random access
        for number in range(len(dataset)):
            file, label = dataset.reader[number]
            with file:
                key = hashlib.sha256(file.read()).hexdigest()
            source = partial(_read_row, dataset.reader, number)
            yield Image(f"{split}/{number:07d}", _to_label(name, label), key, source)
    else:
        yield from _read_into_memory(name, split, dataset)


def _read_row(reader: Any, row: int) -> bytes:
    file, _ = reader[row]
    with file:
        return bytes(file.read())


def _read_into_memory(name: str, split: Split, dataset: Any) -> Iterator[Image]:
    from torch.utils.data import IterableDataset

    is_streamed, held = isinstance(dataset, IterableDataset), 0
    samples = dataset if is_streamed else (dataset[number] for number in range(len(dataset)))
    for number, (picture, label) in enumerate(samples):
        pixels = _to_rgb(picture)
        held += pixels.nbytes
        if held > MAX_BYTES_IN_MEMORY:
            raise UsageError(
                f"{name} has more than {MAX_BYTES_IN_MEMORY >> 30} GiB of pixels in its {split} split, the "
                "limit for data sets that are held in memory. Save its images in a folder for each class and "
                "use that as --data."
            )
        yield Image(f"{split}/{number:07d}", _to_label(name, label), hash_array(pixels), pixels)


def _to_rgb(picture: PillowImage.Image) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(picture).convert("RGB"), dtype=np.uint8)


def _to_label(name: str, label: Any) -> int:
    if not isinstance(label, Integral):
        raise UsageError(f"{name}: labels must be class numbers, got {label!r}.")
    return int(label)


def _class_names(dataset: Any, count: int) -> list[str]:
    """Return the class names in the order of labels; numbers for classes without a name."""
    names: dict[int, Any] = dict(enumerate(getattr(dataset, "classes", None) or ()))
    if not names:
        by_name = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
        names = {index: name for name, index in by_name.items()}
    named = (names.get(index, index) for index in range(max(count, len(names))))
    # ImageNet's names are tuples of synonyms.
    return [", ".join(name) if isinstance(name, tuple) else str(name) for name in named]


def read_digits() -> UnsplitDataset:
    """Return scikit-learn's ``load_digits``: 1,797 real 8×8 images of the digits 0 to 9, as uint8 RGB.

    Their 17 gray levels (0 to 16) are scaled to 0 to 255. Source: UCI Optical Recognition of Handwritten
    Digits (Alpaydin and Kaynak 1998), its test part.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    gray = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = []
    for number, (pixels, label) in enumerate(zip(gray, data.target, strict=True)):
        rgb = np.repeat(pixels[:, :, None], 3, axis=2)
        images.append(Image(f"{label}/{number:04d}", int(label), hash_array(rgb), rgb))
    return UnsplitDataset("digits", "the built-in digits", tuple(map(str, range(10))), {"train": images})
