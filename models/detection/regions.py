"""Regions of interest: suppression with a fixed number of survivors, pooling, and the vectors of regions.

All shapes are fixed by those of the inputs, so that a two-stage detector is one static ONNX graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, nms, roi_align
from torchvision.ops.poolers import LevelMapper

POOLED = 7
"""Side of a pooled region in cells."""
SAMPLES = 2
"""Sampled points of a cell along each side."""
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4
"""A region of this side in pixels is pooled from the level of stride 2^4, as in torchvision."""
BOX_HEAD = "roi_heads.box_head"
"""Name of the layers from a pooled region to its vector."""
FINEST_LEVEL = 3
"""Binary logarithm of the finest level's stride."""


@torch.library.custom_op("questpress::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Return the boxes that no better one of their image overlaps by more than `iou`, bool [B,N].

    Args:
        boxes: [B,N,4].
        scores: [B,N]; a box with a score of 0 or less neither is kept nor suppresses others.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row, image_boxes, image_scores in zip(kept, boxes, scores, strict=True):
        used = (image_scores > 0).nonzero()[:, 0]
        row[used[nms(image_boxes[used], image_scores[used], iou)]] = True
    return kept


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(scores, dtype=torch.bool)


def onnx_operators() -> dict[Any, Callable[..., Any]]:
    """Return the translation of `suppress` for torch's exporter (`custom_translation_table`)."""
    from onnxscript import opset18

    op: Any = opset18

    def translate(boxes: Any, scores: Any, iou: float) -> Any:
        limit = op.Constant(value_ints=[1 << 30])
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            limit,
            op.Constant(value_floats=[iou]),
            op.Constant(value_floats=[0.0]),
        )
        places = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        count = op.Slice(op.Shape(places), op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
        ones = op.Expand(op.Constant(value_floats=[1.0]), count)
        zeros = op.Mul(scores, op.Constant(value_float=0.0))
        return op.Greater(op.ScatterND(zeros, places, ones), op.Constant(value_float=0.5))

    return {torch.ops.questpress.suppress.default: translate}


def build_box_head(channels: int, width: int) -> nn.Module:
    """Return the layers from a pooled region [n,C,7,7] to its vector [n,D]."""
    head: nn.Module = TwoMLPHead(channels * POOLED**2, width)
    return head


def pool_listed(maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
    """Return the pooled regions of all images [n,C,7,7] by torchvision's pooling, in fp32 or wider.

    Args:
        maps: the levels that regions are pooled from, [B,C,h,w] each, finest first.
        regions: boxes [n,4] of each image in pixels of its input.
    """
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    levels = range(FINEST_LEVEL, FINEST_LEVEL + len(maps))
    pool: Any = MultiScaleRoIAlign([str(level) for level in levels], POOLED, SAMPLES)
    # Otherwise guessed from the sizes of maps, wrongly for small ones.
    pool.scales = [2.0**-level for level in levels]
    pool.map_levels = LevelMapper(levels[0], levels[-1], CANONICAL_SIDE, CANONICAL_LEVEL)
    named = {str(level): tensor.to(dtype) for level, tensor in zip(levels, maps, strict=True)}
    pooled: Tensor = pool(named, [boxes.to(dtype) for boxes in regions], [])
    return pooled


class BoxHead(nn.Module):
    """The frozen box head of a detector, which computes the vectors of any regions.

    Args:
        weights: those of `build_box_head`.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        width, numbers = weights["fc6.weight"].shape
        self.layers = build_box_head(numbers // POOLED**2, width)
        self.layers.load_state_dict(weights)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
        """Return the vectors [n,D] of regions, see `pool_listed`."""
        vectors: Tensor = self.layers(pool_listed(maps, regions))
        return vectors


def pool_fixed(maps: Sequence[Tensor], regions: Tensor) -> Tensor:
    """Return the pooled regions [B·R,C,7,7] of `regions` [B,R,4] as `pool_listed` does, with fixed shapes.

    Each region is pooled from every level, and the one for its size is selected.
    """
    images, count, _ = regions.shape
    numbers = torch.arange(images, device=regions.device, dtype=regions.dtype)
    numbered = torch.cat([numbers.view(-1, 1, 1).expand(-1, count, 1), regions], dim=2).flatten(0, 1)
    sides = regions[..., 2:] - regions[..., :2]
    relative = (sides[..., 0] * sides[..., 1]).sqrt() / CANONICAL_SIDE
    levels = torch.floor(CANONICAL_LEVEL + torch.log2(relative.clamp(min=1e-6)) + 1e-6).flatten()
    coarsest = FINEST_LEVEL + len(maps) - 1
    levels = levels.clamp(FINEST_LEVEL, coarsest).view(-1, 1, 1, 1)
    pooled = None
    for level, tensor in enumerate(maps, FINEST_LEVEL):
        values = roi_align(tensor, numbered, POOLED, 2.0**-level, SAMPLES)
        pooled = values if pooled is None else torch.where(levels == level, values, pooled)
    assert pooled is not None
    return pooled
