"""Boxes of the rows of a data set: checked against the images' headers, and attached to the images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ...errors import UsageError
from ..boxes import FRACTIONS, MAX_BOXES, Box, Header, clean_boxes, describe_counts
from ..dataset import Image, Split
from ..decode import read_header
from .folders import HASHING_THREADS, FolderScan
from .label_rows import Row

BLOCK = 512
"""Headers that are read at a time, so that an interrupt waits for few files."""


def clean_rows(
    images: Mapping[Split, Mapping[Path, Row]], scan: FolderScan
) -> tuple[dict[Split, dict[Path, Row]], list[str]]:
    """Return the rows with boxes as fractions and the classes of the boxes to train on, and notes.

    Images whose shape is not the annotated one are added to ``scan.skipped``.

    Raises:
        UsageError: an image has more than ``MAX_BOXES`` boxes.
    """
    counts: Counter[str] = Counter()
    cleaned: dict[Split, dict[Path, Row]] = {}
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for split, rows in images.items():
            files, kept = list(rows), cleaned.setdefault(split, {})
            for start in range(0, len(files), BLOCK):
                block = files[start : start + BLOCK]
                for file, header in zip(block, threads.map(read_header, block), strict=True):
                    if row := _clean_row(file, rows[file], header, scan, counts):
                        kept[file] = row
    return cleaned, describe_counts(counts)


def _clean_row(
    file: Path, row: Row, header: Header | None, scan: FolderScan, counts: Counter[str]
) -> Row | None:
    stated = row.boxes or ()
    if header is None:  # decoding reports the image
        return replace(row, labels=(), boxes=(), size=None)
    boxes = clean_boxes(stated, row.size, header, counts)
    if boxes is None:
        tall, wide = row.size or FRACTIONS
        reason = f"it has {header.width} × {header.height} pixels, annotated are {wide:g} × {tall:g}"
        scan.skip(file, reason, unreadable=True)
        return None
    if len(boxes) > MAX_BOXES:
        raise UsageError(
            f"{scan.name(file)} has {len(boxes):,} boxes, more than the limit of {MAX_BOXES:,}. Cut it into "
            "tiles, or remove boxes."
        )
    labels = tuple(sorted({box.name for box in boxes if not box.crowd}))
    return replace(row, labels=labels, boxes=boxes, size=(header.height, header.width))


def attach_boxes(images: Sequence[Image], rows: Mapping[Path, Row], number: Mapping[str, int]) -> list[Image]:
    """Return images, whose sources are their files, with the boxes of their rows in order of ``number``.

    Boxes of other classes are left out; they belong to groups of objects alone.
    """
    attached = []
    for image in images:
        assert isinstance(image.source, Path)
        row = rows[image.source]
        boxes = sorted(
            Box(number[b.name], *b[1:5], b.area or 0.0, b.crowd) for b in row.boxes or () if b.name in number
        )
        size = None if row.size is None else (int(row.size[0]), int(row.size[1]))
        attached.append(replace(image, boxes=tuple(boxes), size=size))
    return attached
