"""A file that takes pixels as they are, uint8 [batch, S, S, 3], and costs nothing for it.

Padding with 0 means the mean colour, which no single pixel value is. So the input keeps one zero point z near
the mean, as a quantized tensor has anyway, and what is left of each channel's mean, δ = z/255 − mean, goes
into the weights of a fourth channel that is constant within the picture and 0 in the padding:

    (u/255 − mean)/std = (u − z)/255 · 1/std + δ/std

in front of the network stand Pad (the fourth channel), Transpose and DequantizeLinear (scale 1/255, zero point
z), of which in int8 the last is gone: the first convolution takes the pixels themselves. Where nothing is
padded, δ goes into the bias. Where the first layer isn't a plain convolution, float nodes stand in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType

from .errors import ExportError
from .first_layer import FirstLayer, first_layer
from .onnx_export import BATCH, INPUT

PIXELS = "pixels"
"""Name of what a core takes: float32 [batch, 3 or 4, S, S]."""

_SCALE = np.float32(1 / 255)
_PADDED, _PLANES, _FLOAT, _SCALED = "uint8_padded", "uint8_planes", "uint8_float", "uint8_scaled"
_Z, _MASK, _STEP = "uint8_zero_point", "uint8_mask", "uint8_step"
_FACTOR, _SHIFT, _PADS = "uint8_factor", "uint8_shift", "uint8_pads"


@dataclass(frozen=True)
class Folded:
    """The normalisation is in the core's first weights; `mask` is the pixel value of the fourth channel."""

    zero_point: int
    mask: int | None

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] to what the core takes, float32 [B, 3 or 4, S, S]."""
        planes = pixels.transpose(0, 3, 1, 2)
        if self.mask is not None:
            planes = np.pad(planes, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=self.mask)
        return (planes.astype(np.float32) - self.zero_point) * _SCALE

    def overrides(self, *, signed: bool = False) -> dict[str, list[dict[str, Any]]]:
        """ONNX Runtime's `TensorQuantOverrides` of the core's input: pixels are quantized already."""
        kind, dtype = (QuantType.QInt8, np.int8) if signed else (QuantType.QUInt8, np.uint8)
        zero_point = np.array(self.zero_point - (128 if signed else 0), dtype=dtype)
        return {PIXELS: [{"quant_type": kind, "scale": np.array(_SCALE), "zero_point": zero_point}]}

    def nodes(self) -> tuple[list[NodeProto], list[TensorProto]]:
        """From the file's input to the core's, and their constants."""
        nodes, source = [], INPUT
        constants = {_STEP: np.array(_SCALE), _Z: np.array(self.zero_point, dtype=np.uint8)}
        if self.mask is not None:
            constants[_PADS] = np.array([0, 0, 0, 0, 0, 0, 0, 1], dtype=np.int64)
            constants[_MASK] = np.array(self.mask, dtype=np.uint8)
            nodes.append(helper.make_node("Pad", [INPUT, _PADS, _MASK], [_PADDED], name=_PADDED))
            source = _PADDED
        nodes.append(helper.make_node("Transpose", [source], [_PLANES], name=_PLANES, perm=[0, 3, 1, 2]))
        nodes.append(helper.make_node("DequantizeLinear", [_PLANES, _STEP, _Z], [PIXELS], name=_FLOAT))
        return nodes, _tensors(constants)


@dataclass(frozen=True)
class Outside:
    """The core is as it was; float nodes in front of it compute u · factor + shift of each channel."""

    factor: tuple[float, ...]
    shift: tuple[float, ...]

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] to what the core takes, float32 [B, 3, S, S]."""
        planes = pixels.transpose(0, 3, 1, 2).astype(np.float32)
        return planes * _per_channel(self.factor) + _per_channel(self.shift)

    def overrides(self, *, signed: bool = False) -> dict[str, list[dict[str, Any]]]:  # noqa: ARG002
        """None: the core's input is quantized as any other tensor."""
        return {}

    def nodes(self) -> tuple[list[NodeProto], list[TensorProto]]:
        nodes = [
            helper.make_node("Transpose", [INPUT], [_PLANES], name=_PLANES, perm=[0, 3, 1, 2]),
            helper.make_node("Cast", [_PLANES], [_FLOAT], name=_FLOAT, to=TensorProto.FLOAT),
            helper.make_node("Mul", [_FLOAT, _FACTOR], [_SCALED], name=_SCALED),
            helper.make_node("Add", [_SCALED, _SHIFT], [PIXELS], name=_SHIFT),
        ]
        constants = {_FACTOR: _per_channel(self.factor), _SHIFT: _per_channel(self.shift)}
        return nodes, _tensors(constants)


Front = Folded | Outside


def take_pixels(model: ModelProto, mean: Sequence[float], std: Sequence[float]) -> Front:
    """Make `model`, whose input is float32 [batch, 3, S, S], normalised, one of uint8 pixels; in place."""
    front = fold_normalisation(model, mean, std)
    if front is None:
        _rename(model, model.graph.input[0].name, PIXELS)
        front = Outside(tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True)))
    attach(model, front)
    return front


def fold_normalisation(model: ModelProto, mean: Sequence[float], std: Sequence[float]) -> Folded | None:
    """Fold (u/255 − mean)/std into the convolutions that `model`'s input feeds; in place, exactly.

    None, and nothing changed, where it feeds anything but plain convolutions.
    """
    layer = first_layer(model)
    if layer is None:
        return None
    m, s = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
    zero_point = int(np.clip(np.rint(255 * m.mean()), 0, 255))
    left = (zero_point / 255 - m) / s
    mask = _mask(layer, left, s, zero_point) if layer.padded and left.any() else None
    for convolution in layer.convolutions:
        offset = np.einsum("ochw,c->ohw", convolution.weight, left)
        weight = convolution.weight / s[:, None, None]
        if mask is not None:
            fourth = offset / ((mask - zero_point) / 255)
            weight = np.concatenate([weight, fourth[:, None]], axis=1)
        elif left.any():
            convolution.add_bias(offset.sum((1, 2)))
        convolution.weight = weight
    layer.write()
    _rename(model, model.graph.input[0].name, PIXELS)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3 if mask is None else 4
    return Folded(zero_point, mask)


def _mask(layer: FirstLayer, left: np.ndarray, std: np.ndarray, zero_point: int) -> int:
    """The fourth channel's pixel value: the nearest to z whose weights are no larger than the others'.

    In int8 all weights of an output channel are in steps of the largest; a step's error counts times the
    distance from z.
    """
    need = 1.0
    for convolution in layer.convolutions:
        others = np.abs(convolution.weight / std[:, None, None]).max((1, 2, 3))
        fourth = np.abs(np.einsum("ochw,c->ohw", convolution.weight, left)).max((1, 2))
        need = max(need, float(np.divide(255 * fourth, others, out=np.ones_like(fourth), where=others > 0).max()))
    most = max(255 - zero_point, zero_point)
    distance = int(min(np.ceil(need), most))
    return zero_point + distance if zero_point + distance <= 255 else zero_point - distance


def has_uint8_input(model: ModelProto) -> bool:
    return bool(model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8)


def split(model: ModelProto) -> Front:
    """Take off what `attach` has put in front; `model` is the core then. Raises ExportError."""
    front = _front(model)
    nodes, constants = front.nodes()
    names, kept = {node.name for node in nodes}, {tensor.name for tensor in constants}
    _keep(model.graph.node, [node for node in model.graph.node if node.name not in names])
    _keep(model.graph.initializer, [t for t in model.graph.initializer if t.name not in kept])
    _set_input(model, front, core=True)
    return front


def attach(core: ModelProto, front: Front) -> None:
    """Put `front` before a core, float or quantized; in place: the input is uint8 [batch, S, S, 3] then.

    Where the core quantizes its input to what the pixels are already, they go in as they are.
    """
    nodes, constants = front.nodes()
    first = [node for node in core.graph.node if PIXELS in node.input]
    if isinstance(front, Folded):
        values = {tensor.name: tensor for tensor in core.graph.initializer}
        same = [node for node in first if _quantizes_alike(node, values, front)]
        taken = {node.output[0]: _PLANES for node in same}
        _keep(core.graph.node, [node for node in core.graph.node if node not in same])
        for node in core.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = taken.get(name, name)
        if len(same) == len(first):
            nodes = nodes[:-1]
    _keep(core.graph.node, [*nodes, *core.graph.node])
    core.graph.initializer.extend(constants)
    _set_input(core, front, core=False)
    used = {name for node in core.graph.node for name in node.input}
    _keep(core.graph.initializer, [tensor for tensor in core.graph.initializer if tensor.name in used])


def _quantizes_alike(node: NodeProto, values: dict[str, TensorProto], front: Folded) -> bool:
    if node.op_type != "QuantizeLinear" or not {*node.input[1:]} <= values.keys() or len(node.input) < 3:
        return False
    scale, zero_point = (numpy_helper.to_array(values[name]) for name in node.input[1:])
    return bool(
        zero_point.dtype == np.uint8 and np.all(scale == _SCALE) and np.all(zero_point == front.zero_point)
    )


def _front(model: ModelProto) -> Front:
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.startswith("uint8_")}
    if has_uint8_input(model) and _Z in values:
        return Folded(int(values[_Z]), int(values[_MASK]) if _MASK in values else None)
    if has_uint8_input(model) and {_FACTOR, _SHIFT} <= values.keys():
        return Outside(tuple(values[_FACTOR].ravel().tolist()), tuple(values[_SHIFT].ravel().tolist()))
    raise ExportError("the model's input isn't one of uint8 pixels as questpress writes it")


def _set_input(model: ModelProto, front: Front, *, core: bool) -> None:
    dims = [d.dim_value or d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
    side = dims[2]  # the same place in both
    channels = 4 if isinstance(front, Folded) and front.mask is not None else 3
    if core:
        value = helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, [BATCH, channels, side, side])
    else:
        value = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [BATCH, side, side, 3])
    model.graph.input[0].CopyFrom(value)


def _rename(model: ModelProto, old: str, new: str) -> None:
    model.graph.input[0].name = new
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _keep(field: Any, values: Sequence[Any]) -> None:
    kept = list(values)
    del field[:]
    field.extend(kept)


def _per_channel(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None, None]


def _tensors(constants: dict[str, np.ndarray]) -> list[TensorProto]:
    return [numpy_helper.from_array(value, name) for name, value in constants.items()]
