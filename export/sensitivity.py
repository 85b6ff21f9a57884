"""Which parts of a network suffer most from int8: the noise each rounding alone makes in the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .int8.fake_quantize import FakeQuantized
from .int8.quantizer import Prepared


@dataclass(frozen=True)
class Source:
    """One rounding and what it does to the logits when all else is float."""

    tensor: str
    """An activation or a weight, by its name in the float graph."""
    nodes: tuple[str, ...]
    """Those to keep float so that it is not rounded."""
    sqnr: float
    """Signal to quantization noise of the logits, decibels."""


@torch.no_grad()
def sensitivity(prepared: Prepared, network: FakeQuantized, images: np.ndarray) -> list[Source]:
    """Every rounding of the quantized graph, the worst first; those alike in the order of the graph.

    Args:
        network: the quantized form of the prepared graph.
        images: float32 [n,3,S,S]; the more, the truer and the slower.
    """
    x = torch.from_numpy(images)
    with network.rounding(frozenset()):
        exact = network(x)[network.output].double()
    power = float(exact.square().sum())
    found = []
    for tensor in network.sources():
        with network.rounding(frozenset({tensor})):
            noise = float((network(x)[network.output].double() - exact).square().sum())
        sqnr = 10 * np.log10(power / noise) if noise and power else float("inf")
        found.append(Source(tensor, _nodes(prepared, tensor), round(float(sqnr), 3)))
    return sorted(found, key=lambda source: source.sqnr)


def _nodes(prepared: Prepared, tensor: str) -> tuple[str, ...]:
    """The makers and readers of a tensor; beyond a ReLU or Clip what it cuts, which would be rounded in its
    place.
    """
    nodes = prepared.model.graph.node
    makers = {name: node for node in nodes for name in node.output}
    around = {node.name for node in nodes if tensor in (*node.input, *node.output)}
    maker = makers.get(tensor)
    while maker is not None and maker.op_type in ("Relu", "Clip"):
        maker = makers.get(maker.input[0])
        around |= set() if maker is None else {maker.name}
    return tuple(node.name for node in nodes if node.name in around)
