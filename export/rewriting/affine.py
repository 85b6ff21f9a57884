"""Multiply and shift what a layer gives, by its own weights and bias."""

from __future__ import annotations

import numpy as np
import onnx

from ..int8.rewrite import Graph, attribute

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
