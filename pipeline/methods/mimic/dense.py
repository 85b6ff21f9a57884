"""Feature mimicking in a dense detector: the patches that its classifier reads match the teacher's.

Wang, Ge, Wu (see ``mimic.py``), section on RetinaNet, and the authors' code. The vector f of a location is
the 3×3 patch [9·C] of the classification tower's output [B,C,h,w] (zero-padded), of which ``cls_logits``
computes the scores of the location's anchors. All locations of all levels count, background included, except
those whose anchors all lie between the thresholds of foreground and background, which are not trained either:

    L = mean over images with boxes of the mean over the image's locations of L_l2, L_lsh, or both

Patches are never unfolded, which would cost nine times the memory: f·Wᵀ is a convolution with W as
[M,C,3,3], and the mean of (f_S − f_T)² a 3×3 mean of the mean over channels of the squared difference.

The authors' b is 0 and their M 4,096 for 9·256 numbers. If ``hashes`` is not set, M is 9·C, at most 4,096.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from .. import base

MAX_HASHES = 4096
PATCH = 3
"""Side of a patch in locations."""

THRESHOLDS = 0.5, 0.4
"""RetinaNet's least IoU of a foreground anchor with a box, and largest of a background anchor."""


def find_trained(anchors: Tensor, labels: Tensor, locations: int) -> Tensor:
    """Return the locations at which some anchor is trained as foreground or background, bool [B,L].

    Args:
        anchors: [A,4], A = L times the anchors of a location; in fractions of the image, as the boxes.
        labels: boxes [B,M,7], see ``data/boxes.py``.
        locations: L.
    """
    matcher = Matcher(*THRESHOLDS, allow_low_quality_matches=True)
    rows = []
    for boxes in labels:
        used = boxes[(boxes[:, 0] >= 0) & (boxes[:, 6] == 0), 1:5]
        if not len(used):
            rows.append(torch.ones(locations, dtype=torch.bool, device=labels.device))
            continue
        matches = matcher(box_iou(used.float(), anchors.float()))
        is_trained = matches != Matcher.BETWEEN_THRESHOLDS
        rows.append(is_trained.view(locations, -1).any(1))
    return torch.stack(rows)


def square_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of (f_S − f_T)² over each location's patch, [B,h·w], of tower outputs [B,C,h,w]."""
    distance = (student - teacher).square().mean(1, keepdim=True)
    return F.avg_pool2d(distance, PATCH, stride=1, padding=PATCH // 2).flatten(1)


def hash_losses(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return L_lsh of each location's patch and the fraction of equal bits, both [B,h·w].

    ``weight`` is W [M,9·C], whose rows are patches [C,3,3].
    """
    kernel = weight.view(len(weight), -1, PATCH, PATCH)
    a_s = F.conv2d(student, kernel, padding=PATCH // 2)
    with torch.no_grad():
        h = (F.conv2d(teacher, kernel, padding=PATCH // 2) > 0).to(a_s.dtype)
        equal = ((a_s > 0) == (h > 0)).to(a_s.dtype).mean(1)
    losses = F.binary_cross_entropy_with_logits(a_s, h, reduction="none").mean(1)
    return losses.flatten(1), equal.flatten(1)


def compute_loss(
    variant: str,
    weight: Tensor | None,
    towers: Sequence[tuple[Tensor, Tensor]],
    anchors: Tensor,
    labels: Tensor,
    sums: base.RunningSums,
) -> Tensor:
    """Return the scalar loss of the towers of both, [B,C,h,w] of each level, in fp32 even under autocast."""
    with torch.autocast(labels.device.type, enabled=False):
        parts = []
        for ours, theirs in towers:
            dtype = torch.promote_types(ours.dtype, torch.float32)
            f_s, f_t = ours.to(dtype), theirs.to(dtype)
            losses = f_s.new_zeros(len(f_s), f_s.shape[-2] * f_s.shape[-1])
            if variant != "lsh":
                square = square_distances(f_s, f_t)
                sums.add(samples=square.new_full((), square.numel()), l2=square.sum())
                losses = losses + square
            if variant != "l2":
                assert weight is not None
                hashed, equal = hash_losses(f_s, f_t, weight.to(dtype))
                sums.add(hashed=equal.new_full((), equal.numel()), equal=equal.sum())
                losses = losses + hashed
            parts.append(losses)
        losses = torch.cat(parts, dim=1)
        trained = find_trained(anchors, labels, losses.shape[1]).to(losses.dtype)
        means = (losses * trained).sum(1) / trained.sum(1).clamp(min=1)
        shows = ((labels[:, :, 0] >= 0) & (labels[:, :, 6] == 0)).any(1).to(losses.dtype)
        return (means * shows).sum() / shows.sum().clamp(min=1)
