"""The one-cycle schedule, as torch's ``OneCycleLR`` has it, in timm's form: a function of the step alone."""

import math

import torch
from timm.scheduler.scheduler import Scheduler

RISES_FROM = 25.0
"""The first learning rate is the peak's so manieth part."""

ENDS_AT = 1e4
"""The last one is the first one's so manieth part."""


class OneCycle(Scheduler):
    """From a 25th of the peak up to it within ``warmup`` steps, then down to nearly nothing, along cosines.

    Smith & Topin: "Super-Convergence", 2018, arXiv 1708.07120. The momentum stays as it is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False, initialize=True)
        self.steps, self.warmup = steps, warmup
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        return [peak * self.share(t) for peak in self.base_values]

    def share(self, step: int) -> float:
        """The learning rate at a step, from 0, over the peak."""
        top, end = max(0.0, self.warmup - 1), self.steps - 1
        low, last = 1 / RISES_FROM, 1 / RISES_FROM / ENDS_AT
        if step < top:
            return _between(low, 1.0, step / top)
        return _between(1.0, last, min(1.0, (step - top) / max(1.0, end - top)))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
