"""Global pooling as the operator that has an integer kernel."""

from __future__ import annotations

import onnx
from onnx import helper

from ..int8.rewrite import Graph, attribute


def pool_globally(graph: Graph) -> int:
    """Write the mean over height and width as GlobalAveragePool; how many there were.

    The exporter writes global pooling as ReduceMean, which has no integer kernel in ONNX Runtime: the last
    feature map would be widened to float for it.
    """
    found = 0
    for node in [node for node in graph.nodes if node.op_type == "ReduceMean"]:
        axes = _axes(graph, node)
        if axes is None or graph.rank(node.input[0]) != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
            continue
        found += 1
        given = node.output[0]
        keeps = bool(attribute(node, "keepdims", 1))
        pooled = given if keeps else graph.unused(f"{given}_pooled")
        nodes = [helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name)]
        if not keeps:
            nodes.append(helper.make_node("Flatten", [pooled], [given], name=f"{node.name}_flatten", axis=1))
        graph.replace(node, nodes)
    return found


def _axes(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    """The axes a reduction is known to run over; None where the graph computes them."""
    if len(node.input) > 1 and node.input[1]:  # an input since opset 18, an attribute before
        array = graph.array(node.input[1])
        return None if array is None else [int(axis) for axis in array.ravel()]
    stated: list[int] | None = attribute(node, "axes")
    return stated
