"""Boxes of objects: cleaned when they are read, as fractions of the upright image, and in crops of it.

A target tensor is float32 [N, M, 7] with rows (class, x1, y1, x2, y2, area, crowd); unused rows have class
−1. Coordinates are fractions of what is shown, ``area`` is in pixels of the annotated image.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...export.runtime import Preprocessing, Size, height_width, place_crop

MIN_VISIBLE = 0.2
"""Fraction of a box's area that a crop must show for the box to be a target in it."""

MIN_SIDE = 2
"""Minimum width and height in pixels of a box in a training view."""

MAX_BOXES = 1000
"""Maximum number of boxes of an image: every image of a target tensor takes the rows of the one with most."""

Window = tuple[float, float, float, float]
"""What is shown of an image: top, left, height and width as fractions of it; beyond it is padding."""

FRACTIONS = (1.0, 1.0)
"""The size of an image for boxes in fractions of it."""

DECIMALS = 6
"""Decimals of the fractions, so that an image's boxes are equal in every format."""

LEFT_OUT = {
    "not finite": "with coordinates that are not finite numbers",
    "empty": "without a positive width and height",
    "outside": "outside of their image",
    "repeated": "repeated",
}


class Box(NamedTuple):
    """An object's class and its box in fractions of the upright image."""

    label: int
    x1: float
    y1: float
    x2: float
    y2: float
    area: float
    """Pixels of the annotated image, rounded; of the outline, if the data has it."""
    crowd: bool
    """Never trained on and not counted as a miss: a group of objects, or one that is marked as difficult."""


class NamedBox(NamedTuple):
    """A box with its class's name, in pixels or fractions; ``area`` is None if it is that of the box."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float
    area: float | None = None
    crowd: bool = False


class Header(NamedTuple):
    """Size of an upright image in pixels, and its EXIF orientation: from 5 on, the stored image is turned."""

    height: int
    width: int
    orientation: int = 1


def clean_boxes(
    boxes: Sequence[NamedBox], size: tuple[float, float] | None, header: Header, counts: Counter[str]
) -> tuple[NamedBox, ...] | None:
    """Return boxes as fractions of the upright image, sorted; None if ``size`` is of another shape.

    ``size`` (height, width) is the annotated image's in pixels, ``FRACTIONS``, or None if it is not stated.
    Boxes of the stored image, by that size, are turned like it. Boxes are clipped to the image; those without
    an area in it and repeated ones are left out. ``counts`` counts the former by the keys of ``LEFT_OUT``,
    and as ``clipped`` those that reach over the edge by a pixel or more.
    """
    upright = header.height, header.width
    tall, wide = size or upright
    is_upright = size == FRACTIONS or _is_same_shape((tall, wide), upright)
    if not is_upright and not (header.orientation > 4 and _is_same_shape((wide, tall), upright)):
        return None
    pixels = header.height * header.width if size == FRACTIONS else tall * wide
    cleaned = []
    for box in boxes:
        corners = box.x1 / wide, box.y1 / tall, box.x2 / wide, box.y2 / tall
        if not all(map(math.isfinite, corners)):
            counts["not finite"] += 1
            continue
        x1, y1, x2, y2 = corners if is_upright else _turn(*corners, header.orientation)
        left, top, right, bottom = (round(min(max(value, 0.0), 1.0), DECIMALS) for value in (x1, y1, x2, y2))
        if x2 <= x1 or y2 <= y1:
            counts["empty"] += 1
        elif x1 >= 1 or y1 >= 1 or x2 <= 0 or y2 <= 0:
            counts["outside"] += 1
        elif right <= left or bottom <= top:
            counts["empty"] += 1
        else:
            over = max(max(-x1, x2 - 1) * header.width, max(-y1, y2 - 1) * header.height)
            counts["clipped"] += over >= 1
            area = (min(x2, 1) - max(x1, 0)) * (min(y2, 1) - max(y1, 0)) * pixels
            if box.area is not None and 0 < box.area < math.inf:
                area = box.area
            cleaned.append(NamedBox(box.name, left, top, right, bottom, float(round(area)), box.crowd))
    distinct = tuple(sorted(set(cleaned)))
    counts["repeated"] += len(cleaned) - len(distinct)
    return distinct


def describe_counts(counts: Mapping[str, int]) -> list[str]:
    """Return notes on the boxes that ``clean_boxes`` has left out and clipped."""
    parts = [f"{counts[key]:,} {reason}" for key, reason in LEFT_OUT.items() if counts.get(key)]
    notes = [f"boxes left out: {', '.join(parts)}"] if parts else []
    if counts.get("clipped"):
        notes.append(f"boxes clipped at the edge of their image: {counts['clipped']:,}")
    return notes


def _is_same_shape(size: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return True if two sizes are of one image, possibly resized and rounded to pixels."""
    (height, width), (tall, wide) = size, other
    return abs(height * wide - width * tall) <= wide + tall


def _turn(x1: float, y1: float, x2: float, y2: float, orientation: int) -> tuple[float, float, float, float]:
    """Return a box of the stored image in the upright one, for the EXIF orientations 5 to 8."""
    x1, y1, x2, y2 = y1, x1, y2, x2
    if orientation in (6, 7):
        x1, x2 = 1 - x2, 1 - x1
    if orientation in (7, 8):
        y1, y2 = 1 - y2, 1 - y1
    return x1, y1, x2, y2


def shown_window(height: int, width: int, p: Preprocessing) -> Window:
    """Return what ``runtime.render`` shows of an image of ``height`` × ``width`` pixels."""
    ((tall, wide), (top, left)), (down, across) = place_crop(height, width, p), height_width(p.size)
    return top / tall, left / wide, down / tall, across / wide


def place_boxes(
    objects: Sequence[Sequence[Box]],
    sizes: Sequence[tuple[int, int]],
    window: Callable[[int, int], Window],
) -> Tensor:
    """Return the boxes of N images as targets [N, M, 7] in what ``window`` shows of each.

    ``sizes`` are the images' height and width in pixels. M is the largest number of boxes, at least 1.
    """
    counts = [len(boxes) for boxes in objects]
    targets = torch.zeros(len(objects), max([1, *counts]), 7)
    targets[..., 0] = -1
    rows = np.array([box for boxes in objects for box in boxes], np.float64).reshape(-1, 7)
    shown = np.array([window(*size) for size in sizes], np.float64).reshape(-1, 4)
    owner = np.repeat(np.arange(len(objects)), counts)
    top, left, height, width = shown[owner].T[..., None]
    rows[:, [1, 3]] = (rows[:, [1, 3]] - left) / width
    rows[:, [2, 4]] = (rows[:, [2, 4]] - top) / height
    place = [row for count in counts for row in range(count)]
    targets[owner.tolist(), place] = torch.from_numpy(rows).float()
    return clip_targets(targets)


def clip_targets(targets: Tensor, min_width: float = 0.0, min_height: float = 0.0) -> Tensor:
    """Clip boxes to [0, 1]; rows with too little left get class −1.

    That is, less than ``MIN_VISIBLE`` of their area, or less than ``min_width`` or ``min_height``.
    """
    corners = targets[..., 1:5].clamp(0, 1)
    width, height = (corners[..., 2:] - corners[..., :2]).unbind(-1)
    whole = (targets[..., 3:5] - targets[..., 1:3]).prod(-1)
    is_kept = (targets[..., 0] >= 0) & (width > 0) & (height > 0) & (width * height >= MIN_VISIBLE * whole)
    is_kept &= (width >= min_width) & (height >= min_height)
    clipped = torch.cat([targets[..., :1], corners, targets[..., 5:]], -1)
    unused = torch.zeros_like(clipped)
    unused[..., 0] = -1
    return torch.where(is_kept[..., None], clipped, unused)


def follow(labels: Tensor, box: Tensor, flips: Tensor, heights: Tensor, widths: Tensor, size: Size) -> Tensor:
    """Return the labels of views: boxes follow the crop and flip, other labels are unchanged.

    ``labels`` are int64 [B], float32 [B, classes], or targets [B, M, 7] of whole canonical images of
    ``heights`` × ``widths`` pixels (int64 [B]); ``box`` int32 [B, 4] and ``flips`` bool [B] come from
    ``views.draw_crops``. ``size`` is the views' in pixels.
    """
    if labels.dim() < 3:
        return labels
    top, left, height, width = (column[:, None, None].double() for column in box.unbind(1))
    x = (labels[..., [1, 3]].double() * widths[:, None, None] - left) / width
    y = (labels[..., [2, 4]].double() * heights[:, None, None] - top) / height
    x = torch.where(flips[:, None, None], 1 - x.flip(-1), x)
    corners = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1).float()
    down, across = height_width(size)
    moved = torch.cat([labels[..., :1], corners, labels[..., 5:]], -1)
    return clip_targets(moved, MIN_SIDE / across, MIN_SIDE / down)
