"""Hard-swish of operators that have integer kernels, without a multiplication for its 1/6."""

from __future__ import annotations

import math

import numpy as np
from onnx import helper

from ..int8.rewrite import Graph
from .affine import can_take_affine, take_affine


def multiply_hard_swish(graph: Graph) -> int:
    """Write HardSwish, x·Clip(x + 3, 0, 6)/6, as c·Clip(c + √6/2, 0, √6) where c = x/√6 fits into the layer
    before it.

    How many there were. The two are equal: both factors of the product take a 1/√6 along. HardSwish has no
    integer kernel in ONNX Runtime; Add and Mul have one, and the Clip costs nothing, for the unsigned range
    of the sum is cut there. Where something else reads x, or no Conv or Gemm gives it, a Mul by 1/6 is kept.
    """
    found = 0
    for node in [node for node in graph.nodes if node.op_type == "HardSwish"]:
        found += 1
        folds = can_take_affine(graph, node.input[0], node)
        unit = math.sqrt(6) if folds else 1.0
        c = take_affine(graph, node.input[0], node, 1 / unit, 0.0) if folds else node.input[0]
        given = node.output[0]
        three, low, six = (
            graph.add_constant(f"{given}_{name}", np.array(value / unit, np.float32))
            for name, value in (("three", 3), ("zero", 0), ("six", 6))
        )
        shifted, gate = graph.unused(f"{given}_shifted"), graph.unused(f"{given}_gate")
        product = given if folds else graph.unused(f"{given}_product")
        nodes = [
            helper.make_node("Add", [c, three], [shifted], name=f"{node.name}_shift"),
            helper.make_node("Clip", [shifted, low, six], [gate], name=f"{node.name}_clip"),
            helper.make_node("Mul", [c, gate], [product], name=node.name),
        ]
        if not folds:
            sixth = graph.add_constant(f"{given}_sixth", np.array(1 / 6, np.float32))
            nodes.append(helper.make_node("Mul", [product, sixth], [given], name=f"{node.name}_scale"))
        graph.replace(node, nodes)
    return found
