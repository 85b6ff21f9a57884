"""Dense detectors on timm backbones: `retinanet:BACKBONE` and `ssdlite:BACKBONE`.

Both have a feature pyramid of five levels (P3 to P7, strides 8 to 128) on the backbone's maps of strides 8,
16 and 32, sigmoid class scores, and torchvision's focal and L1 losses and decoding of RetinaNet (Lin et al.:
"Focal Loss for Dense Object Detection", ICCV 2017). They differ in the head:

- `retinanet`: towers of four convolutions with GroupNorm, shared by all levels; 9 anchors per location
- `ssdlite`: one depthwise separable convolution with BatchNorm per level (Sandler et al.: "MobileNetV2", CVPR
  2018); 6 anchors per location
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import (
    RetinaNet,
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.models.detection.ssdlite import SSDLiteClassificationHead, SSDLiteRegressionHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from ..errors import UnknownModel
from .readouts import DetectorReadouts

STRIDES = (8, 16, 32)
"""Of the backbone's maps, in pixels of the input."""
LEVELS = 5
WIDTH = 64
"""Channels of the pyramid: a quarter of torchvision's, for small networks."""
CHANNELS_PER_GROUP = 8
"""Of GroupNorm, as in torchvision's `retinanet_resnet50_fpn_v2`."""
SCALES = {"retinanet": (0.0, 1 / 3, 2 / 3), "ssdlite": (0.0, 1 / 2)}
"""Binary logarithms of the anchors' sizes at a level, relative to the smallest."""
RATIOS = (0.5, 1.0, 2.0)
"""Height over width of anchors."""
PRIOR = 0.01
"""Score of every class at every anchor of a new head."""
DETECTIONS = 100
"""Largest number of detections per image."""


def create_backbone(name: str, **options: Any) -> nn.Module:
    """Build timm's network of a resolved name that returns its maps of strides 8, 16 and 32.

    Raises UnknownModel if it does not have them.
    """
    with torch.device("meta"):
        probe: Any = timm.create_model(name, features_only=True, **options)
    strides = probe.feature_info.reduction()
    if not set(STRIDES) <= set(strides):
        raise UnknownModel(
            f"Model {name} cannot be a detector's backbone: its maps have strides "
            f"{', '.join(map(str, sorted(set(strides))))}, not {', '.join(map(str, STRIDES))}. Choose "
            "another one, such as mobilenetv2_050 or resnet18."
        )
    levels = [max(i for i, stride in enumerate(strides) if stride == wanted) for wanted in STRIDES]
    backbone: nn.Module = timm.create_model(name, features_only=True, out_indices=levels, **options)
    return backbone


class DenseDetector(RetinaNet):
    """A detector that scores every class at anchors on a grid.

    Args:
        kind: `retinanet` or `ssdlite`.
        backbone: see `create_backbone`.
        image_size: height and width of the input in pixels.
    """

    def __init__(self, kind: str, backbone: Any, num_classes: int, image_size: tuple[int, int]) -> None:
        generator = _anchor_generator(kind, image_size)
        per_location = generator.num_anchors_per_location()[0]
        head = _build_head(kind, per_location, num_classes)
        backbone.out_channels = WIDTH
        super().__init__(
            backbone, num_classes, anchor_generator=generator, head=head, detections_per_img=DETECTIONS
        )
        del self.transform  # of torchvision's images of any size
        self.kind, self.image_size, self.num_classes = kind, image_size, num_classes
        self.fpn = FeaturePyramidNetwork(
            backbone.feature_info.channels(), WIDTH, extra_blocks=LastLevelP6P7(WIDTH, WIDTH)
        )
        self.anchors_per_location, self.fpn_width = per_location, WIDTH
        self.has_frozen_norm = False
        self.grids = self._compute_grids()
        with torch.device("cpu"):
            shown = ImageList(torch.empty(1, 3, *image_size), [image_size])
            anchors = generator(shown, [torch.empty(1, 1, *grid) for grid in self.grids])[0]
        self.anchors: Tensor
        self.register_buffer("anchors", anchors, persistent=False)
        # timm's name of the layers whose outputs are classes.
        self.pretrained_cfg = {"classifier": tuple(self._classifier_names())}

    def forward(self, x: Tensor) -> Tensor:
        """Return the detections of images [B,3,H,W], see `decode`."""
        return self.decode(*self.raw(x))

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits [B,A,K] and box deltas [B,A,4] of images [B,3,H,W]."""
        return self.predict(self.maps(x))

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the levels of the pyramid [B,C,h,w] of images [B,3,H,W], finest first."""
        levels = self.backbone(x)
        if str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC"):
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        return list(self.fpn(OrderedDict((str(i), level) for i, level in enumerate(levels))).values())

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return class logits [B,A,K] and box deltas [B,A,4] of the pyramid's levels."""
        outputs = self.head(list(maps))
        return outputs["cls_logits"], outputs["bbox_regression"]

    @property
    def has_tower(self) -> bool:
        """Return True if class scores are computed from a tower of convolutions shared by all levels."""
        return self.kind == "retinanet"

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

    def loss(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the scalar losses `class` and `box`, means over images.

        Args:
            outputs: class logits and box deltas [B,A,K+4].
            labels: [B,M,7], rows (class, x1, y1, x2, y2, area, crowd) with coordinates in 0..1 of the input's
                width and height. Rows of class -1 are padding; crowds are not trained on.
        """
        height, width = self.image_size
        scale = outputs.new_tensor([width, height, width, height])
        targets = []
        for rows in labels:
            kept = rows[(rows[:, 0] >= 0) & (rows[:, 6] == 0)]
            targets.append({"labels": kept[:, 0].long(), "boxes": kept[:, 1:5].to(outputs) * scale})
        head = {"cls_logits": outputs[..., :-4], "bbox_regression": outputs[..., -4:]}
        losses = self.compute_loss(targets, head, [self.anchors] * len(targets))
        return {"class": losses["classification"], "box": losses["bbox_regression"]}

    @torch.no_grad()
    def decode(self, logits: Tensor, boxes: Tensor) -> Tensor:
        """Return the detections [B,100,6] of class logits [B,A,K] and box deltas [B,A,4].

        Rows are (score, class, x1, y1, x2, y2) by falling score, with coordinates in 0..1 of the input's
        width and height; unused rows are 0. They are computed in fp32 even under autocast. On the meta device
        there are shapes only.
        """
        logits, boxes = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, boxes))
        detections = logits.new_zeros(len(logits), DETECTIONS, 6)
        if logits.is_meta:
            return detections
        counts = self.level_counts
        height, width = self.image_size
        scale = logits.new_tensor([width, height, width, height])
        images = self.postprocess_detections(
            {"cls_logits": logits.split(counts, dim=1), "bbox_regression": boxes.split(counts, dim=1)},
            [self.anchors.split(counts)] * len(logits),
            [self.image_size] * len(logits),
        )
        for rows, image in zip(detections, images, strict=True):
            n = len(image["scores"])
            rows[:n, 0], rows[:n, 1], rows[:n, 2:] = image["scores"], image["labels"], image["boxes"] / scale
        return detections

    def exportable(self) -> nn.Module:
        """Return the module to export: images [B,3,H,W] to class logits [B,A,K] and box deltas [B,A,4]."""
        return _Exportable(self)

    def readouts(self, image_size: Any = None) -> DetectorReadouts:
        """Return the features of this detector; its image size is that of `build`."""
        return DetectorReadouts(self)

    @property
    def level_counts(self) -> list[int]:
        """Number of anchors of each level."""
        return [height * width * self.anchors_per_location for height, width in self.grids]

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

    def freeze_norm(self) -> None:
        """Fix statistics and parameters of the backbone's BatchNorm, as batches of detection are small."""
        self.has_frozen_norm = True
        for module in self._backbone_norms():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "DenseDetector":
        super().train(mode)
        if self.has_frozen_norm:
            for module in self._backbone_norms():
                module.eval()
        return self

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the class scores of the head by new ones."""
        head = _build_head(self.kind, self.anchors_per_location, num_classes)
        for name in self._classifier_names():
            self.set_submodule(name, head.get_submodule(name.removeprefix("head.")))
        scores = self.head.classification_head
        self.num_classes = scores.num_classes = scores.num_columns = num_classes

    def _backbone_norms(self) -> list[nn.Module]:
        return [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]

    def _classifier_names(self) -> list[str]:
        if self.kind == "retinanet":
            return ["head.classification_head.cls_logits"]
        return [f"head.classification_head.module_list.{level}.1" for level in range(LEVELS)]

    def _compute_grids(self) -> list[tuple[int, int]]:
        """Return height and width of each level by shapes alone."""
        shapes = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            levels = shapes.maps(torch.empty(1, 3, *self.image_size, device="meta"))
        return [(level.shape[2], level.shape[3]) for level in levels]


class _Exportable(nn.Module):
    def __init__(self, detector: DenseDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.detector.raw(x)


def _anchor_generator(kind: str, image_size: tuple[int, int]) -> AnchorGenerator:
    """Return anchors of the usual 4 strides for images of 512 pixels and more, down to 2 for those of 256.

    Objects of smaller images are smaller, but the strides are the same.
    """
    base = min(4.0, max(2.0, max(image_size) / 128))
    sizes = tuple(
        tuple(int(base * stride * 2**scale) for scale in SCALES[kind]) for stride in (8, 16, 32, 64, 128)
    )
    return AnchorGenerator(sizes, (RATIOS,) * LEVELS)


def _build_head(kind: str, anchors: int, num_classes: int) -> nn.Module:
    if kind == "ssdlite":
        return _LiteHead(anchors, num_classes)
    norm = partial(nn.GroupNorm, WIDTH // CHANNELS_PER_GROUP)
    head: nn.Module = RetinaNetHead(WIDTH, anchors, num_classes, norm_layer=norm)
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
    def __init__(self, anchors: int, num_classes: int) -> None:
        nn.Module.__init__(self)
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # those of torchvision's SSDLite
        channels, counts = [WIDTH] * LEVELS, [anchors] * LEVELS
        self.classification_head = _LiteClassificationHead(channels, counts, num_classes, norm)
        self.regression_head = _LiteRegressionHead(channels, counts, norm)
