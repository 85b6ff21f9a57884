"""Locality-sensitive hashing: M random hyperplanes, and on which side of each of them a feature lies.

    a = f·Wᵀ + b     W ~ N(0, s²) [M,D], b [M]        h = 1[a > 0]

Two features differ in the bit of a hyperplane through the origin with probability θ/π, θ the angle between
them (Charikar: "Similarity Estimation Techniques from Rounding Algorithms", STOC 2002).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 25
"""Numbers of a block of projections: 128 MB, whatever the number of features and hashes."""


def draw(hashes: int, width: int, std: float, seed: int) -> Tensor:
    """W [hashes,width] ~ N(0, std²), fp32, by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(hashes, width, generator=generator)


def project(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """a = f·Wᵀ + b [B,M] of features f [B,D], for the sake of signs in fp32 or better even under autocast."""
    with torch.autocast(f.device.type, enabled=False):
        kind = torch.promote_types(f.dtype, weight.dtype)
        return F.linear(f.to(kind), weight.to(kind), bias.to(kind))


def bits(a: Tensor) -> Tensor:
    """h = 1[a > 0], as numbers."""
    return (a > 0).to(a.dtype)


def hash_loss(a_s: Tensor, h: Tensor) -> Tensor:
    """Each sample's mean over the hashes of BCE(σ(a_s), h), [B]: a_s [B,M] the student's, h [B,M] bits."""
    return F.binary_cross_entropy_with_logits(a_s, h, reduction="none").mean(1)


def medians(features: np.ndarray, weight: Tensor, device: torch.device) -> Tensor:
    """The median of each hash's projection over n features [n,D], fp32 [M]; ``device`` computes the products.

    Block by block of hashes: besides the features no more than twice ``BLOCK`` numbers are held (a block's
    projections and numpy's copy of them), or twice n where that is more.
    """
    rows = torch.from_numpy(features).to(device)
    size = max(1, BLOCK // len(rows))
    each = [np.median((rows @ part.to(device).T).cpu().numpy(), axis=0) for part in weight.split(size)]
    return torch.from_numpy(np.concatenate(each)).to(weight.dtype)
