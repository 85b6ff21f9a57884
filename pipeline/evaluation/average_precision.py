"""Average precision of detections as COCO defines it, and its bootstrap over images.

Labels are float32 [n,M,7], rows (class, x1, y1, x2, y2, area, crowd), class −1 in unused rows. Detections are
float32 [n,D,6], rows (score, class, x1, y1, x2, y2), score 0 in unused rows. Boxes are fractions of the image
as shown, areas pixels of the original image.

pycocotools matches detections to boxes. Its curves take seconds, too long for a bootstrap, so they are
computed here: from the same matches, with a weight for each image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy import ndarray
from pycocotools.cocoeval import COCOeval

IOUS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds, T of them."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is averaged."""
ALL = (0.0, 1e10)
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's ranges of area, pixels of the original image."""
RESAMPLES, MIN_RESAMPLES, MAX_WORK = 400, 50, 1_000_000_000
"""Bootstrap resamples. The number falls to the minimum as resamples times detections and hits reach the
maximum (about ten seconds).
"""


@dataclass(frozen=True)
class Matches:
    """Detections of n images by class, then falling score, and whether they match a box.

    A detection that matches a crowd is ignored, and so is what lies outside of the range of areas.
    """

    n: int
    classes: int
    image: ndarray
    label: ndarray
    """Image and class of each detection, int64 [N]."""
    is_hit: ndarray
    is_ignored: ndarray
    """bool [T,N], at each IoU threshold."""
    box_image: ndarray
    box_label: ndarray
    """Image and class of each box that counts, int64 [G]."""

    @cached_property
    def curves(self) -> "Curves":
        return Curves(self)

    def count_boxes(self, weights: ndarray | None = None) -> ndarray:
        """Return the number of boxes of each class if image i counts ``weights[i]`` times."""
        return np.bincount(
            self.box_label, None if weights is None else weights[self.box_image], minlength=self.classes
        )

    def count_images(self) -> ndarray:
        """Return the number of images with boxes of each class, int64 [classes]."""
        pairs = np.unique(self.box_label * self.n + self.box_image)
        return np.bincount(pairs // self.n, minlength=self.classes)


class Curves:
    """The hits of each IoU threshold and class by falling score, with their place among all detections."""

    def __init__(self, matches: Matches) -> None:
        self.matches = matches
        threshold, place = np.nonzero(matches.is_hit & ~matches.is_ignored)
        self.label = matches.label[place]
        self.segment = threshold * matches.classes + self.label
        self.first = np.searchsorted(self.segment, self.segment)
        self.images = matches.image[place]
        # Range of the detections of the class with at least the score of the hit.
        self.begin = np.searchsorted(matches.label, self.label)
        self.end = place + 1
        # The same range among the ignored detections of each threshold.
        ignored, ignored_place = np.nonzero(matches.is_ignored)
        key, n = ignored * len(matches.image) + ignored_place, len(matches.image)
        self.ignored_images = matches.image[ignored_place]
        self.ignored_begin = np.searchsorted(key, threshold * n + self.begin)
        self.ignored_end = np.searchsorted(key, threshold * n + self.end)

    @property
    def work(self) -> int:
        """Number of array elements that ``average_precision`` passes over."""
        return len(self.matches.image) + 4 * len(self.images)

    def average_precision(self, weights: ndarray | None = None) -> ndarray:
        """Return AP at each IoU threshold of each class, 0 to 1, [T,classes]; NaN for classes without boxes.

        ``weights`` float64 [n] are the images' counts, by default 1.
        """
        matches = self.matches
        before, reached, precision = self._interpolate(weights)
        boxes = matches.count_boxes(weights)
        shape = len(matches.is_hit), matches.classes
        total = np.bincount(self.segment, (reached - before) * precision, minlength=shape[0] * shape[1])
        return np.where(boxes > 0, total.reshape(shape) / len(RECALLS), np.nan)

    def precision(self) -> ndarray:
        """Return the precision at each of ``RECALLS``, 0 to 1, [T,classes,101]; NaN without boxes."""
        matches = self.matches
        before, reached, precision = self._interpolate(None)
        values = np.zeros((len(matches.is_hit) * matches.classes, len(RECALLS)))
        counts = reached - before
        place = (
            np.repeat(before, counts)
            + np.arange(counts.sum())
            - np.repeat(np.cumsum(counts) - counts, counts)
        )
        values[np.repeat(self.segment, counts), place] = np.repeat(precision, counts)
        by_class = values.reshape(len(matches.is_hit), matches.classes, len(RECALLS))
        return np.where(matches.count_boxes()[:, None] > 0, by_class, np.nan)

    def _interpolate(self, weights: ndarray | None) -> tuple[ndarray, ndarray, ndarray]:
        """Return the range of indices of ``RECALLS`` that each hit reaches first, and its precision."""
        matches = self.matches
        weights = np.ones(matches.n) if weights is None else weights
        seen = _sum_ranges(weights[matches.image], self.begin, self.end)
        seen -= _sum_ranges(weights[self.ignored_images], self.ignored_begin, self.ignored_end)
        hits = _sum_ranges(weights[self.images], self.first, np.arange(len(self.first)) + 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = hits / matches.count_boxes(weights)[self.label]
        # A hit of weight 0 may come before any weight: 0 / 0 counts as 0, as pycocotools has it.
        precision = hits / (seen + np.spacing(1))
        # The largest precision at this or a higher recall; distinct levels keep segments apart.
        level = 2.0 * self.segment
        precision = np.maximum.accumulate((precision - level)[::-1])[::-1] + level
        reached = np.searchsorted(RECALLS, recall, side="right")
        before = np.concatenate([[0], reached])[:-1]
        before[self.first] = 0
        return before, reached, precision

    def recall(self) -> ndarray:
        """Return the fraction of the boxes that are hit, [T,classes]; NaN for classes without boxes."""
        shape = len(self.matches.is_hit), self.matches.classes
        hits = np.bincount(self.segment, minlength=shape[0] * shape[1]).reshape(shape)
        with np.errstate(invalid="ignore"):
            return np.asarray(hits / self.matches.count_boxes())


def _sum_ranges(values: ndarray, begin: ndarray, end: ndarray) -> ndarray:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(sums[end] - sums[begin])


def match(
    detections: ndarray,
    labels: ndarray,
    classes: int,
    *,
    ious: ndarray = IOUS,
    areas: Sequence[tuple[float, float]] = (ALL,),
) -> list[Matches]:
    """Match detections to the boxes of their class and image, for each range of areas."""
    image, row = np.nonzero(detections[..., 0] > 0)
    score, label, *corners = detections[image, row].astype(np.float64).T
    label, sides = label.astype(np.int64), _to_sides(*corners)
    box_image, box_row = np.nonzero(labels[..., 0] >= 0)
    box_label, *corners, box_area, crowd = labels[box_image, box_row].astype(np.float64).T
    box_label, box_sides = box_label.astype(np.int64), _to_sides(*corners)
    # Predictions as labels may have no area.
    ratios = box_area / np.maximum(box_sides[:, 2] * box_sides[:, 3], np.finfo(np.float64).tiny)
    area = sides[:, 2] * sides[:, 3] * _count_pixels(box_image, ratios, len(labels))[image]

    pairs, own = _group(box_image * classes + box_label), _group(image * classes + label)
    # Not evaluate(), which visits each pair of an image and a class several times, and prints.
    coco = COCOeval(iouType="bbox")
    coco.params.iouThrs, coco.params.maxDets = ious, [max(detections.shape[1], 1)]
    for pair, boxes in pairs.items():
        key = divmod(pair, classes)
        coco._gts[key] = [
            {**_make_annotation(i, box_sides, box_area), "iscrowd": int(crowd[i]), "ignore": int(crowd[i])}
            for i in boxes
        ]
        coco._dts[key] = [{**_make_annotation(i, sides, area), "score": score[i]} for i in own.get(pair, ())]
        coco.ious[key] = coco.computeIoU(*key)
    order = np.lexsort((-score, label))
    results = []
    for low, high in areas:
        # A detection in an image without a box of its class has no match.
        is_hit = np.zeros((len(ious), len(order)), dtype=bool)
        is_ignored = np.tile((area < low) | (area > high), (len(ious), 1))
        is_counted = np.zeros(len(box_label), dtype=bool)
        for pair in pairs:
            matched = coco.evaluateImg(*divmod(pair, classes), [low, high], coco.params.maxDets[-1])
            ids = np.array(matched["dtIds"], dtype=np.int64) - 1
            is_hit[:, ids], is_ignored[:, ids] = matched["dtMatches"] > 0, matched["dtIgnore"]
            is_counted[np.array(matched["gtIds"]) - 1] = matched["gtIgnore"] == 0
        results.append(
            Matches(
                n=len(labels),
                classes=classes,
                image=image[order],
                label=label[order],
                is_hit=is_hit[:, order],
                is_ignored=is_ignored[:, order],
                box_image=box_image[is_counted],
                box_label=box_label[is_counted],
            )
        )
    return results


def _to_sides(x1: ndarray, y1: ndarray, x2: ndarray, y2: ndarray) -> ndarray:
    """Return x, y, width and height, [N,4]."""
    return np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)


def _make_annotation(i: int, sides: ndarray, area: ndarray) -> dict[str, Any]:
    return {"id": i + 1, "bbox": sides[i].tolist(), "area": area[i]}  # 0 would be no match


def _group(keys: ndarray) -> dict[int, list[int]]:
    """Return the indices of each key in their order."""
    groups: dict[int, list[int]] = {}
    for i, key in enumerate(keys.tolist()):
        groups.setdefault(key, []).append(i)
    return groups


def _count_pixels(image: ndarray, ratios: ndarray, n: int) -> ndarray:
    """Return the area of each image as shown in pixels of the original, [n], for the areas of detections.

    It is the median of its boxes' ``ratios``, their area over their fraction of the image; for an image
    without boxes the median image's.
    """
    counts, order = np.bincount(image, minlength=n), np.lexsort((ratios, image))
    middle = np.cumsum(counts) - counts + counts // 2
    pixels, has_boxes = np.zeros(n), counts > 0
    pixels[has_boxes] = ratios[order][middle[has_boxes]]
    pixels[~has_boxes] = np.median(pixels[has_boxes]) if has_boxes.any() else 0.0
    return pixels


def resample(*all_matches: Matches) -> ndarray:
    """Return AP at each IoU threshold in bootstrap resamples of the images, percent, [R,T,networks].

    The matches are of several networks on the same images; all see the same resamples. NaN if a resample
    contains no box.
    """
    n = all_matches[0].n
    work = sum(matches.curves.work for matches in all_matches)
    resamples = int(np.clip(MAX_WORK // max(work, 1), MIN_RESAMPLES, RESAMPLES))
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(resamples):
        weights = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        ap = [matches.curves.average_precision(weights) for matches in all_matches]
        draws.append(np.stack([mean_of_classes(values) for values in ap], axis=-1))
    return np.stack(draws)


def mean_of_classes(values: ndarray) -> ndarray:
    """Return the mean over the classes with boxes of AP or other fractions [T,classes,…], percent [T,…]."""
    has_boxes = np.isfinite(values[0]).reshape(values.shape[1], -1).all(1)
    if not has_boxes.any():
        return np.full_like(values[:, 0], np.nan)
    return 100 * values[:, has_boxes].mean(1)


def compare(first: Matches, second: Matches) -> tuple[float, float, float, float]:
    """Return the AP of the first minus that of the second in points, and p and interval by paired bootstrap.

    p is two-sided: twice the fraction of the resamples of the images with a difference of the other sign.
    """
    points, others = (float(mean_of_classes(m.curves.average_precision()).mean()) for m in (first, second))
    drawn = resample(first, second).mean(1)
    differences = (drawn[:, 0] - drawn[:, 1])[np.isfinite(drawn).all(1)]
    sides = (np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    p = 2 * (min(sides) + 1) / (len(differences) + 1)
    if not differences.size:
        return 0.0, 1.0, 0.0, 0.0
    low, high = np.percentile(differences, (2.5, 97.5))
    return points - others, min(1.0, float(p)), float(low), float(high)
