"""Cross-layer equalisation: channels of one map brought to a like range by scales that two layers take up.

Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.1: ReLU(x/s)·s = ReLU(x) for s > 0, so a channel's scale
can be moved from the layer that writes it to the one that reads it. There both layers' weights are balanced;
weights have a scale for each output channel here, so what suffers from unequal channels is the map between
the two, which has one range, and the input channels of the second layer. The scales balance these two:

    s_i = √(a_i / r_i) for a dense reader,   s_i = a_i for a depthwise one, whose channels have a scale each

with a_i the largest |x_i| over the calibration images and r_i = max_o |W2_oi| / max_i |W2_oi|.

ReLU6 is not homogeneous: clip(x/s, 0, 6)·s = clip(x, 0, 6s). A channel is scaled only where x, before and
after, stays clear of 6 on the calibration images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from .fake_quantize import FakeQuantized
from .quantizer import WEIGHTED, Prepared
from .torch_graph import GraphNetwork, Values

CLEAR = 0.8
"""Of ReLU6's bound: what a scaled channel's calibrated maximum may reach."""

MOST = 1e3
"""Largest scale, and 1 over the least one: beyond, a channel is as good as dead."""

TOLERANCE = 1e-4
"""Largest difference of the output that rescaling may make, by the largest output."""

_HOMOGENEOUS = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity")


@dataclass(frozen=True)
class Pair:
    """A layer, the one that reads it, and what bounds the map between the two."""

    writer: str
    reader: str
    between: str
    """The writer's output, before its activation."""
    bound: float | None
    """Where ReLU6 or its like cuts; None where nothing does."""


@torch.no_grad()
def equalize(prepared: Prepared, images: np.ndarray) -> Prepared | None:
    """The same function with equalised channels, to be calibrated anew; None where no pair of layers can be.

    Args:
        images: calibration images, float32 [n,3,S,S].

    None, too, where the rescaled graph does not answer like the graph within `TOLERANCE`.
    """
    pairs = layer_pairs(prepared.model)
    if not pairs:
        return None
    before = GraphNetwork(prepared.model).eval()
    largest, expected = _largest(before, pairs, images)
    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    weights = _Weights(model)
    for pair in pairs:
        writer, reader = weights.nodes[pair.writer], weights.nodes[pair.reader]
        s = _scales(largest[pair.between], weights.rows(reader), _groups(reader) > 1, pair.bound)
        weights.divide_outputs(writer, s)
        weights.multiply_inputs(reader, s)
    weights.write()
    found = GraphNetwork(model).eval()
    for chunk, answers in zip(_chunks(images), expected, strict=True):
        difference = (found(torch.from_numpy(chunk))[found.output] - answers).abs().max()
        if not difference <= TOLERANCE * answers.abs().max():
            return None
    return replace(prepared, model=model)


def layer_pairs(model: onnx.ModelProto) -> list[Pair]:
    """Convolutions whose output is read by one convolution or Gemm alone, through nothing but ReLU, ReLU6 and
    pooling; in the order of the graph.
    """
    constants = {t.name: t for t in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in model.graph.output}
    pairs = []
    for node in model.graph.node:
        if node.op_type != "Conv" or not _owns(node, constants, readers):
            continue
        name, bound, able = node.output[0], None, True
        while able and name not in outputs and len(readers.get(name, ())) == 1:
            (reader,) = readers[name]
            channels = constants[node.input[1]].dims[0]
            if reader.op_type in ("Conv", "Gemm") and reader.input[0] == name:
                if _owns(reader, constants, readers) and _reads(reader, constants, channels):
                    pairs.append(Pair(node.name, reader.name, node.output[0], bound))
                break
            if reader.op_type == "Clip":
                limits = [_number(constants, n) for n in reader.input[1:3]]
                able = len(limits) == 2 and limits[0] == 0 and limits[1] is not None and bound is None
                bound = limits[1] if able else None
            elif reader.op_type in ("Reshape", "Flatten"):
                able = _flattens(reader, constants, channels)
            else:
                able = reader.op_type in _HOMOGENEOUS
            name = reader.output[0]
    return pairs


class _Weights:
    """The layers' weights as float64, so that scales upon scales leave no trace of rounding."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = {node.name: node for node in model.graph.node}
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.changed: dict[str, np.ndarray] = {}

    def array(self, name: str) -> np.ndarray:
        if name not in self.changed:
            self.changed[name] = numpy_helper.to_array(self.tensors[name]).astype(np.float64)
        return self.changed[name]

    def rows(self, node: onnx.NodeProto) -> np.ndarray:
        """[O,C,…]."""
        w = self.array(node.input[1])
        return w if node.op_type == "Conv" or _turned(node) else w.T

    def divide_outputs(self, node: onnx.NodeProto, s: np.ndarray) -> None:
        w = self.array(node.input[1])
        self.changed[node.input[1]] = w / s.reshape(-1, *[1] * (w.ndim - 1))
        if len(node.input) > 2 and node.input[2]:
            self.changed[node.input[2]] = self.array(node.input[2]) / s

    def multiply_inputs(self, node: onnx.NodeProto, s: np.ndarray) -> None:
        w = self.array(node.input[1])
        if node.op_type == "Gemm":
            self.changed[node.input[1]] = w * (s if _turned(node) else s[:, None])
        elif _groups(node) == 1:
            self.changed[node.input[1]] = w * s.reshape(1, -1, *[1] * (w.ndim - 2))
        else:
            self.changed[node.input[1]] = w * s.reshape(-1, *[1] * (w.ndim - 1))

    def write(self) -> None:
        for name, value in self.changed.items():
            self.tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))


def _scales(a: np.ndarray, w: np.ndarray, depthwise: bool, bound: float | None) -> np.ndarray:
    """s, float64 [C], for a map's largest values a [C] and the reader's weights [O,C,…]."""
    if depthwise:
        s, middle = a, float(np.median(a))
    else:
        rows = np.abs(w).reshape(len(w), w.shape[1], -1).max(axis=2)  # [O,C]
        r = (rows / np.maximum(rows.max(axis=1, keepdims=True), 1e-30)).max(axis=0)
        s = np.sqrt(np.maximum(a, 0) / np.maximum(r, 1e-30))
        middle = float(np.median(r))
    alive = (a > 0) & np.isfinite(s) & (s > 0)
    if bound is None:
        # The middle channel stays as it is: only ratios matter.
        reference = float(np.median(s[alive])) if alive.any() else 1.0
        return np.where(alive, s / reference, 1.0).clip(1 / MOST, MOST)
    # Those that ReLU6 cuts stay as they are, and the others come near them.
    reference = bound if depthwise else np.sqrt(bound / max(middle, 1e-30))
    free = alive & (a < CLEAR * bound)
    wished = (s / reference).clip(1 / MOST, MOST)
    return np.where(free, np.maximum(wished, a / (CLEAR * bound)), 1.0)


def _largest(
    network: GraphNetwork, pairs: list[Pair], images: np.ndarray
) -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
    """Of each pair's map the largest value in each channel, [C], and the answers, chunk by chunk."""
    wanted = [pair.between for pair in pairs]
    bounded = {pair.between: pair.bound is not None for pair in pairs}
    largest: dict[str, np.ndarray] = {}
    answers = []
    for chunk in _chunks(images):
        found = network(torch.from_numpy(chunk), wanted=wanted)
        answers.append(found[network.output])
        for name in wanted:
            # Of what ReLU6 cuts below 0 the upper end alone counts.
            x = found[name] if bounded[name] else found[name].abs()
            top = x.amax(dim=[d for d in range(x.dim()) if d != 1]).double().numpy()
            largest[name] = np.maximum(largest[name], top) if name in largest else top
    return largest, answers


def _chunks(images: np.ndarray) -> list[np.ndarray]:
    return np.array_split(images, max(1, len(images) // 8))


def _owns(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], readers: dict[str, list[onnx.NodeProto]]
) -> bool:
    """Whether its weights and bias are constants that no other node uses."""
    return all(name in constants and len(readers[name]) == 1 for name in node.input[1:] if name)


def _reads(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], channels: int) -> bool:
    dims = constants[node.input[1]].dims
    if node.op_type == "Gemm":
        return bool(dims[1 if _turned(node) else 0] == channels) and not any(
            a.name == "transA" and a.i for a in node.attribute
        )
    groups = _groups(node)
    return groups == 1 or bool(groups == channels == dims[0])


def _groups(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)


def _turned(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and bool(a.i) for a in node.attribute)


def _number(constants: dict[str, onnx.TensorProto], name: str) -> float | None:
    return float(numpy_helper.to_array(constants[name])) if name in constants else None


def _flattens(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], channels: int) -> bool:
    """Whether [B,C,1,1] becomes [B,C]."""
    if node.op_type == "Flatten":
        return all(a.i == 1 for a in node.attribute if a.name == "axis")
    shape = constants.get(node.input[1])
    return shape is not None and numpy_helper.to_array(shape).tolist()[1:] in ([channels], [-1])


BUDGET = 1_000_000_000
"""Bytes of activations held at once: with all images a layer is computed before the next one begins."""


@torch.no_grad()
def correct_biases(prepared: Prepared, network: FakeQuantized, images: np.ndarray) -> Prepared:
    """The float graph with corrected biases, to be quantized by the same ranges.

    Args:
        network: the graph's quantized form; its weights are the graph's.
        images: calibration images, float32 [n,3,S,S]; as many are used as the budget has room for.

    A layer whose bias is no constant of its own keeps it.
    """
    exact = GraphNetwork(prepared.model).eval()
    used = images[: _room(exact, images)]
    means = _means(exact, used)
    biases = _own_biases(prepared.model)
    corrected = {}
    values: Values = {network.input: torch.from_numpy(used)}
    for step in network.steps:
        network.compute(step, values)
        if step.name in means and step.name in biases:
            (output,) = step.outputs
            error = _channels(values[output]) - means[step.name]
            corrected[biases[step.name]] = error
            values[output] -= error.view(1, -1, *[1] * (values[output].dim() - 2))
        for name in step.finished:
            values.pop(name, None)
    return replace(prepared, model=_with_biases(prepared.model, corrected))


def with_all_biases(prepared: Prepared) -> Prepared:
    """Give each convolution and Gemm without a bias one of zeros, so that it can be corrected."""
    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    weights = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) > 2 or node.input[1] not in weights:
            continue
        turned = node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
        outputs = weights[node.input[1]].dims[1 if turned else 0]
        zeros = numpy_helper.from_array(np.zeros(outputs, np.float32), f"{node.name}_bias")
        model.graph.initializer.append(zeros)
        node.input.append(zeros.name)
    return replace(prepared, model=model)


def _own_biases(model: onnx.ModelProto) -> dict[str, str]:
    """The bias's name, by that of its node, where no other node uses it."""
    constants = {tensor.name for tensor in model.graph.initializer}
    uses = [name for node in model.graph.node for name in node.input]
    return {
        node.name: node.input[2]
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
        and len(node.input) > 2
        and node.input[2] in constants
        and uses.count(node.input[2]) == 1
        and all(a.f == 1 for a in node.attribute if a.name == "beta")
    }


def _means(network: GraphNetwork, images: np.ndarray) -> dict[str, Tensor]:
    """The mean of each layer's output in each channel, [C], by the layer's name."""
    sums: dict[str, Tensor] = {}
    layers = [step for step in network.steps if step.op_type in WEIGHTED]
    for chunk in np.array_split(images, max(1, len(images) // 8)):
        found = network(torch.from_numpy(chunk), wanted=[step.outputs[0] for step in layers])
        for step in layers:
            mean = _channels(found[step.outputs[0]]) * len(chunk)
            sums[step.name] = sums[step.name] + mean if step.name in sums else mean
    return {name: total / len(images) for name, total in sums.items()}


def _channels(x: Tensor) -> Tensor:
    return x.double().mean(dim=[d for d in range(x.dim()) if d != 1]).float()


def _room(network: GraphNetwork, images: np.ndarray) -> int:
    """How many images' activations the budget holds, at least one."""
    values: Values = {network.input: torch.from_numpy(images[:1])}
    most = 0
    for step in network.steps:
        network.compute(step, values)
        held = {v.data_ptr(): v.nbytes for v in values.values() if isinstance(v, Tensor)}
        most = max(most, sum(held.values()))
        for name in step.finished:
            values.pop(name, None)
    return max(1, BUDGET // (2 * most))  # rounding makes a copy of what it rounds


def _with_biases(model: onnx.ModelProto, errors: dict[str, Tensor]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in errors:
            value = numpy_helper.to_array(tensor) - errors[tensor.name].numpy()
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    return changed


@dataclass(frozen=True)
class Source:
    """One rounding and what it does to the logits when all else is float."""

    tensor: str
    """An activation or a weight, by its name in the float graph."""
    nodes: tuple[str, ...]
    """Those to keep float so that it is not rounded."""
    sqnr: float
    """Signal to quantization noise of the logits, decibels."""


@torch.no_grad()
def measure_sensitivity(prepared: Prepared, network: FakeQuantized, images: np.ndarray) -> list[Source]:
    """Every rounding of the quantized graph, the worst first; those alike in the order of the graph.

    Args:
        network: the quantized form of the prepared graph.
        images: float32 [n,3,S,S]; the more, the truer and the slower.
    """
    x = torch.from_numpy(images)
    with network.rounding(frozenset()):
        exact = network(x)[network.output].double()
    power = float(exact.square().sum())
    found = []
    for tensor in network.sources():
        with network.rounding(frozenset({tensor})):
            noise = float((network(x)[network.output].double() - exact).square().sum())
        sqnr = 10 * np.log10(power / noise) if noise and power else float("inf")
        found.append(Source(tensor, _nodes(prepared, tensor), round(float(sqnr), 3)))
    return sorted(found, key=lambda source: source.sqnr)


def _nodes(prepared: Prepared, tensor: str) -> tuple[str, ...]:
    """The makers and readers of a tensor; beyond a ReLU or Clip what it cuts, which would be rounded in its
    place.
    """
    nodes = prepared.model.graph.node
    makers = {name: node for node in nodes for name in node.output}
    around = {node.name for node in nodes if tensor in (*node.input, *node.output)}
    maker = makers.get(tensor)
    while maker is not None and maker.op_type in ("Relu", "Clip"):
        maker = makers.get(maker.input[0])
        around |= set() if maker is None else {maker.name}
    return tuple(node.name for node in nodes if node.name in around)
