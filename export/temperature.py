"""A temperature folded into a network: its logits divided by T, its answers the same."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import nn

TOLERANCE = 1e-4
"""Largest difference of the folded logits times T from the network's own, by the largest of these."""


class Tempered(nn.Module):
    """A network whose logits are divided by T after its last layer."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.factor = 1 / temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        return logits * self.factor


def fold_temperature(
    network: nn.Module, temperature: float, images: torch.Tensor
) -> tuple[nn.Module, Literal["last layer", "after the logits"]]:
    """A copy of ``network`` whose logits are divided by ``temperature``, and where that happens.

    Weight and bias of the classifier (timm's ``get_classifier``, a Linear or Conv2d) are divided, which costs
    nothing at inference. Where the logits are not that layer's plain output (two heads, a norm after it, tied
    or standardised weights), which ``images``, float32 [N,3,S,S], preprocessed, tell, the division becomes
    one more operation after the network.

    Raises ValueError where the temperature is not a positive number.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"a temperature is a positive number, not {temperature}")
    twin = copy.deepcopy(network).cpu().float().eval()
    get = getattr(twin, "get_classifier", None)
    classifier = get() if callable(get) else None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if isinstance(classifier, nn.Linear | nn.Conv2d):
            expected = twin(images)
            classifier.weight /= temperature
            if classifier.bias is not None:
                classifier.bias /= temperature
            off = (twin(images) * temperature - expected).abs().max()
            if off <= TOLERANCE * expected.abs().max():
                return twin, "last layer"
    return Tempered(copy.deepcopy(network).cpu().float().eval(), temperature), "after the logits"
