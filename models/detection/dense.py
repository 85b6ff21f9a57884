"""Dense detectors on timm backbones: `retinanet:BACKBONE` and `ssdlite:BACKBONE`.

They have sigmoid class scores at anchors of all levels of the pyramid, and torchvision's focal and L1 losses
and decoding of RetinaNet (Lin et al.: "Focal Loss for Dense Object Detection", ICCV 2017). They differ in the
head:

- `retinanet`: towers of four convolutions with GroupNorm, shared by all levels; 9 anchors per location
- `ssdlite`: one depthwise separable convolution with BatchNorm per level (Sandler et al.: "MobileNetV2", CVPR
  2018); 6 anchors per location
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.retinanet import (
    RetinaNet,
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.models.detection.ssdlite import SSDLiteClassificationHead, SSDLiteRegressionHead

from .pyramid import DETECTIONS, LEVELS, PyramidDetector, create_anchors

CHANNELS_PER_GROUP = 8
"""Of GroupNorm, as in torchvision's `retinanet_resnet50_fpn_v2`."""
SCALES = {"retinanet": (0.0, 1 / 3, 2 / 3), "ssdlite": (0.0, 1 / 2)}
"""Binary logarithms of the anchors' sizes at a level, relative to the smallest."""
PRIOR = 0.01
"""Score of every class at every anchor of a new head."""


class DenseDetector(PyramidDetector, RetinaNet):
    """A detector that scores every class at anchors on a grid.

    Args:
        kind: `retinanet` or `ssdlite`.
        backbone: see `create_backbone`.
        image_size: height and width of the input in pixels.
        width: channels of the pyramid, a multiple of 8.
    """

    head: Any
    box_coder: Any
    compute_loss: Any
    postprocess_detections: Any

    def __init__(
        self, kind: str, backbone: Any, num_classes: int, image_size: tuple[int, int], width: int
    ) -> None:
        generator = create_anchors(SCALES[kind], image_size)
        head = _build_head(kind, width, generator.num_anchors_per_location()[0], num_classes)
        backbone.out_channels = width
        super().__init__(
            backbone, num_classes, anchor_generator=generator, head=head, detections_per_img=DETECTIONS
        )
        del self.transform  # of torchvision's images of any size
        self.kind, self.has_tower = kind, kind == "retinanet"
        self.build_pyramid(generator, num_classes, image_size, width)

    def raw(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return class logits [B,A,K] and box deltas [B,A,4] of images [B,3,H,W]."""
        return self.predict(self.maps(x))

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return class logits [B,A,K] and box deltas [B,A,4] of the pyramid's levels."""
        outputs = self.head(list(maps))
        return outputs["cls_logits"], outputs["bbox_regression"]

    @contextmanager
    def record_towers(self, towers: list[Tensor]) -> Iterator[None]:
        """Append the maps that the class scores of each level are computed from, finest first."""
        if not self.has_tower:
            yield
            return
        conv = self.head.classification_head.conv
        handle = conv.register_forward_hook(lambda _module, _inputs, output: towers.append(output))
        try:
            yield
        finally:
            handle.remove()

    def compute_features(self, maps: Sequence[Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        """Return the features of the head by name, see `pyramid.py`."""
        towers: list[Tensor] = []
        with self.record_towers(towers):
            logits = torch.cat(self.predict(maps), dim=2)
        features = {"logits": logits, **{f"tower@{level}": tensor for level, tensor in enumerate(towers)}}
        if labels is not None:
            features["losses"] = self.losses(logits[: len(labels)].float(), labels)
        return features

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the losses of classes and boxes [2], means over images.

        Args:
            outputs: class logits and box deltas [B,A,K+4].
            labels: [B,M,7], see `targets`.
        """
        targets = self.targets(labels.to(outputs.dtype))
        head = {"cls_logits": outputs[..., :-4], "bbox_regression": outputs[..., -4:]}
        losses = self.compute_loss(targets, head, [self.anchors] * len(targets))
        return torch.stack([losses["classification"], losses["bbox_regression"]])

    @torch.no_grad()
    def decode(self, *outputs: Tensor) -> Tensor:
        logits, boxes = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in outputs)
        if logits.is_meta:
            return logits.new_zeros(len(logits), DETECTIONS, 6)
        counts = self.level_counts
        images = self.postprocess_detections(
            {"cls_logits": logits.split(counts, dim=1), "bbox_regression": boxes.split(counts, dim=1)},
            [self.anchors.split(counts)] * len(logits),
            [self.image_size] * len(logits),
        )
        return self.to_rows(images, logits)

    @property
    def decoder(self) -> dict[str, Any]:
        """All that a client needs to decode the outputs, as JSON.

        Anchor k at row i and column j of a level is `cells[k] + (j, i, j, i) * (x, y, x, y)` with its stride
        (x, y): boxes (x1, y1, x2, y2) in pixels of the input, ordered by level, row, column and k. The box of
        deltas (dx, dy, dw, dh) / box_weights has its center at that of the anchor plus (dx, dy) times the
        anchor's size, and that size times exp(dw), exp(dh), both at most log(1000 / 16).
        """
        per_location, levels = self.anchors_per_location, []
        split = self.anchors.cpu().split(self.level_counts)
        for (height, width), anchors in zip(self.grids, split, strict=True):
            levels.append(
                {
                    "grid": [height, width],
                    "stride": [self.image_size[1] // width, self.image_size[0] // height],
                    "cells": anchors[:per_location].tolist(),
                }
            )
        return {
            "kind": self.kind,
            "anchors": levels,
            "box_weights": list(self.box_coder.weights),
            "score_threshold": self.score_thresh,
            "nms_iou": self.nms_thresh,
            "candidates": self.topk_candidates,
            "detections": self.detections_per_img,
        }

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the class scores of the head by new ones."""
        head = _build_head(self.kind, self.fpn_width, self.anchors_per_location, num_classes)
        for name in self.classifier_names():
            self.set_submodule(name, head.get_submodule(name.removeprefix("head.")))
        scores = self.head.classification_head
        self.num_classes = scores.num_classes = scores.num_columns = num_classes

    def classifier_names(self) -> list[str]:
        if self.kind == "retinanet":
            return ["head.classification_head.cls_logits"]
        return [f"head.classification_head.module_list.{level}.1" for level in range(LEVELS)]


def _build_head(kind: str, width: int, anchors: int, num_classes: int) -> nn.Module:
    if kind == "ssdlite":
        return _LiteHead(width, anchors, num_classes)
    norm = partial(nn.GroupNorm, width // CHANNELS_PER_GROUP)
    head: nn.Module = RetinaNetHead(width, anchors, num_classes, norm_layer=norm)
    return head


class _LiteClassificationHead(SSDLiteClassificationHead):
    """torchvision's SSDLite head with the loss and the first scores of its RetinaNet head."""

    BETWEEN_THRESHOLDS = Matcher.BETWEEN_THRESHOLDS
    compute_loss = RetinaNetClassificationHead.compute_loss

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for layers in self.module_list:
            nn.init.constant_(layers[-1].bias, math.log(PRIOR / (1 - PRIOR)))


class _LiteRegressionHead(SSDLiteRegressionHead):
    """torchvision's SSDLite head with the loss of its RetinaNet head."""

    box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    _loss_type = "l1"
    compute_loss = RetinaNetRegressionHead.compute_loss


class _LiteHead(RetinaNetHead):
    def __init__(self, width: int, anchors: int, num_classes: int) -> None:
        nn.Module.__init__(self)
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # those of torchvision's SSDLite
        channels, counts = [width] * LEVELS, [anchors] * LEVELS
        self.classification_head = _LiteClassificationHead(channels, counts, num_classes, norm)
        self.regression_head = _LiteRegressionHead(channels, counts, norm)
