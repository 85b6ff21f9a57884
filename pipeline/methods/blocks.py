"""A sum over many rows, block by block, with its gradients: what stands between never exists whole.

A loss over the words of a vocabulary passes through matrices of positions × words, far larger than what goes
in and what comes out: 8,192 × 4,096 for a batch of 128 maps of 8×8. Taken in blocks they stay in the
processor's cache, and no more than one block is held at a time, since each block's gradients are computed as
soon as its value is. Losses over the vocabulary of a language model are treated likewise (Hsu et al.: "Liger
Kernel", 2024, arXiv 2410.10989).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CACHED = 1 << 20
"""Elements of a block's matrix on a CPU: 4 MB, which the caches hold (half or twice as many are as fast)."""

ON_DEVICE = 1 << 26
"""The same on a GPU: large enough to fill it, small beside its memory."""


def sum_over_blocks(
    term: Callable[..., Tensor], width: int, fixed: Tensor, rows: Tensor, *shared: Tensor
) -> Tensor:
    """Σ over blocks of ``term(fixed[block], rows[block], *shared)``.

    Args:
        term: a scalar that is a sum over rows; it is called once for each block, in order.
        width: columns of the matrix that ``term`` makes of its rows.
        fixed: [n,…] without gradient.
        rows: [n,…] with gradient.
        shared: with gradient, the same for all blocks.
    """
    size = max(1, (CACHED if rows.device.type == "cpu" else ON_DEVICE) // width)
    total: Tensor = _Sum.apply(term, size, fixed, rows, *shared)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, term: Callable[..., Tensor], size: int, fixed: Tensor, rows: Tensor, *shared: Tensor
    ) -> Tensor:
        learns = any(ctx.needs_input_grad)
        values = []
        of_rows = torch.empty_like(rows)
        of_shared = [torch.zeros_like(one) for one in shared]
        for at in (slice(start, start + size) for start in range(0, len(rows), size)):
            with torch.set_grad_enabled(learns):
                inputs = [one.detach().requires_grad_(learns) for one in (rows[at], *shared)]
                value = term(fixed[at], *inputs)
            values.append(value.detach())
            if learns:
                of_rows[at], *parts = torch.autograd.grad(value, inputs)
                for sum_, part in zip(of_shared, parts, strict=True):
                    sum_ += part
        ctx.save_for_backward(of_rows, *of_shared)
        return torch.stack(values).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(gradient * saved for saved in ctx.saved_tensors)
