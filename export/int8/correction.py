"""Cross-layer equalization, bias correction, and the sensitivity of parts of a network.

Cross-layer equalization (Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.1): ReLU(x/s)·s = ReLU(x) for
s > 0, so a channel's scale can be moved from the layer that writes it to the one that reads it. The paper
balances both layers' weights. Weights have a scale for each output channel here, so unequal channels affect
the map between the two, which has one range, and the input channels of the second layer. The scales balance
these two:

    s_i = √(a_i / r_i) for a dense reader,   s_i = a_i for a depthwise one, whose channels have a scale each

with a_i the largest |x_i| over the calibration images and r_i = max_o |W2_oi| / max_i |W2_oi|.

ReLU6 is not homogeneous: clip(x/s, 0, 6)·s = clip(x, 0, 6s). A channel is scaled only where x, before and
after, stays clear of 6 on the calibration images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from ..conversion.pixel_input import map_readers
from .fake_quantize import FakeQuantized
from .quantizer import WEIGHTED, Prepared, chunks
from .torch_graph import GraphNetwork, Values, replace_initializers

CLEAR = 0.8
"""Fraction of ReLU6's bound that the calibrated maximum of a scaled channel may reach."""

MOST = 1e3
"""Largest scale and inverse of the smallest: beyond it a channel is practically dead."""

TOLERANCE = 1e-4
"""Largest change of the output by rescaling, relative to the largest output."""

_HOMOGENEOUS = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity")


@dataclass(frozen=True)
class Pair:
    """A layer, the only layer that reads it, and the bound of the map between the two."""

    writer: str
    reader: str
    between: str
    """The writer's output, before its activation."""
    bound: float | None
    """Upper bound of the Clip between them; None without a Clip."""


@torch.no_grad()
def equalize(prepared: Prepared, images: np.ndarray) -> Prepared | None:
    """Return a graph that computes the same with equalized channels, to be calibrated again.

    None if there is no pair of layers, or if the output changes by more than `TOLERANCE` on the calibration
    images, float32 [n,3,H,W].
    """
    pairs = layer_pairs(prepared.model)
    if not pairs:
        return None
    before = GraphNetwork(prepared.model).eval()
    largest, expected = _largest(before, pairs, images)
    model = copy.deepcopy(prepared.model)
    weights = _Weights(model)
    for pair in pairs:
        writer, reader = weights.nodes[pair.writer], weights.nodes[pair.reader]
        s = _scales(largest[pair.between], weights.rows(reader), _groups(reader) > 1, pair.bound)
        weights.divide_outputs(writer, s)
        weights.multiply_inputs(reader, s)
    weights.write()
    after = GraphNetwork(model).eval()
    for chunk, outputs in zip(chunks([images]), expected, strict=True):
        values = after(torch.from_numpy(chunk))
        for name, output in zip(after.outputs, outputs, strict=True):
            if not (values[name] - output).abs().max() <= TOLERANCE * output.abs().max():
                return None
    return replace(prepared, model=model)


def layer_pairs(model: onnx.ModelProto) -> list[Pair]:
    """Return convolutions read by one convolution or Gemm only, with ReLU, ReLU6 and pooling between them."""
    constants = {t.name: t for t in model.graph.initializer}
    readers = map_readers(model.graph)
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
    """The layers' weights in float64, so that repeated scaling does not add rounding errors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = {node.name: node for node in model.graph.node}
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.changed: dict[str, np.ndarray] = {}

    def array(self, name: str) -> np.ndarray:
        if name not in self.changed:
            self.changed[name] = numpy_helper.to_array(self.tensors[name]).astype(np.float64)
        return self.changed[name]

    def rows(self, node: onnx.NodeProto) -> np.ndarray:
        """Return the weight as [O,C,…]."""
        w = self.array(node.input[1])
        return w if node.op_type == "Conv" or _is_transposed(node) else w.T

    def divide_outputs(self, node: onnx.NodeProto, s: np.ndarray) -> None:
        w = self.array(node.input[1])
        self.changed[node.input[1]] = w / s.reshape(-1, *[1] * (w.ndim - 1))
        if len(node.input) > 2 and node.input[2]:
            self.changed[node.input[2]] = self.array(node.input[2]) / s

    def multiply_inputs(self, node: onnx.NodeProto, s: np.ndarray) -> None:
        w = self.array(node.input[1])
        if node.op_type == "Gemm":
            self.changed[node.input[1]] = w * (s if _is_transposed(node) else s[:, None])
        else:
            channels = (1, -1) if _groups(node) == 1 else (-1, 1)
            self.changed[node.input[1]] = w * s.reshape(*channels, *[1] * (w.ndim - 2))

    def write(self) -> None:
        for name, value in self.changed.items():
            self.tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))


def _scales(a: np.ndarray, w: np.ndarray, depthwise: bool, bound: float | None) -> np.ndarray:
    """Return s, float64 [C], from a map's largest values a [C] and the reader's weights [O,C,…]."""
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
    # Channels that ReLU6 clips are not scaled; the others are brought near them.
    reference = bound if depthwise else np.sqrt(bound / max(middle, 1e-30))
    free = alive & (a < CLEAR * bound)
    scales = (s / reference).clip(1 / MOST, MOST)
    return np.where(free, np.maximum(scales, a / (CLEAR * bound)), 1.0)


def _largest(
    network: GraphNetwork, pairs: list[Pair], images: np.ndarray
) -> tuple[dict[str, np.ndarray], list[list[Tensor]]]:
    """Return the largest value in each channel of each pair's map, [C], and the outputs of each chunk."""
    wanted = [pair.between for pair in pairs]
    bounded = {pair.between: pair.bound is not None for pair in pairs}
    largest: dict[str, np.ndarray] = {}
    outputs = []
    for chunk in chunks([images]):
        values = network(torch.from_numpy(chunk), wanted=wanted)
        outputs.append([values[name] for name in network.outputs])
        for name in wanted:
            # ReLU6 clips values below 0, so only the maximum counts.
            x = values[name] if bounded[name] else values[name].abs()
            top = x.amax(dim=[d for d in range(x.dim()) if d != 1]).double().numpy()
            largest[name] = np.maximum(largest[name], top) if name in largest else top
    return largest, outputs


def _owns(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], readers: dict[str, list[onnx.NodeProto]]
) -> bool:
    """Return True if weights and bias are constants that no other node uses."""
    return all(name in constants and len(readers[name]) == 1 for name in node.input[1:] if name)


def _reads(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], channels: int) -> bool:
    dims = constants[node.input[1]].dims
    if node.op_type == "Gemm":
        return bool(dims[1 if _is_transposed(node) else 0] == channels) and not any(
            a.name == "transA" and a.i for a in node.attribute
        )
    groups = _groups(node)
    return groups == 1 or bool(groups == channels == dims[0])


def _groups(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)


def _is_transposed(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and bool(a.i) for a in node.attribute)


def _number(constants: dict[str, onnx.TensorProto], name: str) -> float | None:
    return float(numpy_helper.to_array(constants[name]).item()) if name in constants else None


def _flattens(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], channels: int) -> bool:
    """Return True if a node turns [B,C,1,1] into [B,C]."""
    if node.op_type == "Flatten":
        return all(a.i == 1 for a in node.attribute if a.name == "axis")
    shape = constants.get(node.input[1])
    return shape is not None and numpy_helper.to_array(shape).tolist()[1:] in ([channels], [-1])


MAX_ACTIVATION_BYTES = 1_000_000_000
"""Each layer is computed for all images before the next one."""


@torch.no_grad()
def correct_biases(prepared: Prepared, network: FakeQuantized, images: np.ndarray) -> Prepared:
    """Return the float graph with biases corrected for the mean error of each layer, for the same ranges.

    Layers that share a bias are not corrected. `network` is the graph's quantized form. As many calibration
    images, float32 [n,3,H,W], are used as fit in `MAX_ACTIVATION_BYTES`.
    """
    exact = GraphNetwork(prepared.model).eval()
    used = images[: _max_images(exact, images)]
    means = _means(exact, used)
    biases = _own_biases(prepared.model)
    corrected: dict[str, Tensor] = {}
    values: Values = {network.input: torch.from_numpy(used)}
    for step in network.compute_steps(values):
        if step.name in means and step.name in biases:
            (output,) = step.outputs
            error = _channels(values[output]) - means[step.name]
            bias = biases[step.name]
            corrected[bias] = exact.weight(bias) - error
            values[output] -= error.view(1, -1, *[1] * (values[output].dim() - 2))
    return replace(prepared, model=replace_initializers(prepared.model, corrected))


def with_all_biases(prepared: Prepared) -> Prepared:
    """Add biases of zeros to convolutions and Gemms without one, so that they can be corrected."""
    model = copy.deepcopy(prepared.model)
    weights = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) > 2 or node.input[1] not in weights:
            continue
        channels_last = node.op_type == "Gemm" and not _is_transposed(node)
        outputs = weights[node.input[1]].dims[1 if channels_last else 0]
        zeros = numpy_helper.from_array(np.zeros(outputs, np.float32), f"{node.name}_bias")
        model.graph.initializer.append(zeros)
        node.input.append(zeros.name)
    return replace(prepared, model=model)


def _own_biases(model: onnx.ModelProto) -> dict[str, str]:
    """Return the names of biases that only one node uses, by the name of the node."""
    constants = {tensor.name for tensor in model.graph.initializer if tensor.dims}
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
    """Return the mean of each layer's output in each channel, [C], by the layer's name."""
    sums: dict[str, Tensor] = {}
    layers = [step for step in network.steps if step.op_type in WEIGHTED]
    for chunk in chunks([images]):
        values = network(torch.from_numpy(chunk), wanted=[step.outputs[0] for step in layers])
        for step in layers:
            mean = _channels(values[step.outputs[0]]) * len(chunk)
            sums[step.name] = sums[step.name] + mean if step.name in sums else mean
    return {name: total / len(images) for name, total in sums.items()}


def _channels(x: Tensor) -> Tensor:
    return x.double().mean(dim=[d for d in range(x.dim()) if d != 1]).float()


def _max_images(network: GraphNetwork, images: np.ndarray) -> int:
    """Return the number of images whose activations fit in `MAX_ACTIVATION_BYTES`, at least one."""
    values: Values = {network.input: torch.from_numpy(images[:1])}
    most = 0
    for _ in network.compute_steps(values):
        held = {v.data_ptr(): v.nbytes for v in values.values() if isinstance(v, Tensor)}
        most = max(most, sum(held.values()))
    return max(1, MAX_ACTIVATION_BYTES // (2 * most))  # rounding makes a copy of what it rounds


@dataclass(frozen=True)
class Source:
    """One rounding and its effect on the logits if everything else is float."""

    tensor: str
    """Name of an activation or weight in the float graph."""
    nodes: tuple[str, ...]
    """Nodes to keep float so that it is not rounded."""
    sqnr: float
    """Signal to quantization noise of the outputs, decibels."""


@torch.no_grad()
def measure_sensitivity(prepared: Prepared, network: FakeQuantized, images: np.ndarray) -> list[Source]:
    """Return all roundings of the quantized graph, the worst first; equal ones in the order of the graph.

    `network` is the quantized form of the prepared graph, `images` are float32 [n,3,H,W].
    """
    x = torch.from_numpy(images)
    with network.rounding(frozenset()):
        values = network(x)
    exact = [values[name].double() for name in network.outputs]
    sources = []
    for tensor in network.sources():
        with network.rounding(frozenset({tensor})):
            values = network(x)
        # Of several outputs, each counts by its own power.
        noise = 0.0
        for name, output in zip(network.outputs, exact, strict=True):
            power = float(output.square().mean())
            noise += float((values[name].double() - output).square().mean()) / power if power else 0.0
        sqnr = -10 * np.log10(noise / len(exact)) if noise else float("inf")
        sources.append(Source(tensor, _nodes(prepared, tensor), round(float(sqnr), 3)))
    return sorted(sources, key=lambda source: source.sqnr)


def _nodes(prepared: Prepared, tensor: str) -> tuple[str, ...]:
    """Return producers and consumers of a tensor.

    Includes the producer of the input of a ReLU or Clip, which would be rounded in its place.
    """
    nodes = prepared.model.graph.node
    makers = {name: node for node in nodes for name in node.output}
    around = {node.name for node in nodes if tensor in (*node.input, *node.output)}
    maker = makers.get(tensor)
    while maker is not None and maker.op_type in ("Relu", "Clip"):
        maker = makers.get(maker.input[0])
        around |= set() if maker is None else {maker.name}
    return tuple(node.name for node in nodes if node.name in around)
