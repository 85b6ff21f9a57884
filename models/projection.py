"""A classifier of two linear layers while a network learns, merged exactly into one before it ships.

    logits = W_c·(W_e·v + b_e) + b_c = W'·v + b'      W' = W_c·W_e,  b' = W_c·b_e + b_c

The vector in between can have any width, such as that of a teacher's vector. W_e starts with orthonormal
columns (rows if it narrows), b_e as 0, and W_c = W·W_eᵀ, b_c = b with W, b of the original classifier: unless
narrowed, the network computes the same at first, so a pretrained head is kept.
"""

import copy
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .errors import ModelError


class Widened(nn.Module):
    """``embed``, Linear(D→width), then ``classifier``, Linear(width→N)."""

    def __init__(self, linear: nn.Linear, width: int, seed: int) -> None:
        super().__init__()
        bias = linear.bias is not None  # as in the merged layer
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype, "bias": bias}
        # Skip the initialization, which would be discarded and would advance the random state.
        self.embed = nn.utils.skip_init(nn.Linear, linear.in_features, width, **like)
        self.classifier = nn.utils.skip_init(nn.Linear, width, linear.out_features, **like)
        start = torch.empty(width, linear.in_features)
        nn.init.orthogonal_(start, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.embed.weight.copy_(start)
            self.classifier.weight.copy_(linear.weight @ self.embed.weight.T)
            if bias:
                self.embed.bias.zero_()
                self.classifier.bias.copy_(linear.bias)

    def forward(self, vector: Tensor) -> Tensor:
        """Return logits [B,N] of vectors [B,D]."""
        logits: Tensor = self.classifier(self.embed(vector))
        return logits

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return one linear layer that computes the same up to rounding, multiplied in float64."""
        w_e, w_c = (layer.weight.detach().cpu().double() for layer in (self.embed, self.classifier))
        like: dict[str, Any] = {"device": self.embed.weight.device, "dtype": self.embed.weight.dtype}
        bias = self.classifier.bias is not None
        linear = nn.utils.skip_init(nn.Linear, w_e.shape[1], len(w_c), bias=bias, **like)
        linear.weight.copy_(w_c @ w_e)
        if bias:
            linear.bias.copy_(w_c @ self.embed.bias.cpu().double() + self.classifier.bias.cpu().double())
        return linear.train(self.training)


def widen(network: nn.Module, width: int, seed: int) -> None:
    """Replace a timm network's classifier by a `Widened`.

    Raises:
        ModelError: the classifier is not one plain linear layer.
    """
    linear = _classifier(network)
    if not is_linear(linear):
        raise ModelError(f"The classifier of {type(network).__name__} is not one linear layer.")
    _replace(network, linear, Widened(linear, width, seed))


def is_linear(layer: Any) -> bool:
    """Return True for torch's and timm's plain linear layers."""
    return type(layer) in (nn.Linear, timm.layers.Linear)


def merged(network: nn.Module) -> nn.Module:
    """Return a copy of a widened network with a plain classifier, or any other network itself."""
    if not isinstance(_classifier(network), Widened):
        return network
    plain = copy.deepcopy(network)
    widened = _classifier(plain)
    assert isinstance(widened, Widened)
    _replace(plain, widened, widened.merged())
    return plain


def _classifier(network: nn.Module) -> Any:
    get_classifier = getattr(network, "get_classifier", None)
    return get_classifier() if callable(get_classifier) else None


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in network.named_modules() if module is old)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)
    if _classifier(network) is not new:
        raise ModelError(f"The classifier of {type(network).__name__} cannot be replaced.")
