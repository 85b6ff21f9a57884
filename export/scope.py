"""What of a float graph is fit for int8."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry


@dataclass(frozen=True)
class Scope:
    """What of a graph becomes int8: operators by type, but for the nodes named in `kept_float`."""

    op_types: tuple[str, ...]
    kept_float: tuple[str, ...]


def int8_scope(model: onnx.ModelProto) -> Scope:
    """Decide what of `model` is fit for int8; names nodes that have no name.

    A convolutional network: every operator ONNX Runtime has an integer kernel for. One with LayerNorm (ViT,
    Swin, ConvNeXt) or GroupNorm (BiT): products with weights only, for its residual stream spans more than 8
    bits hold (ViT-Tiny: 28 dB of signal to noise instead of 11). Attention's products of two activations
    never: fused by ONNX Runtime 1.31 they compute something else than the graph says (3 dB instead of 28),
    and softmax with them.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    attention = []
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type == "MatMul" and not constants.intersection(node.input):
            attention.append(node.name)
    return Scope(WEIGHTED if only_products(model) else _INTEGER, tuple(attention))


def stem(model: onnx.ModelProto) -> tuple[str, ...]:
    """Convolutions of at most 3 × 3 that read the graph's input of at most 4 channels, by name."""
    constants = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    first = model.graph.input[0].name
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type == "Conv"
        and node.input[0] == first
        and node.input[1] in constants
        and constants[node.input[1]][1] <= 4
        and max(constants[node.input[1]][2:]) <= 3
    )


def only_products(model: onnx.ModelProto) -> bool:
    """Whether nothing but products with weights becomes int8."""
    return any(node.op_type in _NORMS for node in model.graph.node)


WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Products with weights."""

_NORMS = (
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
)  # GroupNorm is written as the second
_INTEGER = tuple(sorted({*QDQRegistry, *QLinearOpsRegistry} - {*_NORMS, "Softmax"}))
