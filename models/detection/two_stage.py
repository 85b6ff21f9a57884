"""Two-stage detectors on timm backbones: `fasterrcnn:BACKBONE`.

Ren et al.: "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NeurIPS 2015, on
a feature pyramid (Lin et al., CVPR 2017), with the heads, losses, sampling and decoding of torchvision. For
small networks the pyramid has the levels and the width of the dense detectors', an image has at most 128
regions, the vector of a region 256 numbers, and one box is regressed for all classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import clip_boxes_to_image

from .pyramid import DETECTIONS, STRIDES, PyramidDetector, create_anchors
from .regions import build_box_head, onnx_operators, pool_fixed, pool_listed, suppress

REGIONS = 128
"""Regions of an image, in training and at most in use."""
REGION_WIDTH = 256
"""Numbers in the vector of a region: a quarter of torchvision's."""
CANDIDATES = 256
"""Largest number of anchors of a level that become proposals before suppression, in use."""
TRAINED_CANDIDATES, TRAINED_PROPOSALS = 1000, 512
"""Of each level before suppression, and of an image after it, in training."""
FOREGROUND = 0.25
"""Largest fraction of the sampled regions that contain an object."""


class BoxPredictor(nn.Module):
    """Class logits [n,K+1] with background first, and box deltas [n,4], of region vectors [n,D]."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, 4)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.cls_score(vectors), self.bbox_pred(vectors)
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        return outputs[0].to(dtype), outputs[1].to(dtype)


class TwoStageDetector(PyramidDetector):
    """A detector that classifies the regions proposed by a network on the same pyramid.

    Args:
        kind: `fasterrcnn`.
        backbone: see `create_backbone`.
        image_size: height and width of the input in pixels.
        width: channels of the pyramid.
    """

    output_names = ("logits", "boxes", "regions")
    region_levels, region_width = len(STRIDES), REGION_WIDTH
    background_classes = 1
    """Rows of the classifier before those of the classes."""

    def __init__(
        self, kind: str, backbone: Any, num_classes: int, image_size: tuple[int, int], width: int
    ) -> None:
        super().__init__()
        self.kind, self.backbone = kind, backbone
        generator = create_anchors((0.0,), image_size)
        self.build_pyramid(generator, num_classes, image_size, width)
        self.proposal_anchors = self.anchors_per_location
        self.anchors_per_location = 1  # of the classifier
        self.rpn = RegionProposalNetwork(
            generator,
            RPNHead(width, self.proposal_anchors),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": TRAINED_CANDIDATES, "testing": CANDIDATES},
            post_nms_top_n={"training": TRAINED_PROPOSALS, "testing": REGIONS},
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            None,  # pooling is a function
            build_box_head(width, REGION_WIDTH),
            BoxPredictor(REGION_WIDTH, num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=REGIONS,
            positive_fraction=FOREGROUND,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=DETECTIONS,
        )

    @property
    def level_counts(self) -> list[int]:
        return [height * width * self.proposal_anchors for height, width in self.grids]

    def raw(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return class logits [B,R,K+1], box deltas [B,R,4] and regions [B,R,4] of images [B,3,H,W].

        Class 0 is the background. Regions are in pixels of the input; unused ones are 0.
        """
        maps = self.maps(x)
        objectness, deltas = self.score_anchors(maps)
        regions = self.select_regions(objectness, deltas)
        vectors = self.roi_heads.box_head(pool_fixed(maps[: self.region_levels], regions))
        outputs = self.roi_heads.box_predictor(vectors)
        logits, boxes = (output.view(-1, regions.shape[1], output.shape[1]) for output in outputs)
        return logits, boxes, regions

    def score_anchors(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return objectness [B,A] and box deltas [B,A,4] of all anchors, in fp32 or wider."""
        objectness, deltas = self.rpn.head(list(maps))
        images = maps[0].shape[0]
        flat = concat_box_prediction_layers(objectness, deltas)
        dtype = torch.promote_types(flat[0].dtype, torch.float32)
        return flat[0].to(dtype).view(images, -1), flat[1].to(dtype).view(images, -1, 4)

    def select_regions(self, objectness: Tensor, deltas: Tensor) -> Tensor:
        """Return the regions [B,R,4] that torchvision's `filter_proposals` keeps, in the order of anchors.

        So equal scores, up to rounding, do not change the order of regions.
        """
        candidates, start = [], 0
        for level in objectness.split(self.level_counts, 1):
            candidates.append(level.topk(min(CANDIDATES, level.shape[1]), dim=1).indices + start)
            start += level.shape[1]
        numbers = torch.cat(candidates, 1)
        chosen = deltas.gather(1, numbers.unsqueeze(2).expand(-1, -1, 4)).flatten(0, 1)
        anchors = self.anchors.to(deltas)[numbers].flatten(0, 1)
        boxes = self.rpn.box_coder.decode_single(chosen, anchors).view(-1, numbers.shape[1], 4)
        boxes = clip_boxes_to_image(boxes, self.image_size)
        is_large = (boxes[..., 2:] - boxes[..., :2] >= self.rpn.min_size).all(2)
        scores = torch.where(is_large, objectness.gather(1, numbers).sigmoid(), -1.0)
        sizes = [level.shape[1] for level in candidates]
        levels = zip(boxes.split(sizes, 1), scores.split(sizes, 1), strict=True)
        kept = torch.cat([suppress(*level, self.rpn.nms_thresh) for level in levels], 1)
        best = torch.where(kept, scores, -1.0).topk(min(REGIONS, sum(sizes)), dim=1).indices
        best = best.gather(1, numbers.gather(1, best).sort(dim=1).indices)
        regions = boxes.gather(1, best.unsqueeze(2).expand(-1, -1, 4))
        return torch.where(kept.gather(1, best).unsqueeze(2), regions, 0.0)

    def compute_features(self, maps: Sequence[Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        """Return the features of the heads by name, see `pyramid.py`.

        With labels, regions are those of the labeled images that the head is trained on.
        """
        losses: tuple[Tensor, ...] = ()
        if labels is None:
            with torch.no_grad():
                regions = list(self.select_regions(*self.score_anchors(maps)))
        else:
            maps = [level[: len(labels)] for level in maps]
            objectness, deltas = self.score_anchors(maps)
            targets = self.targets(labels)
            losses = self.compute_proposal_losses(objectness, deltas, targets)
            proposals = self.propose(objectness, deltas)
            regions, _, classes, offsets = self.roi_heads.select_training_samples(proposals, targets)
        vectors = self.roi_heads.box_head(pool_listed(maps[: self.region_levels], regions))
        logits, boxes = self.roi_heads.box_predictor(vectors)
        counts = [len(rows) for rows in regions]
        features = {
            "logits": pad_sequence(logits.split(counts), batch_first=True),
            "regions": pad_sequence(regions, batch_first=True),
            "region_vectors": pad_sequence(vectors.split(counts), batch_first=True),
        }
        if losses:
            losses += fastrcnn_loss(logits, self.repeat_boxes(boxes), classes, offsets)
            features["losses"] = torch.stack(losses)
        return features

    def targets(self, labels: Tensor) -> list[dict[str, Tensor]]:
        """Return targets as numbers from 1, without boxes of no area."""
        targets = []
        for target in super().targets(labels):
            kept = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(1)
            targets.append({"labels": target["labels"][kept] + 1, "boxes": target["boxes"][kept]})
        return targets

    @torch.no_grad()
    def propose(self, objectness: Tensor, deltas: Tensor) -> list[Tensor]:
        """Return torchvision's proposals [n,4] of each image, in training."""
        images = objectness.shape[0]
        decoded = self.rpn.box_coder.decode(deltas.flatten(0, 1), [self.anchors] * images)
        proposals: list[Tensor] = self.rpn.filter_proposals(
            decoded.view(images, -1, 4), objectness, [self.image_size] * images, self.level_counts
        )[0]
        return proposals

    def compute_proposal_losses(
        self, objectness: Tensor, deltas: Tensor, targets: list[dict[str, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        anchors = [self.anchors] * len(targets)
        classes, boxes = self.rpn.assign_targets_to_anchors(anchors, targets)
        offsets = self.rpn.box_coder.encode(boxes, anchors)
        losses: tuple[Tensor, Tensor] = self.rpn.compute_loss(
            objectness, deltas.flatten(0, 1), classes, offsets
        )
        return losses

    def repeat_boxes(self, boxes: Tensor) -> Tensor:
        """Return box deltas [n,4] as those of each class, [n,4·(K+1)]."""
        return boxes.repeat(1, self.num_classes + self.background_classes)

    @torch.no_grad()
    def decode(self, *outputs: Tensor) -> Tensor:
        logits, boxes, regions = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in outputs)
        if logits.is_meta:
            return logits.new_zeros(len(logits), DETECTIONS, 6)
        images = []
        for rows, deltas, proposals in zip(logits, boxes, regions, strict=True):
            used = (proposals[:, 2:] > proposals[:, :2]).all(1)
            [found], [scores], [classes] = self.roi_heads.postprocess_detections(
                rows[used], self.repeat_boxes(deltas[used]), [proposals[used]], [self.image_size]
            )
            images.append({"boxes": found, "scores": scores, "labels": classes - 1})
        return self.to_rows(images, logits)

    @property
    def onnx_operators(self) -> Any:
        """Translations of our operators for torch's exporter."""
        return onnx_operators()

    @property
    def decoder(self) -> dict[str, Any]:
        """All that a client needs to decode the outputs, as JSON.

        `candidates` is the number of regions. Deltas refer to a region as those of `DenseDetector.decoder` to
        an anchor.
        """
        return {
            "kind": self.kind,
            "anchors": [],
            "box_weights": list(self.roi_heads.box_coder.weights),
            "score_threshold": self.roi_heads.score_thresh,
            "nms_iou": self.roi_heads.nms_thresh,
            "candidates": min(REGIONS, sum(min(CANDIDATES, count) for count in self.level_counts)),
            "detections": self.roi_heads.detections_per_img,
        }

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the class scores of the head by new ones."""
        self.num_classes = num_classes
        self.roi_heads.box_predictor.cls_score = nn.Linear(
            REGION_WIDTH, num_classes + self.background_classes
        )

    def classifier_names(self) -> list[str]:
        return ["roi_heads.box_predictor.cls_score"]
