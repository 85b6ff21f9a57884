"""An ONNX graph as a torch module: node by node what the file computes, with weights that can learn.

What is measured or trained here is the graph that ships and not the network it was made from: batch norm is
folded, the rewriting is done, and every tensor has the name that the quantizer knows it by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from .errors import NotInTorchError
from .int8.torch_graph import OPERATORS

Values = dict[str, Any]
"""Of each tensor by name: torch tensors, and constants of integers as numpy arrays."""


@dataclass(frozen=True)
class Step:
    """A node, ready to be computed."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    finished: tuple[str, ...]
    """Tensors that no later step needs."""


class GraphNetwork(nn.Module):
    """A float ONNX graph of one input and one output; `weights` are its float initializers of at least one
    dimension.

    Raises NotInTorchError for an operator that `graph_operators` does not have.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.names: dict[str, str] = {}
        self.weights = nn.ParameterDict()
        self.constants: Values = {}
        for tensor in graph.initializer:
            self._hold(tensor)
        self.steps = tuple(self._steps(graph.node))
        for step in self.steps:
            if self._operator(step) is None:
                raise NotInTorchError(
                    f"the graph has the operator {step.op_type} ({step.name}), which cannot be computed in "
                    "torch here"
                )

    def weight(self, name: str) -> Tensor:
        """A float initializer by its name in the graph."""
        weight: Tensor = self.weights[self.names[name]]
        return weight

    def forward(self, x: Tensor, wanted: Iterable[str] = ()) -> Values:
        """The graph's output and the tensors wanted, by name, for inputs [B,3,S,S]."""
        kept = {self.output, *wanted}
        values: Values = {self.input: x}
        for step in self.steps:
            self.compute(step, values)
            for name in step.finished:
                if name not in kept:
                    values.pop(name, None)
        return {name: values[name] for name in kept}

    def compute(self, step: Step, values: Values) -> None:
        """Put what a step gives among the values."""
        operator = self._operator(step)
        assert operator is not None
        arguments = [self._value(name, values) for name in step.inputs]
        result = operator(step.attributes, *arguments)
        results = result if isinstance(result, tuple) else (result,)
        values.update(zip(step.outputs, results, strict=True))

    def _value(self, name: str, values: Values) -> Any:
        if not name:
            return None
        if name in values:
            return values[name]
        return self.weight(name) if name in self.names else self.constants[name]

    def _operator(self, step: Step) -> Callable[..., Any] | None:
        return OPERATORS.get(step.op_type)

    def _hold(self, tensor: TensorProto) -> None:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim:
            key = f"w{len(self.names)}"  # names in a graph have dots, parameters' cannot
            self.names[tensor.name] = key
            self.weights[key] = nn.Parameter(torch.from_numpy(value.copy()))
        else:
            self.constants[tensor.name] = value

    def _steps(self, nodes: Iterable[onnx.NodeProto]) -> Iterable[Step]:
        nodes = list(nodes)
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
    """A copy of the graph that `network` was made from, with the weights that it has now."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in network.names:
            value = network.weight(tensor.name).detach().cpu().contiguous().numpy()
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return changed
