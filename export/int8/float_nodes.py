"""What of a quantized file still runs in float on this machine, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from .. import runtime
from ..files import temporary_folder

# With an integer kernel in ONNX Runtime on CPUs, or folded into the integer node before them.
_INTEGER_KERNELS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Concat", "Where", "LeakyRelu", "Sigmoid"),
        *("GlobalAveragePool", "AveragePool", "MaxPool", "Relu", "Clip", "Softmax", "Split", "Slice", "Pad"),
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Resize", "Gather", "GatherElements"),
    }
)
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
_OF_SHAPES = {"Shape", "Size", "ArgMax", "ArgMin", "NonZero"}
_LAYOUT = {"ReorderInput", "ReorderOutput"}

KEPT = "kept in float for accuracy"
OF_THE_INPUT = "the conversion of the input to integers"
OF_THE_ANSWERS = "the conversion of the answers to float"
BETWEEN = "a conversion between integers and float, beside a node that runs in float"
OF_WEIGHTS = "weights stored as integers and used in float"
LAYOUT = "a change of memory layout for convolutions in float"
NO_KERNEL = "ONNX Runtime has no integer kernel for {operator}"
READS_INPUT = "an integer kernel exists, but the node reads the input in float"
READS_FLOAT = "an integer kernel exists, but the node reads what {maker} gives in float"
GIVES_FLOAT = "an integer kernel exists, but its output is not converted to integers"
NOT_FUSED = "an integer kernel exists, but ONNX Runtime did not use it between these conversions"


@dataclass(frozen=True)
class FloatNode:
    """A node that runs in float: its name and operator as in the file, and the reason in a few words."""

    name: str
    operator: str
    reason: str


def float_nodes(model: str | Path | bytes, kept: Collection[str] = ()) -> list[FloatNode]:
    """Every node of a file that ONNX Runtime runs in float here, in the order of running.

    Read from the graph as it runs on this machine, optimised with the session options of `runtime.session`;
    conversions from and to integers are nodes of it, too. `kept` names nodes that were left out of
    quantization on purpose. Raises runtime.ArtifactError where onnxruntime cannot load the model.
    """
    with temporary_folder() as folder:
        path = folder / "optimised.onnx"
        runtime.session(model, 1, optimised=path)
        running = onnx.load(str(path), load_external_data=False)
    if isinstance(model, bytes):
        file = onnx.load_from_string(model)
    else:
        file = onnx.load(str(model), load_external_data=False)
    return _Running(running.graph, file.graph, frozenset(kept)).float_nodes()


class _Running:
    """The graph as it runs, beside the graph in the file."""

    def __init__(self, graph: onnx.GraphProto, file: onnx.GraphProto, kept: frozenset[str]) -> None:
        self.graph, self.kept = graph, kept
        self.named = {node.name: node for node in file.node if node.name}
        self.file_makers = {name: node for node in file.node for name in node.output}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.inputs = {value.name for value in graph.input}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = {tensor.name for tensor in graph.initializer}
        self.answers = {value.name for value in graph.output}
        self.types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
        for node in graph.node:
            self.types |= dict.fromkeys(node.output, self._type_given(node))

    def float_nodes(self) -> list[FloatNode]:
        found: dict[FloatNode, None] = {}  # what runs as two nodes may be one of the file
        for node in self.graph.node:
            gives_float = any(self.types.get(name) in _FLOATS for name in node.output)
            if not _is_integer(node) and (node.op_type == "QuantizeLinear" or gives_float):
                found[self._described(node)] = None
        return list(found)

    def _described(self, node: onnx.NodeProto) -> FloatNode:
        origin = self._origin(node)
        name, operator = (origin.name, origin.op_type) if origin else (node.name, node.op_type)
        name = name or node.output[0]
        return FloatNode(name, operator, KEPT if name in self.kept else self._reason(node, operator))

    def _reason(self, node: onnx.NodeProto, operator: str) -> str:
        if operator == "QuantizeLinear":
            return OF_THE_INPUT if node.input[0] in self.inputs else BETWEEN
        if operator == "DequantizeLinear":
            if node.input[0] in self.constants:
                return OF_WEIGHTS
            return OF_THE_ANSWERS if node.output[0] in self.answers else BETWEEN
        if operator in _LAYOUT:
            return LAYOUT
        if operator not in _INTEGER_KERNELS:
            return NO_KERNEL.format(operator=operator)
        for tensor in node.input:
            maker = self.makers.get(tensor)
            if tensor in self.inputs:
                return READS_INPUT
            if (
                maker is not None
                and self.types.get(tensor) in _FLOATS
                and maker.op_type != "DequantizeLinear"
            ):
                return READS_FLOAT.format(maker=self._described_name(maker))
        readers = self.readers.get(node.output[0], [])
        converted = bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
        return NOT_FUSED if converted else GIVES_FLOAT

    def _described_name(self, node: onnx.NodeProto) -> str:
        origin = self._origin(node) or node
        return origin.name or origin.output[0]

    def _origin(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The file's node that `node` stems from; None for what ONNX Runtime put in."""
        if node.name in self.named:
            return self.named[node.name]
        if node.name.endswith(
            "_nchwc"
        ):  # a blocked convolution is named by what it, or its activation, gives
            origin = self.file_makers.get(node.name.removesuffix("_nchwc"))
            while origin is not None and origin.op_type != node.op_type:
                origin = self.file_makers.get(origin.input[0])
            return origin
        if node.name:
            return None
        # A piece of a HardSwish and the like has no name; the next node that has one reads what it gives.
        reader = node
        while reader.name not in self.named:
            readers = self.readers.get(reader.output[0])
            if not readers:
                return None
            reader = readers[0]
        origin = self.file_makers.get(self.named[reader.name].input[0])
        while origin is not None and origin.op_type in ("QuantizeLinear", "DequantizeLinear"):
            origin = self.file_makers.get(origin.input[0])
        return origin

    def _type_given(self, node: onnx.NodeProto) -> int:
        if node.op_type == "QuantizeLinear":
            return (
                self.types.get(node.input[2], TensorProto.UINT8) if len(node.input) > 2 else TensorProto.UINT8
            )
        if node.op_type == "DequantizeLinear" or node.op_type.endswith("ToFloat"):
            return TensorProto.FLOAT
        if _is_integer(node):
            return TensorProto.UINT8
        if node.op_type in _OF_SHAPES:
            return TensorProto.INT64
        if node.op_type == "Cast":
            return next(a.i for a in node.attribute if a.name == "to")
        of = node.input[1:2] if node.op_type == "Where" else node.input[:1]
        return self.types.get(of[0], TensorProto.FLOAT) if of else TensorProto.FLOAT


def _is_integer(node: onnx.NodeProto) -> bool:
    """Whether an operator computes in integers, whatever it gives."""
    return node.op_type.startswith(("QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger"))
