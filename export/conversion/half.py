"""fp16 files: ONNX Runtime's converter, and an emulation of their arithmetic on the CPU.

ONNX Runtime computes most operators of such a file in float on the CPU and drops the conversions between
them, so a tensor that exceeds fp16 is not found by running the file there. `emulate_half` rounds every
tensor to fp16, as GPUs do; only the sums within an operator remain in float.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..errors import ExportError
from .onnx_export import OnnxFile, write_onnx

KEPT = ("DequantizeLinear", "QuantizeLinear")
"""Operators that stay in float: their scales are float before opset 19."""


def write_half(source: Path, path: Path) -> OnnxFile:
    """Write a file with fp16 weights and computation, and the inputs and outputs of `source`.

    Raises ExportError if a part of the network cannot be converted.
    """
    from onnxruntime.transformers import float16

    kept = [*float16.DEFAULT_OP_BLOCK_LIST, *KEPT]
    try:
        model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=kept)
        sorted_model = onnx_ir.from_proto(model)
        sorted_model.graph.sort()  # the converter appends its nodes
        proto = onnx_ir.to_proto(sorted_model)
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # those of converter and checker share no base class
        reason = " ".join(str(error).split())
        raise ExportError(f"{source.name} cannot be converted to fp16: {reason}") from error
    return write_onnx(proto, path)


def emulate_half(source: Path, path: Path) -> OnnxFile:
    """Write a float file that computes what the fp16 file `source` does, with every tensor rounded."""
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    graph = model.graph
    half = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    del graph.value_info[:]
    for tensor in graph.initializer:
        _widen(tensor)
    nodes: list[NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in half:
                rounded, computed = f"{name}.rounded", f"{name}.computed"
                if node.op_type == "Cast":
                    node.output[index] = rounded
                else:
                    node.output[index] = computed
                    nodes.append(helper.make_node("Cast", [computed], [rounded], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    _replace_nodes(model, nodes)
    return write_onnx(model, path)


def _widen(tensor: TensorProto) -> None:
    """Convert an fp16 tensor to float in place."""
    if tensor.data_type == TensorProto.FLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _replace_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
