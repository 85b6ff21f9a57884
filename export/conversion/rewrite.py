"""Rewrite a float ONNX graph into operators that ONNX Runtime runs in integers.

Patterns are matched and replaced by onnxscript's rewriter. Padding the channels of depthwise convolutions
changes many layers together and is done here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import OrValue, RewriteRule, RewriteRuleSet
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)


def rewrite(model: onnx.ModelProto, rules: Collection[str] | None = None) -> list[str]:
    """Apply `rules`, or all of RULES, to `model` in place and return the names of those that changed it.

    The graph computes the same up to the rounding of float32. Constant nodes become initializers. Raises
    ValueError if a rule does not exist.
    """
    unknown = sorted(set(rules or ()) - set(RULES))
    if unknown:
        raise ValueError(f"unknown rewrite rule {unknown[0]!r}. Choose from {', '.join(RULES)}.")
    graph = ir.from_proto(model)
    LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(graph)
    applied = [name for name, rule in RULES.items() if (rules is None or name in rules) and rule(graph)]
    RemoveUnusedNodesPass()(graph)
    model.CopyFrom(ir.to_proto(graph))
    return applied


# onnxscript passes values to the callbacks of a rule by the names in its pattern. They are typed as Any: the
# pattern guarantees what the types leave open, such as that a value has a producer.


def _constant(value: Any) -> np.ndarray | None:
    """Return the array of an initializer that no graph input overrides, None for any other value."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    array: np.ndarray = value.const_value.numpy()
    return array


def _array(value: Any) -> np.ndarray:
    array = _constant(value)
    assert array is not None
    return array


def _unused_name(graph: ir.Graph, name: str) -> str:
    taken = {*graph.initializers, *(output.name for node in graph for output in node.outputs)}
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def drop_no_ops(model: ir.Model) -> bool:
    """Remove Identity, and Dropout in inference mode whose mask is not read, except at the graph's outputs.

    onnxscript's rules for Dropout match the attributes that it had before opset 12, and onnx_ir's pass for
    Identity fails in a branch of an If that returns a value from outside.
    """
    dropped = False
    for node in model.graph:
        data, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type not in ("Identity", "Dropout") or data is None or output.is_graph_output():
            continue
        mode = node.inputs[2] if len(node.inputs) > 2 else None
        trains = mode is not None and np.any(_constant(mode) != 0)
        if trains or any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:]):
            continue
        output.replace_all_uses_with(data)
        model.graph.remove(node, safe=True)
        dropped = True
    return dropped


def _is_global_mean(_: Any, x: Any, axes: Any, **__: Any) -> bool:
    dims = _constant(axes)
    return x.shape is not None and len(x.shape) == 4 and dims is not None and sorted(dims % 4) == [2, 3]


def _pool_globally(op: Any, x: Any, mean: Any, **_: Any) -> Any:
    node = mean.producer()
    if node.attributes.get_int("keepdims", 1):
        return op.GlobalAveragePool(x, _name=node.name)
    pooled = op.GlobalAveragePool(x, _name=node.name, _outputs=[f"{mean.name}_pooled"])
    return op.Flatten(pooled, axis=1, _name=f"{node.name}_flatten")


# The exporter writes global pooling as ReduceMean, which has no integer kernel in ONNX Runtime: the last
# feature map would be converted to float for it.
_GLOBAL_MEAN = RewriteRule(
    lambda op, x, axes: op.ReduceMean(x, axes, _outputs=["mean"]), _pool_globally, _is_global_mean
)


def _scalable_layer(op: Any, x: Any) -> Any:
    layers = [op.Conv(x, _allow_other_inputs=True), op.Gemm(x, _allow_other_inputs=True)]
    return OrValue(layers, name="y")


def _has_constant_weights(_: Any, y: Any, **__: Any) -> bool:
    weight, bias = _weight_and_bias(y)
    array, offset = _constant(weight), _constant(bias)
    if array is None or array.dtype not in (np.float32, np.float64):
        return False
    # The bias of a Gemm may have a row for each image of the batch.
    return bias is None or (offset is not None and offset.ndim <= 2 and offset.shape[:-1] in ((), (1,)))


def _weight_and_bias(y: Any) -> tuple[Any, Any]:
    inputs = y.producer().inputs
    return inputs[1], inputs[2] if len(inputs) > 2 else None


def _scaled_layer(op: Any, x: Any, y: Any, factor: float, shift: float) -> Any:
    """Return factor·y + shift, computed by a copy of the Conv or Gemm that computes y from x.

    Weights are computed in float64 and stored under new names, as another layer may use the old ones. The
    result has another name than y, as ranges observed for y do not hold for it.
    """
    layer = y.producer()
    weight, bias = _weight_and_bias(y)
    array = _array(weight)
    channels_last = layer.op_type == "Gemm" and not layer.attributes.get_int("transB", 0)
    offset = np.full(array.shape[-1 if channels_last else 0], shift)
    if bias is not None:
        beta = layer.attributes.get_float("beta", 1.0)
        offset = offset + factor * (_array(bias).astype(np.float64).ravel() * beta)
    inputs = [_initializer(op, layer, weight.name, (array * np.float64(factor)).astype(array.dtype))]
    if bias is not None or np.any(offset):
        name = f"{weight.name}_shift" if bias is None else bias.name
        inputs.append(_initializer(op, layer, name, offset.astype(array.dtype)))
    attributes = {name: a for name, a in layer.attributes.items() if name != "beta"}  # now in the bias
    return op.op(layer.op_type, x, *inputs, _name=layer.name, _outputs=[f"{y.name}_affine"], **attributes)


def _initializer(op: Any, node: Any, name: str, array: np.ndarray) -> Any:
    return op.initializer(ir.tensor(np.ascontiguousarray(array)), _unused_name(node.graph, name))


def _clip_hard_sigmoid(op: Any, x: Any, y: Any, activation: Any) -> Any:
    node = activation.producer()
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    scaled = _scaled_layer(op, x, y, alpha, beta)
    low, high = (
        _initializer(op, node, f"{activation.name}_{bound}", np.array(bound, np.float32)) for bound in (0, 1)
    )
    return op.Clip(scaled, low, high, _name=node.name)


# HardSigmoid, max(0, min(1, α·x + β)), has no integer kernel in ONNX Runtime, and OpenCV 5.0 computes it with
# another slope. With α and β in the layer before it, it is a Clip, which costs nothing in int8: the unsigned
# range of the layer's output cuts there.
_HARD_SIGMOID = RewriteRule(
    lambda op, x: op.HardSigmoid(_scalable_layer(op, x), _outputs=["activation"]),
    _clip_hard_sigmoid,
    _has_constant_weights,
)


def _multiply_hard_swish(op: Any, x: Any, activation: Any, y: Any = None) -> Any:
    node, name = activation.producer(), activation.name
    unit = 1.0 if y is None else math.sqrt(6)
    c = x if y is None else _scaled_layer(op, x, y, 1 / unit, 0.0)
    three, low, six = (
        _initializer(op, node, f"{name}_{suffix}", np.array(value / unit, np.float32))
        for suffix, value in (("three", 3), ("zero", 0), ("six", 6))
    )
    shifted = op.Add(c, three, _name=f"{node.name}_shift", _outputs=[f"{name}_shifted"])
    gate = op.Clip(shifted, low, six, _name=f"{node.name}_clip", _outputs=[f"{name}_gate"])
    if y is not None:
        return op.Mul(c, gate, _name=node.name)
    product = op.Mul(c, gate, _name=node.name, _outputs=[f"{name}_product"])
    sixth = _initializer(op, node, f"{name}_sixth", np.array(1 / 6, np.float32))
    return op.Mul(product, sixth, _name=f"{node.name}_scale")


# HardSwish has no integer kernel in ONNX Runtime; Add and Mul have one, and the Clip costs nothing, as above.
_HARD_SWISH = RewriteRuleSet(
    [
        # x·Clip(x + 3, 0, 6)/6 = c·Clip(c + √6/2, 0, √6) with c = x/√6, computed by the layer before it.
        RewriteRule(
            lambda op, x: op.HardSwish(_scalable_layer(op, x), _outputs=["activation"]),
            _multiply_hard_swish,
            _has_constant_weights,
        ),
        # If no layer can compute c, a multiplication by 1/6 remains.
        RewriteRule(lambda op, x: op.HardSwish(x, _outputs=["activation"]), _multiply_hard_swish),
    ]
)

MULTIPLE = 16
"""ONNX Runtime's integer depthwise kernel on x86 computes 16 channels at once, the rest one by one."""

_CHANNELWISE = (
    *("Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "LeakyRelu", "Identity", "Dropout"),
    *("Add", "Mul", "GlobalAveragePool", "AveragePool", "MaxPool"),
)


def pad_depthwise_channels(model: ir.Model) -> bool:
    """Pad the channels of depthwise convolutions to a multiple of 16.

    The layers that write these channels get weights and biases of 0 for the new ones, the layers that read
    them weights of 0, so that the values between do not matter. Channels that reach the graph's input or
    output or any other operator are not padded.
    """
    padded = False
    for node in model.graph:
        channels = _depthwise_channels(node)
        if channels is None or channels % MULTIPLE == 0:
            continue
        region = _channel_region(node)
        if region is not None:
            _pad(model.graph, region, channels, -channels % MULTIPLE)
            padded = True
    return padded


@dataclass
class _Region:
    """The tensors and depthwise convolutions between the dense layers that write and read some channels."""

    tensors: list[ir.Value] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)
    depthwise: list[ir.Node] = field(default_factory=list)


def _channel_region(start: ir.Node) -> _Region | None:
    """Follow the channels of `start` up and down the graph; None if they cannot be padded."""
    region = _Region()
    open_tensors = [start.inputs[0]]
    while open_tensors:
        tensor = open_tensors.pop()
        if tensor in region.tensors:
            continue
        writer = None if tensor is None else tensor.producer()
        if tensor is None or writer is None or tensor.is_graph_output():
            return None
        region.tensors.append(tensor)
        if _is_dense(writer):
            region.writers.append(writer)
        else:
            open_tensors += _tensors_of_channelwise(writer, region)
        for reader, _ in tensor.uses():
            if not _is_dense(reader):
                open_tensors += _tensors_of_channelwise(reader, region)
            elif reader not in region.readers:
                region.readers.append(reader)
    return region


def _tensors_of_channelwise(node: ir.Node, region: _Region) -> list[ir.Value | None]:
    """Return the inputs and outputs of a node that computes channels separately, [None] for other nodes."""
    if _depthwise_channels(node) is not None:
        if node not in region.depthwise:
            region.depthwise.append(node)
        return [node.inputs[0], node.outputs[0]]
    constants = [array for value in node.inputs if (array := _constant(value)) is not None]
    is_channelwise = node.op_type in _CHANNELWISE and len(node.outputs) == 1
    if not is_channelwise or any(array.size != 1 for array in constants):
        return [None]
    return [*(v for v in node.inputs if v is not None and _constant(v) is None), node.outputs[0]]


def _is_dense(node: ir.Node) -> bool:
    return _is_constant_conv(node) and node.attributes.get_int("group", 1) == 1


def _depthwise_channels(node: ir.Node) -> int | None:
    """Return the number of channels of a depthwise convolution of constant weights, None for other nodes."""
    if not _is_constant_conv(node):
        return None
    channels, channels_per_group = _array(node.inputs[1]).shape[:2]
    groups = node.attributes.get_int("group", 1)
    return channels if groups == channels and channels_per_group == 1 and groups > 1 else None


def _is_constant_conv(node: ir.Node) -> bool:
    return node.op_type == "Conv" and all(v is None or _constant(v) is not None for v in node.inputs[1:])


def _pad(graph: ir.Graph, region: _Region, channels: int, extra: int) -> None:
    for node in (*region.writers, *region.depthwise):
        for index, parameter in enumerate(node.inputs):
            if index > 0 and parameter is not None:
                node.replace_input_with(index, _padded(graph, parameter, 0, extra))
    for node in region.readers:
        node.replace_input_with(1, _padded(graph, node.inputs[1], 1, extra))
    for node in region.depthwise:
        node.attributes["group"] = ir.AttrInt64("group", channels + extra)
    for tensor in region.tensors:
        if tensor.shape is not None:
            tensor.shape = ir.Shape([tensor.shape[0], channels + extra, *tensor.shape[2:]])


def _padded(graph: ir.Graph, value: Any, axis: int, extra: int) -> ir.Value:
    array = _array(value)
    padding = [(0, extra if i == axis else 0) for i in range(array.ndim)]
    name = _unused_name(graph, value.name)
    tensor = ir.tensor(np.pad(array, padding), name=name)
    shape, dtype = ir.Shape(tensor.numpy().shape), ir.TensorType(tensor.dtype)
    padded = ir.Value(name=name, const_value=tensor, shape=shape, type=dtype)
    graph.register_initializer(padded)
    return padded


RULES: dict[str, Callable[[ir.Model], bool | int]] = {
    # In this order: a rule may enable a later one.
    "drop_no_ops": drop_no_ops,
    "fold_batch_norm": RewriteRuleSet(
        [
            fuse_batchnorm_into_conv_rule,
            fuse_batchnorm_into_conv_transpose_rule,
            fuse_batchnorm_into_gemm_rule,
        ]
    ).apply_to_model,
    "pool_globally": _GLOBAL_MEAN.apply_to_model,
    "clip_hard_sigmoid": _HARD_SIGMOID.apply_to_model,
    "multiply_hard_swish": _HARD_SWISH.apply_to_model,
    "pad_depthwise_channels": pad_depthwise_channels,
}
# These pay if what they write runs in integers, and cost time if it does not.
FOR_INTEGERS = frozenset({"multiply_hard_swish", "pad_depthwise_channels"})
