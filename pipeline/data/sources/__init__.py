"""Open ``--data``: the built-in digits, a folder, a labels file, or a data set by its name in timm."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...runs.cache import Cache
from ...runs.files import DATA_PACKAGES, DIGITS, data_path, describe_namesake
from ..copies import find_copies
from ..dataset import ImageSet, Progress, printable, set_gray_bits, sort_images
from ..splits import UnsplitDataset
from .box_folders import find_kind, read_box_folder
from .folders import mention, read_folder
from .gray_bits import measure_gray_bits
from .label_files import SUFFIXES, find_label_files, find_split_label_file, read_label_file
from .timm_datasets import read_digits, read_named

BOX_FORMATS = "Boxes are read from COCO's .json, Pascal VOC's .xml and YOLO's data.yaml."


def open_data(
    data: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    follow_links: bool = False,
    val_fraction: float | None = None,
    with_boxes: bool = False,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Open the data set that ``--data`` names, and split it. All images are decoded to find copies.

    ``with_boxes`` reads the boxes of objects, for a detector; otherwise images have labels alone.

    Raises:
        UsageError: it does not exist or is not usable.
    """
    unsplit = read_data(
        data,
        data_dir=data_dir,
        download=download,
        follow_links=follow_links,
        with_boxes=with_boxes,
        progress=progress,
    )
    with _mention_label_files(data_path(data)):
        try:
            images = unsplit.split(val_fraction)  # errors come before the images are decoded
            copies = find_copies(chain(*unsplit.images.values()), cache, progress)
            if copies.near:
                images = unsplit.split(val_fraction, copies)
        except UsageError as error:
            raise mention(error, unsplit.notes) from error
    return images


def read_data(data: str, **options: Any) -> UnsplitDataset:
    """Read the data set that ``--data`` names, with the splits that it assigns.

    Without ``for_training`` the images are only validated on: a class or a split may be missing. The other
    options are those of ``open_data``.
    """
    unsplit = _read(data, **options)
    images = unsplit.images.get("train") or [image for split in unsplit.images.values() for image in split]
    bits, notes = measure_gray_bits(sort_images(images))
    if bits != 16:
        scaled = {split: set_gray_bits(images, bits) for split, images in unsplit.images.items()}
        unsplit = replace(unsplit, images=scaled)
    return replace(unsplit, notes=[*unsplit.notes, *notes])


def _read(
    data: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    follow_links: bool = False,
    for_training: bool = True,
    with_boxes: bool = False,
    progress: Progress | None = None,
) -> UnsplitDataset:
    if with_boxes and (data == DIGITS or data_path(data) is None):
        raise UsageError(f"--data {data} has no boxes, which a detector requires. {BOX_FORMATS}")
    if data == DIGITS:
        _check_unused("the built-in digits", data_dir, download)
        return read_digits()
    path = data_path(data)
    how: Any = {"follow_links": follow_links, "for_training": for_training, "progress": progress}
    if path is None:
        try:
            return read_named(data, data_dir=data_dir, download=download, progress=progress)
        except UsageError as error:
            if (namesake := describe_namesake(data)) is None:
                raise
            raise UsageError(f"{error} {namesake}") from error
    if path.exists() and (kind := find_kind(path, strict=with_boxes)) is not None:
        if not with_boxes:
            raise UsageError(
                f"--data {printable(str(path))} has boxes ({kind}), which a classifier does not learn. Use a "
                "detector, such as retinanet:resnet34."
            )
        _check_unused("a folder of boxes", None if path.is_file() else data_dir, download)
        return read_box_folder(path, data_dir=data_dir, **how)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"--data {printable(str(path))} is neither a folder with a folder of images for each class "
                f"nor a labels file ({', '.join(SUFFIXES)})."
            )
        _check_unused("a labels file", None, download)
        return read_label_file(path, data_dir=data_dir, with_boxes=with_boxes, **how)
    if path.exists():
        _check_unused("a folder", data_dir, download)
        if (file := find_split_label_file(path)) is not None:
            return read_label_file(file, with_boxes=with_boxes, **how)
        with _mention_label_files(path):
            if with_boxes:
                raise UsageError(
                    f"--data {printable(str(path))} has no boxes, which a detector requires. {BOX_FORMATS}"
                )
            return read_folder(path, **how)
    near = get_close_matches(data.lower(), [DIGITS], cutoff=0.7) + _similar_folders(path)
    did_you_mean = f" Did you mean {' or '.join(near[:3])}?" if near else ""
    raise UsageError(
        f"--data {data} does not exist.{did_you_mean} It takes a folder of class folders, a labels file, "
        f"'{DIGITS}', or a data set of timm ({', '.join(f'{prefix}/…' for prefix in DATA_PACKAGES)})."
    )


def _check_unused(kind: str, data_dir: Path | None, download: bool) -> None:
    """Raise UsageError for an option that belongs to another kind of data."""
    for option, is_set in (("--data-dir", data_dir is not None), ("--download", download)):
        if is_set:
            raise UsageError(f"{option} has no effect if --data is {kind}. Remove it.")


@contextmanager
def _mention_label_files(path: Path | None) -> Iterator[None]:
    """Mention the labels files in a folder in errors about it."""
    try:
        yield
    except UsageError as error:
        files = find_label_files(path) if path is not None and path.is_dir() else []
        if not files:
            raise
        raise UsageError(f"{error} If {' or '.join(files)} contains the labels, use it as --data.") from error


def _similar_folders(path: Path) -> list[str]:
    try:
        names = sorted(folder.name for folder in path.parent.iterdir() if folder.is_dir())
    except OSError:
        return []
    return [name for name in names if get_close_matches(path.name, [name], cutoff=0.7)]
