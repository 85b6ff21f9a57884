"""Find the nodes of a quantized file that run in float on this machine, and why."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
from onnx import TensorProto

from .. import runtime
from ..conversion.pixel_input import map_readers
from ..files import temporary_folder
from ..results import FloatNode

# Operators with an integer kernel in ONNX Runtime on CPUs, or folded into the integer node before them.
_INTEGER_KERNELS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Concat", "Where", "LeakyRelu", "Sigmoid"),
        *("GlobalAveragePool", "AveragePool", "MaxPool", "Relu", "Clip", "Softmax", "Split", "Slice", "Pad"),
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Resize", "Gather", "GatherElements"),
    }
)
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
_SHAPE_OPERATORS = {"Shape", "Size", "ArgMax", "ArgMin", "NonZero"}
_LAYOUT_OPERATORS = {"ReorderInput", "ReorderOutput"}

KEPT = "kept in float for accuracy"
CONVERTS_INPUT = "conversion of the input to integers"
CONVERTS_OUTPUT = "conversion of the output to float"
CONVERTS_BETWEEN = "conversion between integers and float, next to a node that runs in float"
CONVERTS_WEIGHTS = "weights stored as integers and used in float"
LAYOUT = "change of memory layout for convolutions in float"
NO_KERNEL = "ONNX Runtime has no integer kernel for {operator}"
READS_INPUT = "an integer kernel exists, but the node reads the input in float"
READS_FLOAT = "an integer kernel exists, but the node reads the float output of {producer}"
WRITES_FLOAT = "an integer kernel exists, but its output is not converted to integers"
NOT_FUSED = "an integer kernel exists, but ONNX Runtime did not use it between these conversions"


def float_nodes(model: str | Path | bytes, kept: Collection[str] = ()) -> list[FloatNode]:
    """Return the nodes of a file that ONNX Runtime runs in float here, in the order of execution.

    Read from the graph that `runtime.open_session` optimized for this machine. Conversions from and to
    integers are nodes of it, too.

    Args:
        kept: names of nodes that were deliberately not quantized.

    Raises:
        runtime.ArtifactError: onnxruntime cannot load the model.
    """
    with temporary_folder() as folder:
        path = folder / "optimized.onnx"
        runtime.open_session(model, 1, optimized=path)
        running = onnx.load(str(path), load_external_data=False)
    if isinstance(model, bytes):
        file = onnx.load_from_string(model)
    else:
        file = onnx.load(str(model), load_external_data=False)
    return _OptimizedGraph(running.graph, file.graph, frozenset(kept)).float_nodes()


class _OptimizedGraph:
    """The graph that runs, and the graph in the file."""

    def __init__(self, graph: onnx.GraphProto, file: onnx.GraphProto, kept: frozenset[str]) -> None:
        self.graph, self.kept = graph, kept
        self.named = {node.name: node for node in file.node if node.name}
        self.file_producers = {name: node for node in file.node for name in node.output}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.inputs = {value.name for value in graph.input}
        self.readers = map_readers(graph)
        self.constants = {tensor.name for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
        for node in graph.node:
            self.types |= dict.fromkeys(node.output, self._output_type(node))

    def float_nodes(self) -> list[FloatNode]:
        nodes: dict[FloatNode, None] = {}  # one node of the file may run as two
        for node in self.graph.node:
            writes_float = any(self.types.get(name) in _FLOATS for name in node.output)
            if not _is_integer(node) and (node.op_type == "QuantizeLinear" or writes_float):
                origin = self._origin(node) or node
                name, operator = origin.name or node.output[0], origin.op_type
                reason = KEPT if name in self.kept else self._reason(node, operator)
                nodes[FloatNode(name=name, op_type=operator, why=reason)] = None
        return list(nodes)

    def _reason(self, node: onnx.NodeProto, operator: str) -> str:
        if operator == "QuantizeLinear":
            return CONVERTS_INPUT if node.input[0] in self.inputs else CONVERTS_BETWEEN
        if operator == "DequantizeLinear":
            if node.input[0] in self.constants:
                return CONVERTS_WEIGHTS
            return CONVERTS_OUTPUT if node.output[0] in self.outputs else CONVERTS_BETWEEN
        if operator in _LAYOUT_OPERATORS:
            return LAYOUT
        if operator not in _INTEGER_KERNELS:
            return NO_KERNEL.format(operator=operator)
        for tensor in node.input:
            producer = self.producers.get(tensor)
            if tensor in self.inputs:
                return READS_INPUT
            if producer is None or producer.op_type == "DequantizeLinear":
                continue
            if self.types.get(tensor) in _FLOATS:
                origin = self._origin(producer) or producer
                return READS_FLOAT.format(producer=origin.name or origin.output[0])
        readers = self.readers.get(node.output[0], [])
        converted = bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
        return NOT_FUSED if converted else WRITES_FLOAT

    def _origin(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return the node of the file that `node` comes from; None if ONNX Runtime inserted it."""
        if node.name in self.named:
            return self.named[node.name]
        if node.name.endswith("_nchwc"):  # a blocked convolution is named by its output or its activation's
            origin = self.file_producers.get(node.name.removesuffix("_nchwc"))
            while origin is not None and origin.op_type != node.op_type:
                origin = self.file_producers.get(origin.input[0])
            return origin
        if node.name:
            return None
        # Parts of a HardSwish and the like have no name; the next node with a name reads their output.
        reader = node
        while reader.name not in self.named:
            readers = self.readers.get(reader.output[0])
            if not readers:
                return None
            reader = readers[0]
        origin = self.file_producers.get(self.named[reader.name].input[0])
        while origin is not None and origin.op_type in ("QuantizeLinear", "DequantizeLinear"):
            origin = self.file_producers.get(origin.input[0])
        return origin

    def _output_type(self, node: onnx.NodeProto) -> int:
        if node.op_type == "QuantizeLinear":
            zero_point = node.input[2] if len(node.input) > 2 else ""
            return self.types.get(zero_point, TensorProto.UINT8)
        if node.op_type == "DequantizeLinear" or node.op_type.endswith("ToFloat"):
            return TensorProto.FLOAT
        if _is_integer(node):
            return TensorProto.UINT8
        if node.op_type in _SHAPE_OPERATORS:
            return TensorProto.INT64
        if node.op_type == "Cast":
            return next(a.i for a in node.attribute if a.name == "to")
        data = node.input[1:2] if node.op_type == "Where" else node.input[:1]
        return self.types.get(data[0], TensorProto.FLOAT) if data else TensorProto.FLOAT


def _is_integer(node: onnx.NodeProto) -> bool:
    """Return True if an operator computes in integers, even if its output is float."""
    return node.op_type.startswith(("QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger"))
