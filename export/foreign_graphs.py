"""The order in a foreign ONNX file's graphs: how deep they lie in each other, whether each node finds what it
needs, and how much its functions come to when every call of them is written out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import onnx

from .errors import ExportError

MOST_NODES = 200_000
"""Of all graphs together, a function's as often as it is called."""

DEEPEST = 8
"""Graphs inside the attributes of nodes inside graphs."""

Graph = onnx.GraphProto | onnx.FunctionProto

Called = tuple[str, str, str]
"""An operator's domain, its name and its overload, or those of a function of the file's own."""


def graphs(*roots: Graph) -> Iterator[tuple[Graph, int]]:
    """Every graph in these with its depth; not by recursion, which a deep one would exhaust."""
    waiting = [(root, 0) for root in roots]
    while waiting:
        graph, depth = waiting.pop()
        yield graph, depth
        waiting += [(inner, depth + 1) for inner in _inside(attributes(graph))]


def attributes(graph: Graph) -> Iterator[onnx.AttributeProto]:
    """Those of its nodes, and those that a function has where a call names none."""
    if isinstance(graph, onnx.FunctionProto):
        yield from graph.attribute_proto
    for node in graph.node:
        yield from node.attribute


def _inside(given: Iterable[onnx.AttributeProto]) -> Iterator[onnx.GraphProto]:
    for attribute in given:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def refuse_many(model: onnx.ModelProto, name: str) -> None:
    """
    Raises:
        ExportError: the graphs lie too deep in each other, or have too many nodes.
    """
    nodes = 0
    for graph, depth in graphs(model.graph, *model.functions):
        if depth > DEEPEST:
            raise ExportError(f"{name} has graphs nested more than {DEEPEST} deep")
        nodes += max(1, len(graph.node))
        if nodes > MOST_NODES:
            raise ExportError(f"{name} has more than {MOST_NODES:,} nodes")


def refuse_endless_calls(model: onnx.ModelProto, name: str) -> None:
    """A runtime writes out every call of the file's own functions: ten of them that each call the next one
    ten times are ten thousand million nodes.

    Raises:
        ExportError: there are too many nodes then, or functions call themselves.
    """
    calls = {(one.domain, one.name, one.overload): _named(one) for one in model.functions}
    if len(calls) < len(model.functions):
        raise ExportError(f"{name} has two functions of one name")
    own = {one: [other for other in named if other in calls] for one, named in calls.items()}
    callers: dict[Called, list[Called]] = {one: [] for one in calls}
    for one, others in own.items():
        for other in others:
            callers[other].append(one)
    unknown = {one: len(others) for one, others in own.items()}
    able = [one for one, left in unknown.items() if not left]
    sizes: dict[Called, int] = {}
    while able:
        one = able.pop()
        sizes[one] = _written_out(calls[one], sizes)
        for caller in callers[one]:
            unknown[caller] -= 1
            if not unknown[caller]:
                able.append(caller)
    circle = next((one for one in calls if one not in sizes), None)
    if circle is not None:
        raise ExportError(f"{name} has functions that call themselves ({short(circle[1])})")
    if _written_out(_named(model.graph), sizes) > MOST_NODES:
        raise ExportError(f"{name} has more than {MOST_NODES:,} nodes, with those of its functions")


def _named(graph: Graph) -> Counter[Called]:
    """The operators of a graph and of those inside it, and how often each is named."""
    return Counter(
        (node.domain, node.op_type, node.overload) for one, _ in graphs(graph) for node in one.node
    )


def _written_out(named: Counter[Called], sizes: dict[Called, int]) -> int:
    return min(sum(times * sizes.get(one, 1) for one, times in named.items()), MOST_NODES + 1)


def refuse_circles(graph: Graph, name: str, outer: tuple[set[str], ...] = ()) -> None:
    """ONNX wants nodes in an order in which each finds what it needs: in its own graph, or in one around it.

    Raises:
        ExportError: one does not.
    """
    if isinstance(graph, onnx.GraphProto):
        known = {one.name for one in (*graph.input, *graph.initializer)} | {""}
        known |= {one.values.name for one in graph.sparse_initializer}
    else:
        known = {*graph.input, ""}
    for node in graph.node:
        for one in node.input:
            if one not in known and not any(one in around for around in outer):
                raise ExportError(
                    f"{name} has a node {short(node.op_type)} that needs {short(one)}, which nothing before "
                    "it makes: the graph goes in a circle, or is out of order"
                )
        for inner in _inside(node.attribute):  # no deeper than refuse_many allows
            refuse_circles(inner, name, (*outer, known))
        known |= set(node.output)


def short(text: str) -> str:
    """A name from the file, in quotes: as long as a sentence may hold."""
    return repr(text if len(text) <= 60 else f"{text[:59]}…")
