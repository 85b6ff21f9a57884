"""Data sets by timm's names, through timm's readers: torch/cifar100, hfds/…, hfids/…, wds/…, tfds/…"""

import hashlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageOps

from ...errors import UsageError
from ..dataset import Image, ImageSet, Progress, Split, Row, Skipped, Table, array_key, printable
from ..splits import UnsplitDataset
from .webdataset import SYNONYMS, index, local_splits, not_plain

# What each kind of name needs installed.
PACKAGES = {"torch": "torchvision", "hfds": "datasets", "hfids": "datasets", "wds": "webdataset"}
PACKAGES["tfds"] = "tensorflow_datasets"
PREFIXES = tuple(PACKAGES)
# Sets that cannot be read at random are held in memory, up to this many bytes of decoded pixels.
IN_MEMORY = 4 << 30


def open_named(
    name: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    val_fraction: float | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """A data set by its name in timm (``timm.data.create_dataset``), with that set's own training split.

    Its validation split is the val role where there is a labelled test split too, and the test role where
    there is none. ``data_dir`` is where its files are or go; ``download`` lets them be fetched. Encoded
    images stay where they are (Hugging Face's tables, WebDataset's tar files in ``data_dir``); what a reader
    only streams, and torchvision's small sets, is held in memory, up to 4 GiB of pixels.

    Raises:
        UsageError: the set is not there, its package is missing, it has no classes, or it is too large.
    """
    given = read_named(name, data_dir=data_dir, download=download, progress=progress)
    return given.assembled(val_fraction)


def read_named(
    name: str, *, data_dir: Path | None = None, download: bool = False, progress: Progress | None = None
) -> UnsplitDataset:
    """The images of a data set by its name in timm, in its own splits.

    Raises:
        UsageError: as ``open_named``.
    """
    prefix = name.partition("/")[0].lower()
    if prefix == "wds" and data_dir is not None and (splits := local_splits(data_dir)):
        indexed = index(splits, progress)
        return _assembled(name, indexed.given, None, indexed.skipped)
    if find_spec(PACKAGES[prefix]) is None:
        package = PACKAGES[prefix].replace("_", "-")
        if prefix == "wds" and data_dir is not None and (odd := not_plain(data_dir)) is not None:
            raise UsageError(
                f"{name}: {printable(str(odd))} is no plain .tar file; unpack it, or install what reads "
                f"others: pip install {package}"
            )
        raise UsageError(f"{name} needs the package {package}; install it with: pip install {package}")
    if prefix in ("torch", "wds", "tfds") and data_dir is None:
        how = "; --download fetches it there" if prefix != "wds" else ""
        raise UsageError(f"{name} needs --data-dir, the folder its files are in{how}.")
    datasets = _splits(name, prefix, data_dir, download)
    given: dict[Split, list[Image]] = {
        role: list(_images(name, role, dataset, progress)) for role, dataset in datasets.items()
    }
    return _assembled(name, given, datasets["train"])


def _assembled(
    name: str,
    given: dict[Split, list[Image]],
    dataset: Any,
    skipped: Sequence[Skipped] = (),
) -> UnsplitDataset:
    # Published test splits often come without labels, written as −1.
    unlabelled = [
        Skipped(image.name, "it has no label (−1)")
        for images in given.values()
        if any(image.label >= 0 for image in images)
        for image in images
        if image.label < 0
    ]
    given = {role: [image for image in images if image.label >= 0] for role, images in given.items()}
    given = {role: images for role, images in given.items() if images}
    if "train" not in given:
        raise UsageError(f"{name} has no labelled training images.")
    if "test" not in given and "val" in given:
        given["test"] = given.pop("val")
    classes = _class_names(dataset, 1 + max(image.label for images in given.values() for image in images))
    return UnsplitDataset(
        name, name, tuple(classes), given, has_roles=len(given) > 1, skipped=(*skipped, *unlabelled)
    )


def _splits(name: str, prefix: str, data_dir: Path | None, download: bool) -> dict[Split, Any]:
    """timm's data sets of the splits there are; ``train`` always."""
    found: dict[Split, Any] = {"train": _create(name, "train", data_dir, download)}
    # torchvision's sets have two halves: whatever isn't 'train' is the other one.
    roles: tuple[Split, ...] = ("val",) if prefix == "torch" else ("val", "test")
    for role in roles:
        for split in SYNONYMS[role]:
            try:
                found[role] = _create(name, split, data_dir, download)
                break
            except _NoSplit:
                continue
    return found


class _NoSplit(UsageError):
    """The data set has no split of this name."""


def _create(name: str, split: str, data_dir: Path | None, download: bool) -> Any:
    from timm.data import create_dataset

    where = f" in {printable(str(data_dir))}" if data_dir else ""
    try:
        return create_dataset(
            name,
            root=str(data_dir) if data_dir else None,
            split=split,
            download=download,
            # Colour is for `_rgb`; the reader of tfds decodes by itself.
            input_img_mode="RGB" if name.lower().startswith("tfds") else "",
        )
    except Exception as error:  # each reader, and each package below it, raises what it likes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, URLError | ConnectionError):
            raise UsageError(
                f"{name} could not be downloaded ({reason}); check the network, or put its files into "
                "a folder and name that as --data-dir."
            ) from error
        if "length is unknown" in reason and split == "train":
            raise UsageError(
                f"{name} doesn't say how many images it has; fetch it with --download, "
                "or use hfds/ in the place of hfids/."
            ) from error
        if "split" in reason.lower() or "length is unknown" in reason:
            raise _NoSplit(f"{name} has no split '{split}'{where}: {reason}") from error
        if "not found" in reason.lower() and not download:
            raise UsageError(f"{name} was not found{where}; --download fetches it ({reason}).") from error
        raise UsageError(f"{name} could not be opened{where}: {reason}") from error


def _images(name: str, role: Split, dataset: Any, progress: Progress | None) -> Iterator[Image]:
    files = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if files:  # torchvision's sets of files
        for number, (path, label) in enumerate(files):
            with Path(path).open("rb") as file:
                key = hashlib.file_digest(file, "sha256").hexdigest()
            yield Image(f"{role}/{printable(Path(path).name)}", _number(name, label), key, Path(path))
            if progress:
                progress(number + 1, len(files))
    elif type(getattr(dataset, "reader", None)).__name__ == "ReaderHfds":  # encoded files, read at random
        table = Table(dataset.reader)
        for number in range(len(dataset)):
            content, label = dataset.reader[number]
            with content:
                key = hashlib.sha256(content.read()).hexdigest()
            yield Image(f"{role}/{number:07d}", _number(name, label), key, Row(table, number))
            if progress:
                progress(number + 1, len(dataset))
    else:
        yield from _in_memory(name, role, dataset, progress)


def _in_memory(name: str, role: Split, dataset: Any, progress: Progress | None) -> Iterator[Image]:
    from torch.utils.data import IterableDataset

    streamed = isinstance(dataset, IterableDataset)
    total, held = len(dataset), 0
    for number, (picture, label) in enumerate(
        dataset if streamed else (dataset[position] for position in range(total))
    ):
        pixels = _rgb(picture)
        held += pixels.nbytes
        if held > IN_MEMORY:
            raise UsageError(
                f"{name} has more than {IN_MEMORY >> 30} GiB of pixels in its {role} split, and sets of this "
                "kind are held in memory; save its images in a folder for each class and give that as --data."
            )
        yield Image(f"{role}/{number:07d}", _number(name, label), array_key(pixels), pixels)
        if progress:
            progress(number + 1, max(total, number + 1))


def _rgb(picture: PillowImage.Image) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(picture).convert("RGB"), dtype=np.uint8)


def _number(name: str, label: Any) -> int:
    if not isinstance(label, Integral):
        raise UsageError(f"The labels of {name} are no class numbers (one is {label!r}).")
    return int(label)


def _class_names(dataset: Any, count: int) -> list[str]:
    """Names in the order of the labels, as the set tells them; numbers for those it doesn't name."""
    names: dict[int, Any] = dict(enumerate(getattr(dataset, "classes", None) or ()))
    if not names:
        by_name = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
        names = {index: name for name, index in by_name.items()}
    count = max(count, len(names))
    named = (names.get(index, index) for index in range(count))
    # ImageNet's names are tuples of synonyms.
    return [", ".join(name) if isinstance(name, tuple) else str(name) for name in named]


def open_digits(*, val_fraction: float | None = None) -> ImageSet:
    """scikit-learn's ``load_digits``: 1,797 real 8×8 images of the digits 0 to 9, as uint8 RGB.

    Their 17 levels of grey (0 to 16) are spread over 0 to 255. Source: UCI Optical Recognition of
    Handwritten Digits (Alpaydin and Kaynak 1998), its test part.
    """
    return read_digits().assembled(val_fraction)


def read_digits() -> UnsplitDataset:
    """The same images, without roles."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = []
    for number, (pixels, label) in enumerate(zip(grey, data.target, strict=True)):
        rgb = np.repeat(pixels[:, :, None], 3, axis=2)
        images.append(Image(f"{label}/{number:04d}", int(label), array_key(rgb), rgb))
    digits = tuple(str(digit) for digit in range(10))
    return UnsplitDataset("digits", "the built-in digits", digits, {"train": images}, has_roles=False)
