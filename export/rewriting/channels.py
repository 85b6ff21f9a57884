"""Channels of depthwise convolutions in numbers that the integer kernel likes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx

from ..int8.rewrite import Graph, attribute

MULTIPLE = 16
"""ONNX Runtime's integer depthwise kernel on x86 takes 16 channels at once, the rest one by one."""

_CHANNELWISE = (
    *("Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "LeakyRelu", "Identity", "Dropout"),
    *("Add", "Mul", "GlobalAveragePool", "AveragePool", "MaxPool"),
)


def pad_depthwise_channels(graph: Graph) -> int:
    """Give depthwise convolutions channels of nothing up to a multiple of 16; how many there were.

    The layers that give these channels get weights and biases of 0 for the new ones, those that read them
    weights of 0: whatever stands in them, nothing comes of it. Where the channels reach the graph's input or
    output, or a node of another kind, they stay as they are.
    """
    found = 0
    for node in list(graph.nodes):
        channels = _depthwise_channels(graph, node)
        if channels is None or channels % MULTIPLE == 0:
            continue
        span = _span(graph, node)
        if span is not None:
            _pad(graph, span, channels, -channels % MULTIPLE)
            found += len(span.depthwise)
    return found


@dataclass
class _Span:
    """Everything between the layers that give some channels and the layers that read them."""

    tensors: list[str] = field(default_factory=list)
    givers: list[onnx.NodeProto] = field(default_factory=list)
    readers: list[onnx.NodeProto] = field(default_factory=list)
    depthwise: list[onnx.NodeProto] = field(default_factory=list)


def _span(graph: Graph, start: onnx.NodeProto) -> _Span | None:
    """The channels' way from `start` on, up and down; None where it can't be widened."""
    span = _Span()
    open_tensors: list[str | None] = [start.input[0]]
    while open_tensors:
        tensor = open_tensors.pop()
        if tensor in span.tensors:
            continue
        maker = None if tensor is None else graph.maker(tensor)
        if tensor is None or maker is None or tensor in graph.outputs:
            return None
        span.tensors.append(tensor)
        if not _is_dense(graph, maker):
            open_tensors += _beside(graph, maker, span)
        else:
            span.givers.append(maker)
        for reader in graph.readers(tensor):
            if not _is_dense(graph, reader):
                open_tensors += _beside(graph, reader, span)
            elif reader not in span.readers:
                span.readers.append(reader)
    return span


def _beside(graph: Graph, node: onnx.NodeProto, span: _Span) -> list[str | None]:
    """The tensors of the same channels at a node that keeps channels apart; [None] at any other node."""
    if _depthwise_channels(graph, node) is not None:
        if node not in span.depthwise:
            span.depthwise.append(node)
        return [node.input[0], node.output[0]]
    if node.op_type not in _CHANNELWISE or len(node.output) != 1:
        return [None]
    constants = [name for name in node.input if name in graph.constants]
    if any(graph.number(name) is None for name in constants):
        return [None]
    return [*(name for name in node.input if name and name not in constants), node.output[0]]


def _is_dense(graph: Graph, node: onnx.NodeProto) -> bool:
    """A convolution over all channels, of constant weights."""
    return (
        node.op_type == "Conv"
        and attribute(node, "group", 1) == 1
        and all(name in graph.constants for name in node.input[1:] if name)
    )


def _depthwise_channels(graph: Graph, node: onnx.NodeProto) -> int | None:
    """How many channels a depthwise convolution of constant weights has; None of any other node."""
    if node.op_type != "Conv" or any(name and name not in graph.constants for name in node.input[1:]):
        return None
    channels, each = graph.constants[node.input[1]].dims[:2]
    groups = attribute(node, "group", 1)
    return int(channels) if groups == channels and each == 1 and groups > 1 else None


def _pad(graph: Graph, span: _Span, channels: int, more: int) -> None:
    for node in (*span.givers, *span.depthwise):
        node.input[1] = _padded(graph, node.input[1], 0, more)
        if len(node.input) > 2 and node.input[2]:
            node.input[2] = _padded(graph, node.input[2], 0, more)
    for node in span.readers:
        node.input[1] = _padded(graph, node.input[1], 1, more)
    for node in span.depthwise:
        next(a for a in node.attribute if a.name == "group").i = channels + more
    for value in graph.model.graph.value_info:
        if value.name in span.tensors:
            value.type.tensor_type.shape.dim[1].dim_value = channels + more
    graph.reindex()


def _padded(graph: Graph, name: str, axis: int, more: int) -> str:
    array = graph.array(name)
    assert array is not None
    zeros = np.zeros([more if i == axis else n for i, n in enumerate(array.shape)], array.dtype)
    return graph.add_constant(name, np.concatenate([array, zeros], axis))
