"""The convolutions that a graph's input feeds, where it feeds nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

_Constants = dict[str, TensorProto]


@dataclass
class Convolution:
    """A first convolution: weight float64 [out, 3, kh, kw], bias float64 [out], padding [top, left, bottom,
    right] with that of a Pad before it.
    """

    node: NodeProto
    weight: np.ndarray
    bias: np.ndarray | None
    pads: np.ndarray

    def add_bias(self, more: np.ndarray) -> None:
        self.bias = more if self.bias is None else self.bias + more


@dataclass
class FirstLayer:
    """All convolutions that see the input; what is changed in them stands in the graph after `write`."""

    model: ModelProto
    convolutions: list[Convolution]
    pad_nodes: list[NodeProto]

    @property
    def padded(self) -> bool:
        """Whether any of them sees padding."""
        return any(convolution.pads.any() for convolution in self.convolutions)

    def write(self) -> None:
        """Put weights, biases and padding into the graph; a Pad is then within its convolution."""
        graph = self.model.graph
        source = graph.input[0].name
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for convolution in self.convolutions:
            node = convolution.node
            constants[node.input[1]].CopyFrom(_float(convolution.weight, node.input[1]))
            if convolution.bias is not None:
                if len(node.input) > 2 and node.input[2]:
                    constants[node.input[2]].CopyFrom(_float(convolution.bias, node.input[2]))
                else:
                    name = f"{node.input[1]}_bias"
                    graph.initializer.append(_float(convolution.bias, name))
                    del node.input[2:]
                    node.input.append(name)
            node.input[0] = source
            kept = [a for a in node.attribute if a.name not in ("pads", "auto_pad")]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("pads", convolution.pads.tolist())])
        for pad in self.pad_nodes:
            graph.node.remove(pad)
        changed = {convolution.node.input[1] for convolution in self.convolutions}
        shapes = [value for value in graph.value_info if value.name not in changed]
        del graph.value_info[:]
        graph.value_info.extend(shapes)


def first_layer(model: ModelProto) -> FirstLayer | None:
    """The input's convolutions, each perhaps behind a Pad with zeros; None where anything else sees it."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    convolutions, pad_nodes = [], []
    for node in uses.get(graph.input[0].name, []):
        if _asks_for_no_channels(node):
            continue
        around = np.zeros(4, dtype=np.int64)
        fed = [node]
        if node.op_type == "Pad":
            found = _zeros_around(node, constants)
            if found is None:
                return None
            around, fed = found, uses.get(node.output[0], [])
            pad_nodes.append(node)
        for one in fed:
            convolution = _convolution(one, around, constants, uses)
            if convolution is None:
                return None
            convolutions.append(convolution)
    return FirstLayer(model, convolutions, pad_nodes) if convolutions else None


def _convolution(
    node: NodeProto, around: np.ndarray, constants: _Constants, uses: dict[str, list[NodeProto]]
) -> Convolution | None:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    own = [name for name in node.input[1:] if name]
    plain = (
        node.op_type == "Conv"
        and attributes.get("group", 1) == 1
        and attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        and all(name in constants and len(uses[name]) == 1 for name in own)
    )
    if not plain:
        return None
    weight, *bias = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in own)
    if weight.ndim != 4 or weight.shape[1] != 3:
        return None
    pads = np.array(attributes.get("pads", [0, 0, 0, 0]), dtype=np.int64) + around
    return Convolution(node, weight, bias[0] if bias else None, pads)


def _asks_for_no_channels(node: NodeProto) -> bool:
    """Whether this is a Shape of the batch alone, or of height and width."""
    if node.op_type != "Shape":
        return False
    ends = {a.name: a.i for a in node.attribute}
    return 1 not in range(4)[ends.get("start", 0) : ends.get("end", 4)]


def _zeros_around(node: NodeProto, constants: _Constants) -> np.ndarray | None:
    """[top, left, bottom, right] of a Pad that lays zeros around height and width; None of any other."""
    mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
    given = [numpy_helper.to_array(constants[name]) if name in constants else None for name in node.input[1:]]
    unknown = any(value is None for name, value in zip(node.input[1:], given, strict=True) if name)
    if mode != b"constant" or unknown or not given:
        return None
    pads, value, axes = [*given, None, None][:3]
    assert pads is not None
    if value is not None and np.any(value != 0):
        return None
    before, after = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64)
    places = np.arange(4) if axes is None else axes.ravel() % 4
    half = len(places)
    before[places], after[places] = pads[:half], pads[half:]
    around = np.concatenate([before[2:], after[2:]])
    if before[:2].any() or after[:2].any() or (around < 0).any():
        return None
    return around


def _float(values: np.ndarray, name: str) -> TensorProto:
    return numpy_helper.from_array(values.astype(np.float32), name)
