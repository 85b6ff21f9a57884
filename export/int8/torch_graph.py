"""Compute ONNX graphs in torch, with the operators of convolutional networks.

Shapes, axes and bounds are constants and given as numpy arrays; semantics are those of opset 18 and later.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import NotInTorchError

Attributes = Mapping[str, Any]


def _padded(x: Tensor, a: Attributes, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """Pad the input if padding is asymmetric; also return the remaining padding of each dimension."""
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotInTorchError(f"auto_pad {a['auto_pad'].decode()} cannot be computed in torch here")
    dims = x.dim() - 2
    pads = list(a.get("pads", [0] * 2 * dims))
    if pads[:dims] == pads[dims:]:
        return x, pads[:dims]
    sides = [side for i in reversed(range(dims)) for side in (pads[i], pads[i + dims])]
    return F.pad(x, sides, value=value), [0] * dims


def _conv(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    x, padding = _padded(x, a)
    dims = x.dim() - 2
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    strides, dilations = list(a.get("strides", [1] * dims)), list(a.get("dilations", [1] * dims))
    result: Tensor = convolve(x, w, b, strides, padding, dilations, a.get("group", 1))
    return result


def _gemm(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    x = x.mT if a.get("transA", 0) else x
    w = w.mT if a.get("transB", 0) else w
    y = a.get("alpha", 1.0) * (x @ w) if a.get("alpha", 1.0) != 1 else x @ w
    return y if b is None else y + a.get("beta", 1.0) * b


def _clip(_: Attributes, x: Tensor, least: Any = None, most: Any = None) -> Tensor:
    for bound, cut in ((least, torch.clamp_min), (most, torch.clamp_max)):
        x = x if bound is None else cut(x, float(bound.item()))
    return x


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    x, padding = _padded(x, a, float("-inf"))
    kernel, ceil_mode = list(a["kernel_shape"]), bool(a.get("ceil_mode", 0))
    strides, dilations = (list(a.get(key, [1] * len(kernel))) for key in ("strides", "dilations"))
    return F.max_pool2d(x, kernel, strides, padding, dilations, ceil_mode)


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    counted = bool(a.get("count_include_pad", 0))
    padded, padding = _padded(x, a)
    if padded is not x and not counted:
        raise NotInTorchError("an AveragePool with uneven padding cannot be computed in torch here")
    kernel = list(a["kernel_shape"])
    strides = list(a.get("strides", [1] * len(kernel)))
    return F.avg_pool2d(padded, kernel, strides, padding, bool(a.get("ceil_mode", 0)), counted)


def _reshape(a: Attributes, x: Tensor, shape: np.ndarray) -> Tensor:
    keeps = not a.get("allowzero", 0)
    return x.reshape([x.shape[i] if n == 0 and keeps else n for i, n in enumerate(shape.tolist())])


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    return x.reshape(int(np.prod(x.shape[: a.get("axis", 1)], dtype=np.int64)), -1)


def _pad(a: Attributes, x: Tensor, pads: np.ndarray, value: Any = None, axes: Any = None) -> Tensor:
    dims = x.dim()
    chosen = list(range(dims)) if axes is None else [int(axis) % dims for axis in axes]
    sides = [(0, 0)] * dims
    for i, axis in enumerate(chosen):
        sides[axis] = int(pads[i]), int(pads[i + len(chosen)])
    mode = {b"constant": "constant", b"reflect": "reflect", b"edge": "replicate"}[a.get("mode", b"constant")]
    flat = [side for pair in reversed(sides) for side in pair]
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if value is None else float(value))
    return F.pad(x, flat[: 2 * (dims - 2)], mode=mode)


def _reduce_mean(a: Attributes, x: Tensor, axes: Any = None) -> Tensor:
    over = a.get("axes") if axes is None else axes.tolist()
    return x.mean(dim=list(over) if over else None, keepdim=bool(a.get("keepdims", 1)))


def _unsqueeze(_: Attributes, x: Tensor, axes: np.ndarray) -> Tensor:
    dims = x.dim() + len(axes)  # axes count those of the result
    for axis in sorted(int(axis) % dims for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _split(a: Attributes, x: Tensor, sizes: Any = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    if sizes is None:
        return torch.chunk(x, a["num_outputs"], dim=axis)
    return torch.split(x, sizes.tolist(), dim=axis)


def _slice(_: Attributes, x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    index = [slice(None)] * x.dim()
    for i, start in enumerate(starts.tolist()):
        axis = i if axes is None else int(axes[i])
        step = 1 if steps is None else int(steps[i])
        if step < 1:
            raise NotInTorchError("a Slice that goes backwards cannot be computed in torch here")
        index[axis] = slice(start, int(ends[i]), step)
    return x[tuple(index)]


def _concat(a: Attributes, *parts: Any) -> Any:
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts, axis=a["axis"])
    return torch.cat(parts, dim=a["axis"])


def _instance_norm(a: Attributes, x: Tensor, w: Any, b: Any) -> Tensor:
    w, b = _number(w, x), _number(b, x)
    return F.instance_norm(x, weight=w, bias=b, eps=a.get("epsilon", 1e-5))


def _resize(a: Attributes, x: Tensor, _roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    """Upsample by whole factors; all roundings of coordinates then repeat pixels."""
    scales = np.array(sizes) / np.array(x.shape) if scales is None or not scales.size else scales
    factors = [int(scale) for scale in scales]
    if a.get("mode", b"nearest") != b"nearest" or any(factors != scales) or factors[:2] != [1, 1]:
        raise NotInTorchError("a Resize other than by whole factors cannot be computed in torch here")
    return x.repeat_interleave(factors[2], 2).repeat_interleave(factors[3], 3)


def _batch_norm(a: Attributes, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean.detach(), var.detach(), w, b, eps=a.get("epsilon", 1e-5))


def _number(x: Any, like: Any) -> Any:
    """Convert scalar constants to numbers and other constants to tensors."""
    if isinstance(x, np.ndarray):
        return x.item() if x.ndim == 0 else torch.from_numpy(np.ascontiguousarray(x)).to(like.device)
    return x


def _two(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(_: Attributes, x: Any, y: Any) -> Any:
        like = x if isinstance(x, Tensor) else y
        return operation(_number(x, like), _number(y, like))

    return apply


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _two(lambda x, y: x + y),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _two(lambda x, y: x / y),
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Erf": lambda _, x: torch.erf(x),
    "Flatten": _flatten,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda _, x: x.amax(dim=tuple(range(2, x.dim())), keepdim=True),
    "HardSigmoid": lambda a, x: torch.clamp(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda _, x: F.hardswish(x),
    "Identity": lambda _, x: x,
    "InstanceNormalization": _instance_norm,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "MatMul": _two(lambda x, y: x @ y),
    "MaxPool": _max_pool,
    "Mul": _two(lambda x, y: x * y),
    "PRelu": lambda _, x, slope: torch.where(x < 0, x * slope, x),
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": lambda _, x: F.relu(x),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda a, x: np.array(x.shape[a.get("start", 0) : a.get("end", x.dim())]),
    "Sigmoid": lambda _, x: torch.sigmoid(x),
    "Slice": _slice,
    "Softmax": lambda a, x: torch.softmax(x, dim=a.get("axis", -1)),
    "Softplus": lambda _, x: F.softplus(x),
    "Split": _split,
    "Squeeze": lambda _, x, axes=None: x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist())),
    "Sub": _two(lambda x, y: x - y),
    "Tanh": lambda _, x: torch.tanh(x),
    "Transpose": lambda a, x: x.permute(*a.get("perm", reversed(range(x.dim())))),
    "Unsqueeze": _unsqueeze,
}


Values = dict[str, Any]
"""Tensors by name: torch tensors, and integer constants as numpy arrays."""


@dataclass(frozen=True)
class Step:
    """A node, ready to be computed."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    finished: tuple[str, ...]
    """Tensors that no later step reads."""


class GraphNetwork(nn.Module):
    """A float ONNX graph with one input and one or several outputs.

    Its float initializers of at least one dimension are parameters. Raises NotInTorchError for operators that
    are not in `supported`.
    """

    supported = frozenset(OPERATORS)

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        self.input = graph.input[0].name
        self.outputs = tuple(output.name for output in graph.output)
        self.output = self.outputs[0]
        self.names: dict[str, str] = {}
        self.weights = nn.ParameterDict()
        self.constants: Values = {}
        for tensor in graph.initializer:
            self._hold(tensor)
        self.steps = tuple(self._steps(list(graph.node)))
        for step in self.steps:
            if step.op_type not in self.supported:
                raise NotInTorchError(
                    f"the graph has the operator {step.op_type} ({step.name}), which cannot be computed in "
                    "torch here"
                )

    def weight(self, name: str) -> Tensor:
        """Return a float initializer by its name in the graph."""
        weight: Tensor = self.weights[self.names[name]]
        return weight

    def forward(self, x: Tensor, wanted: Iterable[str] = ()) -> Values:
        """Return the graph's outputs and the tensors in `wanted`, by name, for inputs [B,3,H,W]."""
        kept = {*self.outputs, *wanted}
        values: Values = {self.input: x}
        for _ in self.compute_steps(values, kept):
            pass
        return {name: values[name] for name in kept}

    def compute_steps(self, values: Values, kept: Collection[str] = ()) -> Iterator[Step]:
        """Compute and yield each step; remove tensors that no later step reads, except those in `kept`."""
        for step in self.steps:
            self.compute(step, values)
            yield step
            for name in step.finished:
                if name not in kept:
                    values.pop(name, None)

    def evaluate(self, name: str, values: Values) -> Any:
        """Return a tensor by name, computed from those in `values`."""
        for step in self.steps if name not in values else ():
            if name in step.outputs:
                for read in step.inputs:
                    self.evaluate(read, values)
                self.compute(step, values)
        return values.get(name)

    def compute(self, step: Step, values: Values) -> None:
        """Add the outputs of a step to the values."""
        arguments = [self._value(name, values) for name in step.inputs]
        result = OPERATORS[step.op_type](step.attributes, *arguments)
        results = result if isinstance(result, tuple) else (result,)
        values.update(zip(step.outputs, results, strict=True))

    def _value(self, name: str, values: Values) -> Any:
        if not name:
            return None
        if name in values:
            return values[name]
        return self.weight(name) if name in self.names else self.constants[name]

    def _hold(self, tensor: TensorProto) -> None:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim:
            key = f"w{len(self.names)}"  # names in a graph have dots, parameters' cannot
            self.names[tensor.name] = key
            self.weights[key] = nn.Parameter(torch.from_numpy(value.copy()))
        else:
            self.constants[tensor.name] = value

    def _steps(self, nodes: list[onnx.NodeProto]) -> Iterable[Step]:
        last = {name: index for index, node in enumerate(nodes) for name in node.input}
        for index, node in enumerate(nodes):
            yield Step(
                node.name,
                node.op_type,
                tuple(node.input),
                tuple(node.output),
                {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
                tuple(name for name in dict.fromkeys(node.input) if last[name] == index),
            )


def with_weights(model: onnx.ModelProto, network: GraphNetwork) -> onnx.ModelProto:
    """Return a copy of the graph of `network` with the network's current weights."""
    return replace_initializers(model, {name: network.weight(name) for name in network.names})


def replace_initializers(model: onnx.ModelProto, values: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Return a copy of a graph with other values for some of its initializers, by name."""
    changed = copy.deepcopy(model)
    for tensor in changed.graph.initializer:
        if tensor.name in values:
            value = values[tensor.name].detach().cpu().contiguous().numpy()
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return changed
