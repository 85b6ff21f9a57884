"""The batch size of an ONNX file: any, or fixed at single images, as compilers for phones require."""

from __future__ import annotations

from dataclasses import replace

import onnx

from .onnx_export import BATCH, OnnxFile, write_onnx


def has_fixed_batch(model: onnx.ModelProto) -> bool:
    """Return True if the model takes one batch size only."""
    return bool(model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"))


def set_batch(model: onnx.ModelProto, size: int | None) -> None:
    """Set the batch size of all inputs and outputs in place, None for any, and infer the shapes between."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output):
        if value.name not in weights:
            dim = value.type.tensor_type.shape.dim[0]
            if size is None:
                dim.dim_param = BATCH
            else:
                dim.dim_value = size
    del model.graph.value_info[:]
    model.CopyFrom(onnx.shape_inference.infer_shapes(model))


def fix_batch(file: OnnxFile) -> OnnxFile:
    """Rewrite a file so that it takes single images only; external weights are not touched."""
    model = onnx.load(file.path, load_external_data=False)
    before = file.path.stat().st_size
    set_batch(model, 1)
    written = write_onnx(model, file.path)
    return replace(written, bytes=file.bytes - before + written.bytes)
