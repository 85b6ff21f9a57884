"""Nodes that compute nothing."""

from __future__ import annotations

from ..int8.rewrite import Graph


def drop_no_ops(graph: Graph) -> int:
    """Take out Identity and, as a classifier is not trained in this form, Dropout; how many there were.

    What gives the graph's own output stays: nothing may be left without its name.
    """
    found = 0
    for node in [node for node in graph.nodes if node.op_type in ("Identity", "Dropout")]:
        mask_is_read = any(graph.readers(name) or name in graph.outputs for name in node.output[1:])
        trains = len(node.input) > 2 and bool(node.input[2]) and graph.number(node.input[2]) != 0
        if mask_is_read or trains or node.output[0] in graph.outputs or not node.input[0]:
            continue
        found += 1
        graph.read_instead(node.output[0], node.input[0])
        graph.replace(node, [])
    return found
