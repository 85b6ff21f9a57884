"""Convert a model's outputs to probabilities and boxes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .preprocessing import MAX_SIDE, Size, check_numbers, height_width


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis, computed in float64."""
    shifted = logits.astype(np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each logit, computed in float64 without overflow."""
    small = np.exp(-np.abs(logits.astype(np.float64)))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


@dataclass(frozen=True)
class AnchorLevel:
    """The anchors of one feature map: `cells` at every position of `grid`, in pixels of the input.

    Anchors are in the order of rows, columns, cells: `cells[k]` + stride · (column, row, column, row).
    """

    grid: tuple[int, int]
    """Rows and columns."""
    stride: tuple[float, float]
    """Pixels between columns, and between rows."""
    cells: tuple[tuple[float, float, float, float], ...]
    """x1, y1, x2, y2 at row 0, column 0."""

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1] * len(self.cells)

    def boxes(self) -> np.ndarray:
        """Return the anchors, float32 [count, 4]: x1, y1, x2, y2."""
        row, column = np.indices(self.grid, dtype=np.float32).reshape(2, -1, 1)
        x, y = column * np.float32(self.stride[0]), row * np.float32(self.stride[1])
        corners = np.stack([x, y, x, y], axis=-1) + np.array(self.cells, dtype=np.float32)
        return corners.reshape(-1, 4)


_DECODED_KINDS = ("retinanet", "ssdlite")
_REGION_KINDS = ("fasterrcnn",)
_MAX_ANCHORS = 1 << 22
_MAX_BOXES = 100_000  # candidates of a level, or detections of an image
_MIN_SIDE = 0.01  # of a detected box of a region in pixels, as in torchvision
_MAX_LOG_RATIO = np.float32(math.log(1000 / 16))  # of a box to its anchor, as torchvision's BoxCoder


@dataclass(frozen=True)
class Decoder:
    """How scores and offsets of anchors become detections: `RetinaNet.postprocess_detections` of torchvision.

    Scores are sigmoids. Of each level the `candidates` best pairs of anchor and class above `score_threshold`
    are decoded, clipped to the image, and suppressed by better ones of their class whose IoU exceeds
    `nms_iou`; the `detections` best remain. `box_weights` divide the offsets of x, y, width and height.
    """

    kind: str
    anchors: tuple[AnchorLevel, ...]
    box_weights: tuple[float, float, float, float]
    score_threshold: float
    nms_iou: float
    candidates: int
    detections: int

    def to_dict(self) -> dict[str, Any]:
        """Return the decoder as JSON."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Any) -> Decoder:
        """Raise ValueError if `values` is not a decoder that this version supports."""
        kinds = (*_DECODED_KINDS, *_REGION_KINDS)
        if not isinstance(values, Mapping) or values.get("kind") not in kinds:
            raise ValueError(f"decoder must be of kind {' or '.join(kinds)}")
        if values["kind"] in _REGION_KINDS:
            cls = RegionDecoder
        try:
            levels = tuple(
                AnchorLevel(
                    tuple(check_numbers("grid", level["grid"], 2, 1, MAX_SIDE)),
                    tuple(check_numbers("stride", level["stride"], 2, 0.0, MAX_SIDE)),
                    tuple(_check_cell(cell) for cell in level["cells"]),
                )
                for level in values["anchors"]
            )
            thresholds = [values["score_threshold"], values["nms_iou"]]
            counts = [values["candidates"], values["detections"]]
            decoder = cls(
                values["kind"],
                levels,
                tuple(check_numbers("box_weights", values["box_weights"], 4, 1e-6, 1e6)),
                *check_numbers("score_threshold and nms_iou", thresholds, 2, 1e-6, 1 - 1e-6),
                *check_numbers("candidates and detections", counts, 2, 1, _MAX_BOXES),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"decoder has a missing or invalid value: {error}") from error
        if not 0 < decoder.count <= _MAX_ANCHORS:
            raise ValueError(f"decoder requires 1 to {_MAX_ANCHORS:,} anchors, got {decoder.count:,}")
        if any(x1 >= x2 or y1 >= y2 for level in levels for x1, y1, x2, y2 in level.cells):
            raise ValueError("decoder has an anchor without area")
        return decoder

    @property
    def count(self) -> int:
        """Number of anchors."""
        return sum(level.count for level in self.anchors)

    def outputs(self, labels: int) -> dict[str, int]:
        """Return the names of the model's outputs [batch, count, columns], and their columns."""
        return {"logits": labels, "boxes": 4}

    @cached_property
    def boxes(self) -> np.ndarray:
        """All anchors, float32 [count, 4], in pixels of the input."""
        return np.concatenate([level.boxes() for level in self.anchors])

    def decode(self, image: Sequence[np.ndarray], size: Size) -> np.ndarray:
        """Decode the `outputs` of one image of `size`, float32 [count, columns] each.

        Returns float32 [detections, 6], see `Detector.detections`.
        """
        logits, offsets = image
        classes, least = logits.shape[1], math.log(self.score_threshold / (1 - self.score_threshold))
        indices, scores, start = [], [], 0
        for level in self.anchors:
            values = logits[start : start + level.count].ravel()
            above = np.flatnonzero(values > least)
            probabilities = sigmoid(values[above]).astype(np.float32)
            best = np.argsort(-probabilities, kind="stable")[: self.candidates]
            indices.append(above[best] + start * classes)
            scores.append(probabilities[best])
            start += level.count
        anchors, labels = np.divmod(np.concatenate(indices), classes)
        return self._select(np.concatenate(scores), labels, offsets[anchors], self.boxes[anchors], size)

    def _select(
        self, score: np.ndarray, labels: np.ndarray, offsets: np.ndarray, anchors: np.ndarray, size: Size
    ) -> np.ndarray:
        """Return the detections among candidates: scores, labels, offsets, and boxes that they refer to."""
        order = np.argsort(-score, kind="stable")
        score, labels = score[order], labels[order]
        boxes = self._decode_boxes(offsets[order], anchors[order])
        height, width = height_width(size)
        sides = np.array([width, height, width, height], dtype=np.float32)
        boxes = boxes.clip(0, sides)
        kept = suppress_overlaps(boxes, labels, self.nms_iou, self.detections)
        detections = np.zeros((self.detections, 6), dtype=np.float32)
        detections[: len(kept)] = np.column_stack([score[kept], labels[kept], boxes[kept] / sides])
        return detections

    def _decode_boxes(self, offsets: np.ndarray, anchors: np.ndarray) -> np.ndarray:
        offsets = offsets / np.array(self.box_weights, dtype=np.float32)
        sides = anchors[:, 2:] - anchors[:, :2]
        centers = offsets[:, :2] * sides + (anchors[:, :2] + np.float32(0.5) * sides)
        halves = np.float32(0.5) * (np.exp(np.minimum(offsets[:, 2:], _MAX_LOG_RATIO)) * sides)
        return np.concatenate([centers - halves, centers + halves], axis=1)


class RegionDecoder(Decoder):
    """How scores and offsets of regions become detections: `RoIHeads.postprocess_detections` of torchvision.

    Scores are softmax, background first. There are no anchors, but `candidates` regions of each image, in
    pixels of the input; unused ones are 0. All pairs of region and class above `score_threshold` are decoded
    as those of `Decoder`, except boxes with a side below .01 pixels.
    """

    @property
    def count(self) -> int:
        """Number of regions."""
        return self.candidates

    def outputs(self, labels: int) -> dict[str, int]:
        return {"logits": 1 + labels, "boxes": 4, "regions": 4}

    def decode(self, image: Sequence[np.ndarray], size: Size) -> np.ndarray:
        logits, offsets, regions = image
        used = np.flatnonzero((regions[:, 2:] > regions[:, :2]).all(axis=1))
        probabilities = softmax(logits[used])[:, 1:].astype(np.float32)
        rows, labels = np.nonzero(probabilities > np.float32(self.score_threshold))
        height, width = height_width(size)
        clipped = self._decode_boxes(offsets[used], regions[used]).clip(0, [width, height, width, height])
        is_large = (clipped[rows, 2:] - clipped[rows, :2] >= _MIN_SIDE).all(axis=1)
        rows, labels = rows[is_large], labels[is_large]
        chosen = used[rows]
        return self._select(probabilities[rows, labels], labels, offsets[chosen], regions[chosen], size)


def _check_cell(values: Any) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = map(float, check_numbers("cell", values, 4, -16.0 * MAX_SIDE, 16.0 * MAX_SIDE))
    return x1, y1, x2, y2


def suppress_overlaps(boxes: np.ndarray, labels: np.ndarray, iou: float, limit: int) -> np.ndarray:
    """Return the indices of the first `limit` boxes that overlap no better one of their class by over `iou`.

    Class-wise non-maximum suppression; `boxes`, x1, y1, x2, y2, [n, 4], are sorted by falling score.
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    remaining = np.arange(len(boxes))
    kept: list[int] = []
    while len(remaining) and len(kept) < limit:
        best, remaining = remaining[0], remaining[1:]
        kept.append(best)
        lows = np.maximum(boxes[remaining, :2], boxes[best, :2])
        shared = (np.minimum(boxes[remaining, 2:], boxes[best, 2:]) - lows).clip(0).prod(axis=1)
        overlaps = shared > np.float32(iou) * (areas[remaining] + areas[best] - shared)
        remaining = remaining[~overlaps | (labels[remaining] != labels[best])]
    return np.array(kept, dtype=np.intp)
