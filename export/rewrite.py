"""Exact rewriting of a float ONNX graph into forms that ONNX Runtime can run wholly in int8."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import numpy_helper


def rewrite(model: onnx.ModelProto) -> list[str]:
    """Apply every rewriting to `model` in place; the names of those that found something to do."""
    return [name for name, apply in _REWRITINGS.items() if apply(model)]


def pool_globally(model: onnx.ModelProto) -> int:
    """Write the mean over height and width as GlobalAveragePool; how many there were.

    The exporter writes global pooling as ReduceMean, which has no integer kernel in ONNX Runtime: the last
    feature map would be widened to float for it.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    ranks = _ranks(model)
    nodes, found = [], 0
    for node in model.graph.node:
        axes = _axes(node, constants) if node.op_type == "ReduceMean" else None
        if axes is None or ranks.get(node.input[0]) != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
            nodes.append(node)
            continue
        found += 1
        pooled = node.output[0] if _keeps_dimensions(node) else f"{node.output[0]}_pooled"
        nodes.append(onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
        if pooled != node.output[0]:
            name = f"{node.name}_flatten"
            nodes.append(onnx.helper.make_node("Flatten", [pooled], [node.output[0]], name=name, axis=1))
    if found:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        _drop_unused_constants(model)
    return found


_REWRITINGS: dict[str, Callable[[onnx.ModelProto], int]] = {"pool_globally": pool_globally}


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in values
        if value.type.tensor_type.HasField("shape")
    }


def _axes(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> list[int] | None:
    """The axes a reduction is known to run over; None where the graph computes them."""
    if len(node.input) > 1 and node.input[1]:  # an input since opset 18, an attribute before
        tensor = constants.get(node.input[1])
        return None if tensor is None else [int(axis) for axis in numpy_helper.to_array(tensor).ravel()]
    return next((list(a.ints) for a in node.attribute if a.name == "axes"), None)


def _keeps_dimensions(node: onnx.NodeProto) -> bool:
    return next((bool(a.i) for a in node.attribute if a.name == "keepdims"), True)


def _drop_unused_constants(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    used |= {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
