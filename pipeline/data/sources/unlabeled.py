"""Images without labels, from a folder of any layout: the student learns its teachers' outputs on them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, permutations
from pathlib import Path

from ...errors import UsageError
from ...runs.cache import Cache
from ...runs.files import data_path
from ..copies import find_copies
from ..dataset import SPLITS, UNLABELED, Image, ImageSet, Progress, printable, set_gray_bits, sort_images
from .folders import FolderScan, find_images, hash_files, mention

PREFIX = "unlabeled: "
"""Begins the names of the images, and notes on them."""

REPEATED = "another unlabeled image"
"""What an image is a copy of, if it is not an image of a split."""


def check_unlabeled(path: Path, data: str) -> None:
    """Raise UsageError unless the folder exists and neither it nor the folder ``data`` contains the other."""
    shown = printable(str(path))
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise UsageError(f"--unlabeled {shown} {problem}. Set it to a folder of images.")
    labeled = data_path(data)
    if labeled is None or not labeled.is_dir():  # images of a labels file are left out as copies
        return
    folders = {f"--unlabeled {shown}": path.resolve(), f"--data {printable(data)}": labeled.resolve()}
    for (inner, folder), (outer, other) in permutations(folders.items()):
        if folder.is_relative_to(other):
            raise UsageError(
                f"{inner} is inside {outer}, whose images would be read as both. Move one of the folders."
            )


def add_unlabeled(
    data: ImageSet,
    path: Path,
    *,
    follow_links: bool = False,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Return a data set with the images at any depth of a folder, without those that are copies.

    Copies and near copies of labeled images are left out, and all but the first of equal images.

    Raises:
        UsageError: the folder cannot be read, or no images remain.
    """
    scan = FolderScan(path.resolve(), path, follow_links)
    shown = printable(str(path))
    try:
        files = [(file, UNLABELED) for file in find_images(scan, path)]
    except PermissionError as error:
        raise UsageError(
            f"{printable(str(error.filename))} cannot be read. Check its permissions."
        ) from error
    if not files:
        raise mention(UsageError(f"--unlabeled {shown} contains no images."), scan.notes)
    read = hash_files({"train": files}, scan, progress)["train"]
    images = [replace(image, name=f"{PREFIX}{image.name}") for image in set_gray_bits(read, data.gray_bits)]
    kept, left_out = _leave_out_copies(images, data, cache, progress)
    if not kept:
        raise UsageError(
            f"--unlabeled {shown}: none of its {len(files):,} images is left without unreadable ones and "
            "copies of other images. Add images, or remove --unlabeled."
        )
    notes = scan.notes
    if left_out:
        copies = ", ".join(f"{n:,} of {what}" for what, n in left_out.items())
        notes = [f"images left out because they are copies: {copies}", *notes]
    return replace(
        data,
        unlabeled=kept,
        left_out=left_out,
        skipped=(*data.skipped, *(replace(s, name=f"{PREFIX}{s.name}") for s in scan.skipped)),
        ignored=Counter(data.ignored) + scan.ignored,
        notes=(*data.notes, *(f"{PREFIX}{note}" for note in notes)),
    )


def _leave_out_copies(
    images: Sequence[Image], data: ImageSet, cache: Cache | None, progress: Progress | None
) -> tuple[tuple[Image, ...], dict[str, int]]:
    """Return the images to learn from, and the numbers of the others by what they are copies of."""
    labeled = {split: data.split(split) for split in SPLITS}
    alike = [image.without_labels() for image in (*chain(*labeled.values()), *images)]
    copies = find_copies(alike, cache, progress)
    copied = {copies.group(image): f"{split} images" for split in SPLITS for image in labeled[split]}
    kept: dict[str, Image] = {}
    left_out: Counter[str] = Counter()
    for image in sort_images(images):
        if (what := copied.get(copies.group(image))) is not None:
            left_out[what] += 1
        elif kept.setdefault(copies.content(image), image) is not image:
            left_out[REPEATED] += 1
    return tuple(kept.values()), dict(left_out)
