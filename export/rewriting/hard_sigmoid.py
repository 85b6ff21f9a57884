"""Squeeze-excite's hard-sigmoid without an operator that has no integer kernel."""

from __future__ import annotations

import numpy as np
from onnx import helper

from ..int8.rewrite import Graph, attribute
from .affine import can_take_affine, take_affine


def clip_hard_sigmoid(graph: Graph) -> int:
    """Write HardSigmoid, max(0, min(1, α·x + β)), as Clip to 0..1 where α and β fit into the layer before it.

    How many there were. HardSigmoid has no integer kernel in ONNX Runtime; a Clip costs nothing, for the
    unsigned range of what the layer gives is cut there. Where something else reads x, or no Conv or Gemm
    gives it, the node stays.
    """
    found = 0
    for node in [node for node in graph.nodes if node.op_type == "HardSigmoid"]:
        if not can_take_affine(graph, node.input[0], node):
            continue
        found += 1
        x = take_affine(
            graph, node.input[0], node, attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
        )
        low, high = (graph.add_constant(f"{node.output[0]}_{n}", np.array(n, np.float32)) for n in (0, 1))
        graph.replace(node, [helper.make_node("Clip", [x, low, high], [node.output[0]], name=node.name)])
    return found
