"""Averaged weights that ship in the place of the last: a running mean, or the mean over some last epochs."""

from typing import Any

from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Averages:
    """At most one of the two; without either the trained network itself is what ships.

    - ``ema``: θ' ← d·θ' + (1 − d)·θ after each step, with d rising to ``ema`` over the first steps (timm).
    - ``last``: the mean of θ after each of the last epochs, BatchNorm statistics too (Izmailov et al.:
      "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018).
    """

    def __init__(self, network: nn.Module, ema: float | None = None, last: int | None = None) -> None:
        self.network = network
        self.epochs = last
        self.ema = ModelEmaV3(network, decay=ema, use_warmup=True) if ema is not None else None
        self.last = AveragedModel(network, use_buffers=True) if last is not None else None
        self.steps = 0

    @property
    def shipped(self) -> nn.Module:
        """The network as it would ship now."""
        if self.ema is not None:
            return self.ema.module
        if self.last is not None and int(self.last.n_averaged):
            module: nn.Module = self.last.module
            return module
        return self.network

    def step(self) -> None:
        """After each step of the training."""
        if self.ema is not None:
            self.steps += 1
            self.ema.update(self.network, step=self.steps)

    def end_epoch(self, left: int) -> None:
        """After an epoch, when ``left`` are still to come."""
        if self.last is not None and self.epochs is not None and left < self.epochs:
            self.last.update_parameters(self.network)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"steps": self.steps}
        for name, one in (("ema", self.ema), ("last", self.last)):
            if one is not None:
                state[name] = one.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        for name, one in (("ema", self.ema), ("last", self.last)):
            if one is not None:
                one.load_state_dict(state[name])
