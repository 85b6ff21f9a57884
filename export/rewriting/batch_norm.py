"""Batch normalisation folded into the layer before it."""

from __future__ import annotations

import numpy as np
import onnx

from ..int8.rewrite import Graph, attribute
from .affine import can_take_affine, take_affine


def fold_batch_norm(graph: Graph) -> int:
    """Fold BatchNormalization into the Conv or Gemm that alone feeds it; how many there were.

    The exporter has folded those of a network of ours; a graph from elsewhere may have some left, each a pass
    over a feature map in float. Channels of variance 0 are as the graph has them: ε keeps them finite.
    """
    found = 0
    for node in [node for node in graph.nodes if node.op_type == "BatchNormalization"]:
        parameters = [graph.array(name) for name in node.input[1:5]]
        trains = bool(attribute(node, "training_mode", 0)) or len(node.output) > 1
        if trains or not can_take_affine(graph, node.input[0], node):
            continue
        if any(parameter is None for parameter in parameters):
            continue
        found += 1
        γ, β, mean, variance = (np.asarray(p, np.float64) for p in parameters)
        factor = γ / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        normalised = take_affine(graph, node.input[0], node, factor, β - factor * mean)
        _give(graph, node, normalised)
    return found


def _give(graph: Graph, node: onnx.NodeProto, tensor: str) -> None:
    """Let the maker of `tensor` give what `node` gave, in the place of `node`."""
    layer = graph.maker(tensor)
    assert layer is not None
    graph.replace(node, [])
    layer.output[0] = node.output[0]
    graph.reindex()
