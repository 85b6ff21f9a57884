"""What a rewriting rule asks of an ONNX graph, and the few ways in which it changes one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Graph:
    """A model's graph with its constants, who makes each tensor and who reads it; edits show at once.

    A constant is an initializer that no input of the graph can override; `Constant` nodes become such.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._lift_constant_nodes()
        graph = model.graph
        given = {value.name for value in graph.input}
        # What a branch of an If or the body of a Loop reads stands there without being handed in.
        self.outputs = {value.name for value in graph.output} | _read_inside(graph)
        self.constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
        self.nodes = list(graph.node)
        self._names = given | self.outputs | {tensor.name for tensor in graph.initializer}
        self._names |= {name for node in self.nodes for name in (node.name, *node.input, *node.output)}
        self._index()

    def maker(self, tensor: str) -> onnx.NodeProto | None:
        """The node that gives `tensor`; None of the graph's inputs and of constants."""
        return self._makers.get(tensor)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read `tensor`, one of them twice where it reads it twice."""
        return self._readers.get(tensor, [])

    def feeds_only(self, tensor: str, node: onnx.NodeProto) -> bool:
        """Whether nothing but `node` sees `tensor`: no other node, and no user of the graph."""
        readers = self.readers(tensor)
        return tensor not in self.outputs and len(readers) == 1 and readers[0] is node

    def array(self, name: str) -> np.ndarray | None:
        """The value of a constant; None where `name` is computed, given, or left out."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def number(self, name: str) -> float | None:
        """The value of a constant of one element; None of anything else."""
        array = self.array(name)
        return None if array is None or array.size != 1 else float(array.ravel()[0])

    def rank(self, name: str) -> int | None:
        """How many dimensions a tensor is known to have."""
        graph = self.model.graph
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.name == name and value.type.tensor_type.HasField("shape"):
                return len(value.type.tensor_type.shape.dim)
        array = self.array(name)
        return None if array is None else array.ndim

    def unused(self, name: str) -> str:
        """`name`, or the first name like it that nothing in the graph has; it counts as taken from now on."""
        taken, number = name, 2
        while taken in self._names:
            taken, number = f"{name}_{number}", number + 1
        self._names.add(taken)
        return taken

    def add_constant(self, name: str, array: np.ndarray) -> str:
        """Hold `array` under a name like `name`; the name."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), self.unused(name))
        self.model.graph.initializer.append(tensor)
        self.constants[tensor.name] = self.model.graph.initializer[-1]
        return tensor.name

    def replace(self, node: onnx.NodeProto, by: Iterable[onnx.NodeProto]) -> None:
        """Put other nodes, in the order in which they compute, where `node` stands."""
        place = next(i for i, other in enumerate(self.nodes) if other is node)
        self.nodes[place : place + 1] = list(by)
        self._index()

    def read_instead(self, tensor: str, other: str) -> None:
        """Let every node that reads `tensor` read `other`."""
        for node in self.nodes:
            for i, name in enumerate(node.input):
                if name == tensor:
                    node.input[i] = other
        self._index()

    def reindex(self) -> None:
        """After a node was changed in place."""
        self._index()

    def write(self) -> None:
        """Put the nodes back into the model, without constants and shapes that nothing uses any more."""
        graph = self.model.graph
        used = {name for node in self.nodes for name in (*node.input, *node.output)}
        used |= self.outputs | {value.name for value in graph.input}
        tensors = [tensor for tensor in graph.initializer if tensor.name in used]
        shapes = [value for value in graph.value_info if value.name in used]
        for field, values in (
            (graph.node, self.nodes),
            (graph.initializer, tensors),
            (graph.value_info, shapes),
        ):
            del field[:]
            field.extend(values)

    def _index(self) -> None:
        self._makers = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def _lift_constant_nodes(self) -> None:
        graph = self.model.graph
        kept = []
        for node in graph.node:
            value = attribute(node, "value") if node.op_type == "Constant" else None
            if value is None or node.output[0] in {output.name for output in graph.output}:
                kept.append(node)
                continue
            graph.initializer.append(value)
            graph.initializer[-1].name = node.output[0]
        if len(kept) != len(graph.node):
            del graph.node[:]
            graph.node.extend(kept)


def _read_inside(graph: onnx.GraphProto) -> set[str]:
    """Every name that a graph within a node of `graph` reads."""
    names: set[str] = set()
    for node in graph.node:
        for inner in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
            names |= {name for other in inner.node for name in other.input} | _read_inside(inner)
            names |= {value.name for value in inner.output}
    return names


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default` where the node doesn't state it."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
