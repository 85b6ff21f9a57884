"""Files with uint8 input [batch, H, W, 3], whose normalization is part of the first weights at no cost.

Padding with 0 means the mean color, which is not the same pixel value in all channels. So the input keeps one
zero point z near the mean, as a quantized tensor has anyway, and the rest of each channel's mean,
δ = z/255 − mean, becomes the weights of a fourth channel that is constant within the image and 0 in the
padding:

    (u/255 − mean)/std = (u − z)/255 · 1/std + δ/std

Without padding, δ becomes part of the bias. In a quantized file the first convolution reads the pixels and
the fourth channel directly. If the first layer is not a plain convolution, float nodes precede it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType

from ..errors import ExportError

INPUT, PLANES, PIXELS = "input", "uint8_planes", "pixels"
"""Names of a file's input, uint8 [batch, H, W, 3], of its planes, uint8 [batch, 3 or 4, H, W], and of the
core's input, float32 [batch, 3 or 4, H, W]. The core is the network without the conversion of pixels.
"""

SCALE = np.float32(1 / 255)
_Z, _MASK = "uint8_zero_point", "uint8_mask"
_FACTOR, _SHIFT = "uint8_factor", "uint8_shift"


@dataclass(frozen=True)
class Folded:
    """Normalization in the core's first weights; the core's input is (u − zero_point)/255.

    `mask` is the pixel value of a fourth channel; None without one.
    """

    zero_point: int
    mask: int | None

    description = "normalization folded into the first convolution"

    @property
    def channels(self) -> int:
        return 3 if self.mask is None else 4

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """Convert pixels, uint8 [B, H, W, 3], to the core's input, float32 [B, 3 or 4, H, W]."""
        planes = pixels.transpose(0, 3, 1, 2)
        if self.mask is not None:
            planes = np.pad(planes, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=self.mask)
        return np.ascontiguousarray((planes.astype(np.float32) - self.zero_point) * SCALE)

    def overrides(self, *, signed: bool) -> dict[str, list[dict[str, Any]]]:
        """Return ONNX Runtime's `TensorQuantOverrides` for the core's input, which is quantized already."""
        kind, dtype = (QuantType.QInt8, np.int8) if signed else (QuantType.QUInt8, np.uint8)
        zero_point = np.array(self.zero_point - (128 if signed else 0), dtype=dtype)
        return {PIXELS: [{"quant_type": kind, "scale": np.array(SCALE), "zero_point": zero_point}]}

    def nodes(self, height: int, width: int) -> tuple[list[NodeProto], list[TensorProto]]:
        """Return the nodes from the file's input to the core's, and their constants."""
        nodes = _Nodes()
        step = nodes.constant("uint8_step", SCALE)
        zero_point = nodes.constant(_Z, np.uint8(self.zero_point))
        if self.mask is None:
            nodes.add("Transpose", [INPUT], PLANES, perm=[0, 3, 1, 2])
        else:
            # ONNX Runtime would move a transpose behind the padding, where it takes five times as long. It
            # does not move it across this Reshape.
            flat = nodes.constant("uint8_flat_shape", np.array([0, -1, 3]))
            pads = nodes.constant("uint8_pads", np.array([0, 0, 0, 0, 1, 0]))
            shape = nodes.constant("uint8_shape", np.array([0, 4, height, width]))
            nodes.add("Reshape", [INPUT, flat], "uint8_flat")
            nodes.add("Transpose", ["uint8_flat"], "uint8_colors", perm=[0, 2, 1])
            mask = nodes.constant(_MASK, np.uint8(self.mask))
            nodes.add("Pad", ["uint8_colors", pads, mask], "uint8_masked")
            nodes.add("Reshape", ["uint8_masked", shape], PLANES)
        nodes.add("DequantizeLinear", [PLANES, step, zero_point], PIXELS)
        return nodes.nodes, nodes.constants


@dataclass(frozen=True)
class Outside:
    """An unchanged core after float nodes that compute u · factor + shift for each channel."""

    factor: tuple[float, ...]
    shift: tuple[float, ...]
    description = "normalization in float, before the network"
    channels = 3

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """Convert pixels, uint8 [B, H, W, 3], to the core's input, float32 [B, 3, H, W]."""
        planes = pixels.transpose(0, 3, 1, 2).astype(np.float32)
        factor, shift = (np.array(v, dtype=np.float32)[:, None, None] for v in (self.factor, self.shift))
        return np.ascontiguousarray(planes * factor + shift)

    def nodes(self, height: int, width: int) -> tuple[list[NodeProto], list[TensorProto]]:
        """Return the nodes from the file's input to the core's, and their constants."""
        nodes = _Nodes()
        factor = nodes.constant(_FACTOR, np.array(self.factor, dtype=np.float32))
        zero_point = nodes.constant(_Z, np.zeros(3, dtype=np.uint8))
        shift = nodes.constant(_SHIFT, np.array(self.shift, dtype=np.float32)[:, None, None])
        nodes.add("Transpose", [INPUT], PLANES, perm=[0, 3, 1, 2])
        nodes.add("DequantizeLinear", [PLANES, factor, zero_point], "uint8_scaled", axis=1)
        nodes.add("Add", ["uint8_scaled", shift], PIXELS)
        return nodes.nodes, nodes.constants


Front = Folded | Outside


def read_front(constants: Sequence[TensorProto]) -> Front | None:
    """Return the front of a file with these constants; None if it has none."""
    values = {t.name: numpy_helper.to_array(t) for t in constants if t.name.startswith("uint8_")}
    if {_FACTOR, _SHIFT} <= values.keys():
        return Outside(tuple(values[_FACTOR].ravel().tolist()), tuple(values[_SHIFT].ravel().tolist()))
    if _Z in values:
        return Folded(int(values[_Z]), int(values[_MASK]) if _MASK in values else None)
    return None


class _Nodes:
    """Nodes, named like their output, and constants."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, takes: list[str], gives: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, takes, [gives], name=gives, **attributes))


_Constants = dict[str, TensorProto]


@dataclass
class Convolution:
    """A first convolution: weight float64 [out, 3, kh, kw] and bias float64 [out].

    `pads` is [top, left, bottom, right] and includes a Pad before the convolution.
    """

    node: NodeProto
    weight: np.ndarray
    bias: np.ndarray | None
    pads: np.ndarray


def _write(graph: GraphProto, convolutions: list[Convolution]) -> None:
    """Write weights, biases and padding of the first convolutions into the graph and remove Pad nodes."""
    source = graph.input[0].name
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for convolution in convolutions:
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
        pads = helper.make_attribute("pads", convolution.pads.tolist())
        _keep(node.attribute, [*(a for a in node.attribute if a.name not in ("pads", "auto_pad")), pads])
    _keep(graph.node, [n for n in graph.node if n.op_type != "Pad" or n.input[0] != source])
    changed = {convolution.node.input[1] for convolution in convolutions}
    _keep(graph.value_info, [value for value in graph.value_info if value.name not in changed])


def map_readers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Return the nodes that read each tensor, by its name; a node that reads it twice is listed twice."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _first_layer(graph: GraphProto) -> list[Convolution] | None:
    """Return the convolutions of the input, with a Pad before them; None if other nodes read the input."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = map_readers(graph)
    convolutions = []
    for node in uses.get(graph.input[0].name, []):
        if _ignores_channels(node):
            continue
        pads: np.ndarray | None = np.zeros(4, dtype=np.int64)
        readers = [node]
        if node.op_type == "Pad":
            pads, readers = _zero_padding(node, constants), uses.get(node.output[0], [])
        for reader in readers:
            convolution = None if pads is None else _convolution(reader, pads, constants, uses)
            if convolution is None:
                return None
            convolutions.append(convolution)
    return convolutions or None


def _convolution(
    node: NodeProto, outer_pads: np.ndarray, constants: _Constants, uses: dict[str, list[NodeProto]]
) -> Convolution | None:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    parameters = [name for name in node.input[1:] if name]
    plain = (
        node.op_type == "Conv"
        and attributes.get("group", 1) == 1
        and attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        and all(name in constants and len(uses[name]) == 1 for name in parameters)
    )
    if not plain:
        return None
    weight, *bias = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in parameters)
    if weight.ndim != 4 or weight.shape[1] != 3:
        return None
    pads = np.array(attributes.get("pads", [0, 0, 0, 0]), dtype=np.int64) + outer_pads
    return Convolution(node, weight, bias[0] if bias else None, pads)


def _ignores_channels(node: NodeProto) -> bool:
    """Return True for a Shape of the batch only, or of height and width."""
    if node.op_type != "Shape":
        return False
    ends = {a.name: a.i for a in node.attribute}
    return 1 not in range(4)[ends.get("start", 0) : ends.get("end", 4)]


def _zero_padding(node: NodeProto, constants: _Constants) -> np.ndarray | None:
    """Return [top, left, bottom, right] of a Pad of zeros in height and width; None for any other."""
    mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
    parameters = [
        numpy_helper.to_array(constants[name]) if name in constants else None for name in node.input[1:]
    ]
    computed = any(value is None for name, value in zip(node.input[1:], parameters, strict=True) if name)
    if mode != b"constant" or computed or not parameters:
        return None
    pads, value, axes = [*parameters, None, None][:3]
    assert pads is not None
    if value is not None and np.any(value != 0):
        return None
    before, after = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64)
    positions = np.arange(4) if axes is None else axes.ravel() % 4
    half = len(positions)
    before[positions], after[positions] = pads[:half], pads[half:]
    around = np.concatenate([before[2:], after[2:]])
    if before[:2].any() or after[:2].any() or (around < 0).any():
        return None
    return around


def _float(values: np.ndarray, name: str) -> TensorProto:
    return numpy_helper.from_array(values.astype(np.float32), name)


def take_pixels(model: ModelProto, mean: Sequence[float], std: Sequence[float]) -> Front:
    """Replace the normalized float32 input [batch, 3, H, W] of `model` by uint8 pixels, in place."""
    front: Front | None = fold_normalization(model, mean, std)
    if front is None:
        _rename_input(model)
        shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
        front = Outside(tuple(1 / (255 * s) for s in std), shift)
    attach(model, front)
    return front


def fold_normalization(model: ModelProto, mean: Sequence[float], std: Sequence[float]) -> Folded | None:
    """Fold (u/255 − mean)/std exactly into the convolutions that read the input of `model`, in place.

    The input of `model` is then the output of `Folded.feed`. Returns None, and changes nothing, if other
    nodes than plain convolutions read the input.
    """
    convolutions = _first_layer(model.graph)
    if convolutions is None:
        return None
    m, s = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
    zero_point = int(np.clip(np.rint(255 * m.mean()), 0, 255))
    left = (zero_point / 255 - m) / s
    padded = any(convolution.pads.any() for convolution in convolutions)
    mask = _mask(convolutions, left, s, zero_point) if padded and left.any() else None
    for convolution in convolutions:
        offset = np.einsum("ochw,c->ohw", convolution.weight, left)
        convolution.weight = convolution.weight / s[:, None, None]
        if mask is not None:
            fourth = offset / ((mask - zero_point) / 255)
            convolution.weight = np.concatenate([convolution.weight, fourth[:, None]], axis=1)
        elif left.any():
            shift = offset.sum((1, 2))
            convolution.bias = shift if convolution.bias is None else convolution.bias + shift
    _write(model.graph, convolutions)
    _rename_input(model)
    front = Folded(zero_point, mask)
    _set_input(model, front, core=True)
    return front


def _mask(convolutions: list[Convolution], left: np.ndarray, std: np.ndarray, zero_point: int) -> int:
    """Return the fourth channel's pixel value: the nearest to z without larger weights than the others'.

    In int8 the weights of an output channel share a step, that of the largest; the fourth channel's rounding
    counts in proportion to its distance from z.
    """
    distance = 1.0
    for convolution in convolutions:
        others = np.abs(convolution.weight / std[:, None, None]).max((1, 2, 3))
        fourth = 255 * np.abs(np.einsum("ochw,c->ohw", convolution.weight, left)).max((1, 2))
        distance = max(distance, float((fourth[others > 0] / others[others > 0]).max(initial=0)))
    above, below = 255 - zero_point, zero_point
    step = int(min(np.ceil(distance), max(above, below)))
    return zero_point + step if step <= above else zero_point - step


def has_uint8_input(model: ModelProto) -> bool:
    return bool(model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8)


def load_front(file: Path) -> Front | None:
    """Return the front of a file with uint8 input; None if its input is float."""
    return read_front(onnx.load(str(file), load_external_data=False).graph.initializer)


def split(model: ModelProto) -> Front:
    """Remove the front that `attach` inserted and return it; `model` becomes the core, in place.

    Raises ExportError if the input was not made by `attach`.
    """
    front = read_front(model.graph.initializer)
    if front is None or not has_uint8_input(model):
        raise ExportError("the model's uint8 input was not written by questpress")
    nodes, constants = front.nodes(*_sides(model))
    removed = {node.name for node in nodes} | {tensor.name for tensor in constants}
    _keep(model.graph.node, [node for node in model.graph.node if node.name not in removed])
    _rewire(model.graph.node, {PLANES: PIXELS})
    _keep(model.graph.initializer, [t for t in model.graph.initializer if t.name not in removed])
    _keep(model.graph.value_info, [v for v in model.graph.value_info if v.name not in removed])
    _set_input(model, front, core=True)
    return front


def attach(core: ModelProto, front: Front) -> None:
    """Insert `front` before a float or quantized core, in place; the input becomes uint8 [batch, H, W, 3].

    If the core quantizes its input to the pixels' own values (`Folded.overrides`), it reads them directly,
    without a conversion to float.
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
        raise ExportError("uint8 input requires a network with a fixed image size.")
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
