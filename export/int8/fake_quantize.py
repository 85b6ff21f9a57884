"""Fake quantization: a float graph that computes like its int8 form and whose ranges can be learned.

Placement and types are those of the QDQ graph that ONNX Runtime's quantizer makes, as in the shipped file: u8
(or s8) after the activation, s8 per channel for weights, and biases in 32 bits, which count as float.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from .quantizer import Overrides, Prepared
from .targets import Target
from .torch_graph import OPERATORS, GraphNetwork, Step, Values

_QUANTIZED = "_quantized"
"""Suffix that ONNX Runtime's quantizer appends to the names of weights and biases."""

_BEFORE_OUTPUT = "_QuantizeLinear_Input"
"""Suffix for the graph's output before it is rounded."""


class _FakeQuantize(torch.autograd.Function):
    """Round to the levels of a range, the gradient of rounding taken as 1.

    Ranges learn as in LSQ+ (Bhalgat et al., CVPR workshops 2020, arXiv 2004.09576, eq. 3 to 5): inside of the
    range by the rounding error, outside by all of the gradient, scaled by 1/√(numel·n).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        logs: Tensor,  # noqa: ARG004  (what learns; scale and zero point come from it)
        scale: Tensor,
        zero: Tensor,
        qmin: int,
        qmax: int,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.levels = qmin, qmax
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, scale, zero = ctx.saved_tensors
        qmin, qmax = ctx.levels
        steps = x / scale
        rounded = steps.round()
        level = rounded + zero
        below, above = level < qmin, level > qmax
        inside = gradient.masked_fill(below | above, 0.0)
        of_scale = ((rounded - steps) * inside).sum() / (qmax - qmin)
        of_ends = torch.stack([(gradient * below).sum() - of_scale, (gradient * above).sum() + of_scale])
        ends = torch.stack([(qmin - zero) * scale, (qmax - zero) * scale])
        # Sums over a whole map are scaled to the size of a weight's gradient.
        factor = 1.0 / math.sqrt(x.numel() * (qmax - qmin))
        return inside, of_ends * ends * factor, None, None, None, None


class Range(nn.Module):
    """The range of one activation.

    The logarithms of both ends are learned, so that steps are relative; an end of 0, as after ReLU, stays 0.
    """

    def __init__(self, scale: float, zero_point: int, qmin: int, qmax: int) -> None:
        super().__init__()
        self.qmin, self.qmax = qmin, qmax
        self.scale, self.zero_point = scale, zero_point
        self.logs = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.affine()
        result: Tensor = _FakeQuantize.apply(x, self.logs, scale, zero, self.qmin, self.qmax)
        return result

    @torch.no_grad()
    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale, float32, and zero point, int32; the initial ones exactly if nothing was learned."""
        low, high = self.logs.exp()
        below, above = self.zero_point - self.qmin, self.qmax - self.zero_point
        stretched = (below * low + above * high) / (self.qmax - self.qmin)
        zero = torch.round(self.qmin + below * low / stretched).clamp(self.qmin, self.qmax)
        return self.scale * stretched, zero.to(torch.int32)

    def learned(self) -> dict[str, Any]:
        """Return scale and zero point for the quantizer."""
        scale, zero = self.affine()
        kind = np.uint8 if self.qmin == 0 else np.int8
        return {"scale": np.array(scale.item(), np.float32), "zero_point": np.array(int(zero), kind)}


class FakeQuantized(GraphNetwork):
    """A prepared graph that computes like `qdq`, its quantized form, with float weights.

    `only` limits rounding to the named activations and weights; None for all of them.
    """

    supported = GraphNetwork.supported | {"QuantizeLinear", "DequantizeLinear"}

    def __init__(self, prepared: Prepared, qdq: onnx.ModelProto, types: Target) -> None:
        self.weight_levels = 64 if types.reduce_range else 127
        self.floats = {t.name: t for t in prepared.model.graph.initializer}
        self.integers = {t.name: numpy_helper.to_array(t) for t in qdq.graph.initializer}
        super().__init__(qdq)
        self.only: frozenset[str] | None = None
        self.folded = _folded(prepared.model, qdq)
        self.ranges = nn.ModuleDict()
        self.range_of: dict[str, str] = {}
        self.axes: dict[str, int] = {}
        keys: dict[str, str] = {}
        for step in self.steps:
            if step.op_type == "QuantizeLinear":
                # Tensors that only move values share one scale.
                _, scale, zero = step.inputs
                if scale not in keys:
                    keys[scale] = f"r{len(keys)}"
                    info = np.iinfo(self.integers[zero].dtype)
                    affine = float(self.integers[scale]), int(self.integers[zero])
                    self.ranges[keys[scale]] = Range(*affine, int(info.min), int(info.max))
                self.range_of[self._tensor(step)] = keys[scale]
            elif self._is_weight(step):
                self.axes[self._float_name(step)] = int(step.attributes.get("axis", 1))

    def sources(self) -> list[str]:
        """Return the names of rounded activations and weights in the order of the graph."""
        rounded = [step for step in self.steps if self._is_weight(step) and self._rounds(step)]
        names = dict.fromkeys([*self.range_of, *map(self._float_name, rounded)])
        order = {name: i for i, step in enumerate(self.steps) for name in (*step.outputs, *step.inputs)}
        return sorted(names, key=lambda name: order.get(name, order.get(name + _QUANTIZED, 0)))

    @contextmanager
    def rounding(self, only: frozenset[str] | None) -> Iterator[None]:
        """Round only these tensors temporarily."""
        before, self.only = self.only, only
        try:
            yield
        finally:
            self.only = before

    @torch.no_grad()
    def overrides(self) -> Overrides:
        """Return the current ranges for `quantize`."""
        return {name: cast(Range, self.ranges[key]).learned() for name, key in self.range_of.items()}

    def compute(self, step: Step, values: Values) -> None:
        if step.op_type == "QuantizeLinear":
            name, x = self._tensor(step), self._value(step.inputs[0], values)
            if self.only is None or name in self.only:
                values[step.outputs[0]] = self.ranges[self.range_of[name]](x)
            else:
                values[step.outputs[0]] = self._activated(name, x)
        elif step.op_type == "DequantizeLinear":
            (given, *_), (output,) = step.inputs, step.outputs
            values[output] = values[given] if given in values else self._rounded_weight(step)
        else:
            super().compute(step, values)

    def _activated(self, name: str, x: Tensor) -> Tensor:
        """Apply the activation that the quantizer folded into the range of this tensor."""
        node = self.folded.get(name)
        if node is None:
            return x
        bounds = [numpy_helper.to_array(self.floats[bound]) if bound else None for bound in node.input[1:]]
        result: Tensor = OPERATORS[node.op_type]({}, x, *bounds)
        return result

    def _rounded_weight(self, step: Step) -> Any:
        name = self._float_name(step)
        if name not in self.names:
            return self._constant(step)
        weight = self.weight(name)
        if not self._rounds(step) or (self.only is not None and name not in self.only):
            return weight
        axis = self.axes[name] % weight.dim()
        per_channel = self.integers[step.inputs[1]].ndim > 0
        dims = [d for d in range(weight.dim()) if d != axis or not per_channel]
        largest = weight.detach().abs().amax(dim=dims)
        # A channel of zeros, as in the last layer of a new ResNet block, has scale 0.
        scale = (largest / self.weight_levels).clamp(min=torch.finfo(torch.float32).tiny * 2**20)
        levels = -self.weight_levels, self.weight_levels
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        if not per_channel:
            return torch.fake_quantize_per_tensor_affine(weight, scale, zeros, *levels)
        return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, *levels)

    def _constant(self, step: Step) -> Any:
        q, scale, *zero = (self.integers[name] for name in step.inputs)
        value = (q.astype(np.float32) - (zero[0].astype(np.float32) if zero else 0)) * scale
        value = value.astype(np.float32)
        # The quantizer copies biases that several layers share; such copies are not learned.
        return torch.from_numpy(value).to(next(self.parameters()).device) if value.ndim else value

    def _rounds(self, step: Step) -> bool:
        """Return True for weights of 8 bits, False for biases of 32."""
        return self.integers[step.inputs[0]].dtype in (np.int8, np.uint8)

    def _is_weight(self, step: Step) -> bool:
        return step.op_type == "DequantizeLinear" and step.inputs[0] in self.integers

    def _tensor(self, step: Step) -> str:
        """Return the name in the float graph of the tensor that a QuantizeLinear rounds."""
        return step.inputs[0].removesuffix(_BEFORE_OUTPUT)

    def _float_name(self, step: Step) -> str:
        return step.inputs[0].removesuffix(_QUANTIZED)

    def _hold(self, tensor: onnx.TensorProto) -> None:
        # The float form of a quantized weight is learned; scales and zero points are read when needed.
        weight = self.floats.get(tensor.name.removesuffix(_QUANTIZED))
        if weight is not None:
            super()._hold(weight)


def _folded(model: onnx.ModelProto, qdq: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the activations (ReLU, Clip) that the quantizer replaced by a range, by their output."""
    remaining = {node.name for node in qdq.graph.node}
    removed = [node for node in model.graph.node if node.name not in remaining]
    return {node.output[0]: node for node in removed if node.op_type in ("Relu", "Clip")}
