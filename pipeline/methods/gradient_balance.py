"""Weights that fit the pair: a method whose pull on the student is out of proportion is brought back.

A method's weight was found by its authors for their networks; for another teacher or student it may be ten
times too much or too little. Of twelve feature losses in the CRD benchmark four end below no teacher at all
on ResNet-50 → MobileNetV2. What a weight does shows in the gradients that the losses send into the student,
as GradNorm (Chen et al., ICML 2018, arXiv 1711.02257) and VQGAN's adaptive weight (Esser et al., CVPR 2021,
arXiv 2012.09841, eq. 7) use them:

    r = ‖∂(w·L)/∂f_S‖ / ‖∂L_CE/∂f_S‖      f_S: the student's last map, of the whole batch; L_CE unweighted

A method states between which r it was seen to do good, ``pull``. A weight whose r lies between them stays as
it is; one outside is scaled to the nearer end:

    w ← w · clip(r, least, most) / r

Nothing is known of the best r of a pair, only where r did good: so what lies there is left alone, and what
does not is moved no further than it must be. r is a geometric mean over the first steps; while they last,
the mean so far is used, and afterwards the factor stays.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..runs.results import BalancedWeight
from ..training.compute.distributed import Ranks
from .base import Method

STEPS = 50
"""Training steps over which the gradients are compared."""


class Balance(nn.Module):
    """The factors of a run's methods; a part of the training's state, so that a resumed run keeps them."""

    logs: Tensor
    counts: Tensor
    least: Tensor
    most: Tensor

    def __init__(self, methods: Mapping[str, Method], ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks = ranks or Ranks()
        self.methods = list(methods)  # names alone: the methods themselves are the trainee's
        self.steps = 0
        self._squares: Tensor | None = None
        self.register_buffer("logs", torch.zeros(len(methods)))
        self.register_buffer("counts", torch.zeros(len(methods)))
        for end, name in enumerate(("least", "most")):
            ends = torch.tensor([method.pull[end] for method in methods.values()])
            self.register_buffer(name, ends, persistent=False)

    @property
    def compares(self) -> bool:
        """Whether the next training step is one of the first."""
        return self.training and torch.is_grad_enabled() and self.steps < STEPS

    def compare(self, losses: Mapping[str, Tensor], cross_entropy: Tensor, f_s: Tensor) -> None:
        """Take a step's gradients into account, or those of one of its parts.

        With parts, r is that of the parts so far, and at the end of the step that of the whole batch.

        Args:
            losses: each method's weighted loss at its full strength, a scalar.
            cross_entropy: the unweighted cross-entropy on the labels.
            f_s: [B,C,H,W] the student's last map, from which all of them come.
        """
        each = torch.stack([pull(loss, f_s) for loss in (cross_entropy, *(losses[m] for m in self.methods))])
        squares = self.ranks.sum(each.square())  # of all ranks' images
        self._squares = squares if self._squares is None else self._squares + squares

    def end_step(self) -> None:
        """After a training step: what it showed is one step's, however many parts it had."""
        if self._squares is not None:
            self.logs, self.counts = self._so_far()
            self._squares = None
            self.steps += 1

    def _so_far(self) -> tuple[Tensor, Tensor]:
        """Sums of log r and how many there are, the step that has not ended included."""
        if self._squares is None:
            return self.logs, self.counts
        reference, *rest = self._squares.sqrt()
        pulls = torch.stack(rest)
        # A loss that is exactly zero, or does not come from this map, tells nothing.
        seen = (pulls > 0) & (reference > 0)
        return self.logs + torch.where(seen, pulls / reference, 1.0).log(), self.counts + seen

    def ratios(self) -> Tensor:
        """Each method's r so far; one that does good where nothing was seen."""
        logs, counts = self._so_far()
        return torch.where(counts > 0, (logs / counts.clamp(min=1)).exp(), self.least)

    def factors(self) -> dict[str, Tensor]:
        """What each method's weight is multiplied by."""
        r = self.ratios()
        factors = torch.where(r > 0, torch.clip(r, self.least, self.most) / r, 1.0)
        return dict(zip(self.methods, factors, strict=True))

    def found(self) -> list[BalancedWeight]:
        """For the report: the methods of which something was known and seen. It waits for the device."""
        columns = (self.ratios(), self.least, self.most, self.factors().values(), self._so_far()[1])
        return [
            BalancedWeight(
                method=name, pull=float(r), least=float(least), most=float(most), factor=float(factor)
            )
            for name, r, least, most, factor, count in zip(self.methods, *columns, strict=True)
            if count and float(most) != math.inf
        ]

    # The steps are counted on the host, since to ask the device is to wait for it; so they are no buffer.

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps, self._squares = int(state), None


def pull(loss: Tensor, f_s: Tensor) -> Tensor:
    """‖∂loss/∂f_S‖, fp32; 0 where the loss does not come from f_S."""
    (gradient,) = torch.autograd.grad(loss, f_s, retain_graph=True, allow_unused=True)
    return torch.zeros((), device=f_s.device) if gradient is None else gradient.float().norm()
