"""Average pooling of feature maps to a grid, with gradients that are the same in each run."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

CELL_GRIDS = (1, 2, 4)
"""Cells per side of the grids whose cells SDD classifies."""


def average_cells(f: Tensor) -> Tensor:
    """Return the means [B,21,C] of a map [B,C,H,W] over its cells, the whole map first."""
    return torch.cat([average_pool(f, (n, n)).flatten(2) for n in CELL_GRIDS], dim=2).transpose(1, 2)


def average_pool(f: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pool a map [B,C,H,W] to ``grid`` (h, w): [B,C,h,w], as ``adaptive_avg_pool2d`` does.

    The gradient of that function is not deterministic on a GPU, which adds up the parts of overlapping cells
    in any order. Cells that do not overlap are pooled by ``avg_pool2d``.
    """
    sides = f.shape[-2:]
    if all(side % cells == 0 for side, cells in zip(sides, grid, strict=True)):
        return avg_pool2d(f, (sides[0] // grid[0], sides[1] // grid[1]))
    if not torch.are_deterministic_algorithms_enabled():
        return adaptive_avg_pool2d(f, grid)
    for dim, side, cells in zip((2, 3), sides, grid, strict=True):
        bounds = [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
        f = torch.stack([f.narrow(dim, start, end - start).mean(dim) for start, end in bounds], dim)
    return f
