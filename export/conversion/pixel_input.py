"""A file that takes pixels as they are, uint8 [batch, S, S, 3], at no cost: normalisation as weights.

Padding with 0 means the mean colour, which no one pixel value is. So the input keeps one zero point z near
the mean, as a quantized tensor has anyway, and what is left of each channel's mean, δ = z/255 − mean, goes
into the weights of a fourth channel that is constant within the picture and 0 in the padding:

    (u/255 − mean)/std = (u − z)/255 · 1/std + δ/std

Where nothing is padded, δ goes into the bias. In a quantized file the first convolution takes the pixels and
the fourth channel themselves. Where the first layer isn't a plain convolution, float nodes stand before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..errors import ExportError
from ..first_layer import FirstLayer, first_layer
from ..uint8_front import INPUT, PIXELS, PLANES, SCALE, Folded, Front, Outside, read_front


def take_pixels(model: ModelProto, mean: Sequence[float], std: Sequence[float]) -> Front:
    """Give `model`, whose input is float32 [batch, 3, S, S], normalised, one of pixels; in place.

    The front says whether it costs nothing (`Folded`) or stands in float before the network (`Outside`).
    """
    front: Front | None = fold_normalisation(model, mean, std)
    if front is None:
        _rename_input(model)
        front = Outside.of(mean, std)
    attach(model, front)
    return front


def fold_normalisation(model: ModelProto, mean: Sequence[float], std: Sequence[float]) -> Folded | None:
    """Fold (u/255 − mean)/std into the convolutions that `model`'s input feeds; exact, in place.

    `model` is a core then, which takes what `Folded.feed` gives. None, and nothing changed, where the input
    feeds anything but plain convolutions.
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
        convolution.weight = convolution.weight / s[:, None, None]
        if mask is not None:
            fourth = offset / ((mask - zero_point) / 255)
            convolution.weight = np.concatenate([convolution.weight, fourth[:, None]], axis=1)
        elif left.any():
            convolution.add_bias(offset.sum((1, 2)))
    layer.write()
    _rename_input(model)
    front = Folded(zero_point, mask)
    _set_input(model, front, core=True)
    return front


def _mask(layer: FirstLayer, left: np.ndarray, std: np.ndarray, zero_point: int) -> int:
    """The fourth channel's pixel value: the nearest to z at which its weights are no larger than the others'.

    In int8 the weights of an output channel share a step, that of the largest; the fourth channel's rounding
    counts in proportion to its distance from z.
    """
    distance = 1.0
    for convolution in layer.convolutions:
        others = np.abs(convolution.weight / std[:, None, None]).max((1, 2, 3))
        fourth = 255 * np.abs(np.einsum("ochw,c->ohw", convolution.weight, left)).max((1, 2))
        distance = max(distance, float((fourth[others > 0] / others[others > 0]).max(initial=0)))
    above, below = 255 - zero_point, zero_point
    step = int(min(np.ceil(distance), max(above, below)))
    return zero_point + step if step <= above else zero_point - step


def has_uint8_input(model: ModelProto) -> bool:
    return bool(model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8)


def front_of(file: Path) -> Front | None:
    """How a file brings pixels before its network; None where it takes float."""
    return read_front(onnx.load(str(file), load_external_data=False).graph.initializer)


def split(model: ModelProto) -> Front:
    """Take away what `attach` has put in front, so that `model` is the core again; in place.

    Raises ExportError where the input isn't one that `attach` makes.
    """
    front = read_front(model.graph.initializer)
    if front is None or not has_uint8_input(model):
        raise ExportError("the model's input is not one of pixels as questpress writes it")
    nodes, constants = front.nodes(*_sides(model))
    of_front = {node.name for node in nodes} | {tensor.name for tensor in constants}
    _keep(model.graph.node, [node for node in model.graph.node if node.name not in of_front])
    _rewire(model.graph.node, {PLANES: PIXELS})
    _keep(model.graph.initializer, [t for t in model.graph.initializer if t.name not in of_front])
    _keep(model.graph.value_info, [v for v in model.graph.value_info if v.name not in of_front])
    _set_input(model, front, core=True)
    return front


def attach(core: ModelProto, front: Front) -> None:
    """Put `front` before a core, float or quantized; in place: the input is uint8 [batch, S, S, 3] then.

    Where the core quantizes its input to just what the pixels are (`Folded.overrides`), they go in as they
    are, and nothing at the entry is left in float.
    """
    nodes, constants = front.nodes(*_sides(core))
    if isinstance(front, Folded):
        values = {tensor.name: tensor for tensor in core.graph.initializer}
        first = [node for node in core.graph.node if PIXELS in node.input]
        same = [node for node in first if _gives_pixels(node, values, front)]
        _keep(core.graph.node, [node for node in core.graph.node if node not in same])
        _rewire(core.graph.node, {node.output[0]: PLANES for node in same})
        shapes = [node for node in first if node.op_type == "Shape"]
        _rewire(shapes, {PIXELS: PLANES})
        if len(same) + len(shapes) == len(first):
            del nodes[-1]
    _keep(core.graph.node, [*nodes, *core.graph.node])
    _set_input(core, front, core=False)
    used = {name for node in core.graph.node for name in node.input}
    _keep(core.graph.initializer, [t for t in (*core.graph.initializer, *constants) if t.name in used])


def _gives_pixels(node: NodeProto, values: dict[str, TensorProto], front: Folded) -> bool:
    if node.op_type != "QuantizeLinear" or any(name not in values for name in node.input[1:]):
        return False
    scale, zero_point = (numpy_helper.to_array(values[name]) for name in node.input[1:3])
    alike = zero_point.dtype == np.uint8 and np.all(scale == SCALE) and np.all(zero_point == front.zero_point)
    return bool(alike)


def _sides(model: ModelProto) -> tuple[int, int]:
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    height, width = dims[1:3] if has_uint8_input(model) else dims[2:4]
    if not height or not width:
        raise ExportError("a network that takes pixels needs a fixed image size")
    return height, width


def _set_input(model: ModelProto, front: Front, *, core: bool) -> None:
    height, width = _sides(model)
    dim = model.graph.input[0].type.tensor_type.shape.dim[0]
    batch = dim.dim_param or dim.dim_value
    if core:
        shape = [batch, front.channels, height, width]
        value = helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, shape)
    else:
        value = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [batch, height, width, 3])
    model.graph.input[0].CopyFrom(value)


def _rename_input(model: ModelProto) -> None:
    _rewire(model.graph.node, {model.graph.input[0].name: PIXELS})
    model.graph.input[0].name = PIXELS


def _rewire(nodes: Iterable[NodeProto], instead: dict[str, str]) -> None:
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = instead.get(name, name)


def _keep(field: Any, values: Sequence[Any]) -> None:
    kept = list(values)
    del field[:]
    field.extend(kept)
