"""Where two feature maps meet: a common grid, the maps on it, and their positions as rows."""

import torch.nn.functional as F
from torch import Tensor


def shared_grid(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> tuple[int, int]:
    """The grid (H, W) at which two maps [C,H,W] meet: the finer one is average-pooled to the coarser."""
    return min(student[1], teacher[1]), min(student[2], teacher[2])


def pooled(f: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map [B,C,H,W], average-pooled to the grid (h, w) where that is another: [B,C,h,w]."""
    return f if f.shape[-2:] == grid else F.adaptive_avg_pool2d(f, grid)


def positions(f: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map [B,C,H,W], average-pooled to the grid (h, w), as the features [B·h·w,C] of its positions."""
    f = pooled(f, grid)
    return f.permute(0, 2, 3, 1).reshape(-1, f.shape[1])
