"""Decoded images of any sizes, end to end in one buffer."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """N images in one buffer.

    ``data`` is uint8 [P, 3], the RGB pixels of all images row by row, one image after the other (possibly
    memory-mapped, possibly on an accelerator). ``offsets`` (in pixels), ``heights`` and ``widths`` are
    int64 [N] and stay on the host, since what is computed from them is small.
    """

    data: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def same_size(self) -> bool:
        return len(self) > 0 and bool(
            (self.heights == self.heights[0]).all() and (self.widths == self.widths[0]).all()
        )

    def image(self, index: int) -> Tensor:
        """A view of one image: uint8 [H, W, 3]."""
        start, height, width = (int(x[index]) for x in (self.offsets, self.heights, self.widths))
        return self.data[start : start + height * width].view(height, width, 3)

    def stacked(self) -> Tensor:
        """A view of all images: uint8 [N, H, W, 3]. Raises ValueError where sizes differ."""
        if not self.same_size:
            raise ValueError("only images of one size can be stacked")
        return self.data.view(len(self), int(self.heights[0]), int(self.widths[0]), 3)

    def to(self, device: torch.device | str) -> "Pixels":
        return replace(self, data=self.data.to(device))


def ragged(data: Tensor, sizes: Tensor) -> Pixels:
    """Pixels from a buffer (uint8 [P, 3]) and the images' sizes (int64 [N, 2]: height, width)."""
    areas = sizes[:, 0] * sizes[:, 1]
    return Pixels(data, areas.cumsum(0) - areas, sizes[:, 0].clone(), sizes[:, 1].clone())
