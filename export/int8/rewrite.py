"""What a rewriting rule asks of an ONNX graph, and the few ways in which it changes one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Graph:
    """A model's graph with its constants, who makes each tensor and who reads it; edits show at once.

    A constant is an initializer that no input of the graph can override; `Constant` nodes become such.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._lift_constant_nodes()
        graph = model.graph
        given = {value.name for value in graph.input}
        # What a branch of an If or the body of a Loop reads stands there without being handed in.
        self.outputs = {value.name for value in graph.output} | _read_inside(graph)
        self.constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
        self.nodes = list(graph.node)
        self._names = given | self.outputs | {tensor.name for tensor in graph.initializer}
        self._names |= {name for node in self.nodes for name in (node.name, *node.input, *node.output)}
        self._index()

    def maker(self, tensor: str) -> onnx.NodeProto | None:
        """The node that gives `tensor`; None of the graph's inputs and of constants."""
        return self._makers.get(tensor)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read `tensor`, one of them twice where it reads it twice."""
        return self._readers.get(tensor, [])

    def feeds_only(self, tensor: str, node: onnx.NodeProto) -> bool:
        """Whether nothing but `node` sees `tensor`: no other node, and no user of the graph."""
        readers = self.readers(tensor)
        return tensor not in self.outputs and len(readers) == 1 and readers[0] is node

    def array(self, name: str) -> np.ndarray | None:
        """The value of a constant; None where `name` is computed, given, or left out."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def number(self, name: str) -> float | None:
        """The value of a constant of one element; None of anything else."""
        array = self.array(name)
        return None if array is None or array.size != 1 else float(array.ravel()[0])

    def rank(self, name: str) -> int | None:
        """How many dimensions a tensor is known to have."""
        graph = self.model.graph
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.name == name and value.type.tensor_type.HasField("shape"):
                return len(value.type.tensor_type.shape.dim)
        array = self.array(name)
        return None if array is None else array.ndim

    def unused(self, name: str) -> str:
        """`name`, or the first name like it that nothing in the graph has; it counts as taken from now on."""
        taken, number = name, 2
        while taken in self._names:
            taken, number = f"{name}_{number}", number + 1
        self._names.add(taken)
        return taken

    def add_constant(self, name: str, array: np.ndarray) -> str:
        """Hold `array` under a name like `name`; the name."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), self.unused(name))
        self.model.graph.initializer.append(tensor)
        self.constants[tensor.name] = self.model.graph.initializer[-1]
        return tensor.name

    def replace(self, node: onnx.NodeProto, by: Iterable[onnx.NodeProto]) -> None:
        """Put other nodes, in the order in which they compute, where `node` stands."""
        place = next(i for i, other in enumerate(self.nodes) if other is node)
        self.nodes[place : place + 1] = list(by)
        self._index()

    def read_instead(self, tensor: str, other: str) -> None:
        """Let every node that reads `tensor` read `other`."""
        for node in self.nodes:
            for i, name in enumerate(node.input):
                if name == tensor:
                    node.input[i] = other
        self._index()

    def reindex(self) -> None:
        """After a node was changed in place."""
        self._index()

    def write(self) -> None:
        """Put the nodes back into the model, without constants and shapes that nothing uses any more."""
        graph = self.model.graph
        used = {name for node in self.nodes for name in (*node.input, *node.output)}
        used |= self.outputs | {value.name for value in graph.input}
        tensors = [tensor for tensor in graph.initializer if tensor.name in used]
        shapes = [value for value in graph.value_info if value.name in used]
        for entries, values in (
            (graph.node, self.nodes),
            (graph.initializer, tensors),
            (graph.value_info, shapes),
        ):
            del entries[:]
            entries.extend(values)

    def _index(self) -> None:
        self._makers = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def _lift_constant_nodes(self) -> None:
        graph = self.model.graph
        kept = []
        for node in graph.node:
            value = attribute(node, "value") if node.op_type == "Constant" else None
            if value is None or node.output[0] in {output.name for output in graph.output}:
                kept.append(node)
                continue
            graph.initializer.append(value)
            graph.initializer[-1].name = node.output[0]
        if len(kept) != len(graph.node):
            del graph.node[:]
            graph.node.extend(kept)


def _read_inside(graph: onnx.GraphProto) -> set[str]:
    """Every name that a graph within a node of `graph` reads."""
    names: set[str] = set()
    for node in graph.node:
        for inner in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
            names |= {name for other in inner.node for name in other.input} | _read_inside(inner)
            names |= {value.name for value in inner.output}
    return names


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default` where the node doesn't state it."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


_FLOATS = (np.float32, np.float64)


def can_take_affine(graph: Graph, tensor: str, reader: onnx.NodeProto) -> bool:
    """Whether `take_affine` can: `tensor` comes from a Conv or Gemm of constant weights, and only `reader`
    sees it.
    """
    layer = graph.maker(tensor)
    if layer is None or layer.op_type not in ("Conv", "Gemm") or not graph.feeds_only(tensor, reader):
        return False
    weight = graph.array(layer.input[1])
    return (
        weight is not None
        and weight.dtype in _FLOATS
        and (_bias_name(layer) is None or _bias(graph, layer) is not None)
    )


def take_affine(
    graph: Graph,
    tensor: str,
    reader: onnx.NodeProto,
    factor: float | np.ndarray,
    shift: float | np.ndarray,
) -> str:
    """Make the layer that gives `tensor` give factor·tensor + shift to `reader`, its only reader.

    Returns the tensor's new name. `factor` and `shift` are numbers, or one for each channel, [C]. The name is
    another because the values are: ranges observed under the old one are not its own. Weights are
    computed in float64 and held as new constants: another layer may use the old ones.

    Raises ValueError where `can_take_affine` says no.
    """
    layer = graph.maker(tensor)
    if layer is None or not can_take_affine(graph, tensor, reader):
        raise ValueError(f"no layer of constant weights gives {tensor} to {reader.name} alone")
    weight = graph.array(layer.input[1])
    assert weight is not None
    bias = _bias(graph, layer)
    channels_last = layer.op_type == "Gemm" and not attribute(layer, "transB", 0)
    scale = np.broadcast_to(
        np.asarray(factor, np.float64), weight.shape[-1:] if channels_last else weight.shape[:1]
    )
    along = (1, -1) if channels_last else (-1,) + (1,) * (weight.ndim - 1)
    new_bias = np.asarray(shift, np.float64) + (0.0 if bias is None else scale * bias)
    inputs = [
        layer.input[0],
        graph.add_constant(layer.input[1], (weight * scale.reshape(along)).astype(weight.dtype)),
    ]
    if bias is not None or np.any(new_bias):
        name = _bias_name(layer) or f"{layer.input[1]}_shift"
        inputs.append(graph.add_constant(name, np.broadcast_to(new_bias, scale.shape).astype(weight.dtype)))
    del layer.input[:]
    layer.input.extend(inputs)
    for old in [a for a in layer.attribute if a.name == "beta"]:  # the bias holds it now
        layer.attribute.remove(old)
    layer.output[0] = graph.unused(f"{tensor}_affine")
    graph.read_instead(tensor, layer.output[0])
    return layer.output[0]


def _bias_name(layer: onnx.NodeProto) -> str | None:
    return layer.input[2] if len(layer.input) > 2 and layer.input[2] else None


def _bias(graph: Graph, layer: onnx.NodeProto) -> np.ndarray | None:
    """What the layer adds, float64, one value for all channels or [C]; None where that isn't known."""
    name = _bias_name(layer)
    array = None if name is None else graph.array(name)
    # Gemm's may have a value for each row of the batch.
    if array is None or (array.ndim == 2 and array.shape[0] != 1) or array.ndim > 2:
        return None
    return array.astype(np.float64).ravel() * (
        attribute(layer, "beta", 1.0) if layer.op_type == "Gemm" else 1.0
    )


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


Rule = Callable[[Graph], int]

RULES: dict[str, Rule] = {
    # In this order: what is in the way of another rule goes first.
    "drop_no_ops": drop_no_ops,
    "fold_batch_norm": fold_batch_norm,
    "pool_globally": pool_globally,
    "clip_hard_sigmoid": clip_hard_sigmoid,
    "multiply_hard_swish": multiply_hard_swish,
    "pad_depthwise_channels": pad_depthwise_channels,
}
# These pay where what they write runs in integers, and cost something where it doesn't.
FOR_INTEGERS = frozenset({"multiply_hard_swish", "pad_depthwise_channels"})


def rewrite(model: onnx.ModelProto, rules: Collection[str] | None = None) -> list[str]:
    """Apply `rules`, or all of RULES, to `model` in place; the names of those that found something to do.

    Each computes what the graph computed, up to the rounding of float32. Raises ValueError for a rule that
    isn't there.
    """
    unknown = sorted(set(rules or ()) - set(RULES))
    if unknown:
        raise ValueError(f"no rewriting rule {unknown[0]!r}; there are {', '.join(RULES)}")
    graph = Graph(model)
    found = [name for name, rule in RULES.items() if (rules is None or name in rules) and rule(graph)]
    graph.write()
    return found
