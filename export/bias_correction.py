"""Bias correction: the mean error that quantization makes in each layer's output, folded into its bias.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019,
arXiv 1906.04721, section 4.2, in its empirical form (appendix D): layer by layer, each one's error measured
with all the layers before it quantized and corrected.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from .graph_network import GraphNetwork, Values
from .int8.fake_quantize import FakeQuantized
from .int8.quantizer import Prepared
from .scope import WEIGHTED

BUDGET = 1_000_000_000
"""Bytes of activations held at once: with all images a layer is computed before the next one begins."""


@torch.no_grad()
def bias_corrected(prepared: Prepared, network: FakeQuantized, images: np.ndarray) -> Prepared:
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
