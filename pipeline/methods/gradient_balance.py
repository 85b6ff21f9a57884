"""Adjust a method's weight if its gradients are out of proportion to those of the labels.

The authors of a method tuned its weight for their networks; for another pair it may be wrong by a factor of
ten. Of twelve feature losses in the CRD benchmark, four are worse than no teacher at all on ResNet-50 →
MobileNetV2. The effect of a weight shows in the gradients that the losses send into the student, as in
GradNorm (Chen et al., ICML 2018, arXiv 1711.02257) and VQGAN's adaptive weight (Esser et al., CVPR 2021,
arXiv 2012.09841, eq. 7):

    r = ‖∂(w·L)/∂f_S‖ / ‖∂L_CE/∂f_S‖      f_S: the student's last map, of the whole batch; L_CE unweighted

A method declares the range of r in which it is known to work, ``gradient_ratio``. A weight with r inside the
range is kept; otherwise it is scaled to the nearer end:

    w ← w · clip(r, low, high) / r

The best r of a pair is unknown, so weights are changed no further than into the range. r is the geometric
mean over the first steps. During these steps the mean so far is used; afterwards the factor is fixed.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..runs.results import BalancedWeight
from .base import Method

STEPS = 50
"""Training steps in which gradients are measured."""

LEAST_RATIO = 1e-3
"""Ratio below which gradients are rounding errors, and the weight is kept."""

SCALE = 2.0**10
"""Factor of losses while their gradients are measured: without it, small ones would be 0 in fp16.

Gradients of up to 64 do not overflow. A power of 2 changes no bit of them in fp32 and bf16.
"""


class GradientBalance(nn.Module):
    """The weight factors of a run's methods, saved in checkpoints so that a resumed run keeps them."""

    logs: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, methods: Mapping[str, Method], sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        self.sum_over_ranks = sum_over_ranks
        self.methods = list(methods)  # names only: the modules belong to the student module
        self.steps = 0
        self._squares: Tensor | None = None
        self.register_buffer("logs", torch.zeros(len(methods)))
        self.register_buffer("counts", torch.zeros(len(methods)))
        for end, name in enumerate(("low", "high")):
            ends = torch.tensor([method.gradient_ratio[end] for method in methods.values()])
            self.register_buffer(name, ends, persistent=False)

    @property
    def is_measuring(self) -> bool:
        """Return True during the first ``STEPS`` training steps."""
        return self.training and torch.is_grad_enabled() and self.steps < STEPS

    def measure(self, losses: Mapping[str, Tensor], cross_entropy: Tensor, f_s: Tensor) -> None:
        """Measure the gradients of a step, or of one of its micro-batches.

        With micro-batches, r is that of the parts so far, and at the end of the step that of the whole batch.
        ``losses`` are weighted, without warm-up factors; ``cross_entropy`` is unweighted. All are computed
        from ``f_s`` [B,C,H,W], the student's last map.
        """
        compared = [cross_entropy, *(losses[name] for name in self.methods)]
        norms = torch.stack([gradient_norm(loss, f_s) for loss in compared])
        squares = self.sum_over_ranks(norms.square())
        self._squares = squares if self._squares is None else self._squares + squares

    def end_step(self) -> None:
        """Add the measured ratios of a training step to the mean."""
        if self._squares is not None:
            self.logs, self.counts = self._sums()
            self._squares = None
            self.steps += 1

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Return the sums of log r and their counts, including the current step."""
        if self._squares is None:
            return self.logs, self.counts
        reference, *norms = self._squares.sqrt()
        gradients = torch.stack(norms)
        # A loss of exactly zero, or one that does not depend on this map, has no ratio, nor has an overflow.
        valid = (gradients > 0) & (reference > 0) & (gradients / reference).isfinite()
        return self.logs + torch.where(valid, gradients / reference, 1.0).log(), self.counts + valid

    def ratios(self) -> Tensor:
        """Return each method's mean r; the low end of the range if there is none."""
        logs, counts = self._sums()
        return torch.where(counts > 0, (logs / counts.clamp(min=1)).exp(), self.low)

    def factors(self) -> dict[str, Tensor]:
        """Return the factor of each method's weight."""
        r = self.ratios()
        factors = torch.where(r >= LEAST_RATIO, torch.clip(r, self.low, self.high) / r, 1.0)
        return dict(zip(self.methods, factors, strict=True))

    def results(self) -> list[BalancedWeight]:
        """Return a report entry for each measured method with a known range. Synchronizes with the device."""
        columns = (self.ratios(), self.low, self.high, self.factors().values(), self._sums()[1])
        rows = zip(self.methods, *([float(x) for x in column] for column in columns), strict=True)
        return [
            BalancedWeight(method=name, ratio=r, low=low, high=high, factor=factor)
            for name, r, low, high, factor, count in rows
            if count and r >= LEAST_RATIO and high != math.inf
        ]

    # A host-side counter instead of a buffer: reading a buffer would synchronize with the device.

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps, self._squares = int(state), None


def gradient_norm(loss: Tensor, f_s: Tensor) -> Tensor:
    """Return ‖∂loss/∂f_S‖ in fp32; 0 if the loss does not depend on f_S."""
    (gradient,) = torch.autograd.grad(SCALE * loss, f_s, retain_graph=True, allow_unused=True)
    return torch.zeros((), device=f_s.device) if gradient is None else gradient.float().norm() / SCALE
