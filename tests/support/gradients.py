"""Gradients summed up in Python: autograd's engine without its streams, which require a driver.

It calls the functions of the graph in the engine's order. Hooks are not called, and graphs are kept.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def backward(tensor: Tensor, gradient: Tensor | None = None, **options: Any) -> None:
    if options.get("inputs") is not None:
        raise NotImplementedError("backward(inputs=…)")
    _sum_gradients([tensor], [gradient], options.get("create_graph", False))


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> tuple[Tensor | None, ...]:
    if grad_outputs is not None:
        raise NotImplementedError("grad(grad_outputs=…)")
    outputs, inputs = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, inputs))
    create_graph = options.get("create_graph", False)
    gradients = _sum_gradients(outputs, [None] * len(outputs), create_graph, inputs)
    if not options.get("allow_unused") and any(x is None for x in gradients):
        raise RuntimeError("One of the differentiated Tensors appears to not have been used in the graph.")
    return tuple(gradients)


def _sum_gradients(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    create_graph: bool,
    inputs: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """Run autograd's functions in the order of its engine; return the gradients of ``inputs``.

    Without ``inputs``, leaves accumulate theirs.
    """
    with torch.enable_grad():
        roots, ends = (
            [torch.autograd.graph.get_gradient_edge(x) for x in xs] for xs in (outputs, inputs or ())
        )
    counts: defaultdict[Any, int] = defaultdict(int)
    stack = [edge.node for edge in roots]
    seen = set(stack)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                counts[child] += 1
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    buffers: dict[Any, list[Tensor | None]] = {}

    def add(node: Any, number: int, gradient: Tensor) -> None:
        expected = node._input_metadata[number]
        if gradient.device != expected.device:
            raise RuntimeError(f"{node}: the gradient is on {gradient.device}, not on {expected.device}")
        if gradient.shape != expected.shape:
            gradient = gradient.sum_to_size(tuple(expected.shape))
        buffer = buffers.setdefault(node, [None] * len(node._input_metadata))
        before, gradient = buffer[number], gradient.to(expected.dtype)
        buffer[number] = gradient if before is None else before + gradient

    with torch.set_grad_enabled(create_graph):
        for output, edge, gradient in zip(outputs, roots, gradients, strict=True):
            add(edge.node, edge.output_nr, torch.ones_like(output) if gradient is None else gradient)
        ready = [(-node._sequence_nr(), n, node) for n, node in enumerate(buffers) if not counts[node]]
        heapq.heapify(ready)
        results: list[Tensor | None] = [None] * len(ends)
        while ready:
            *_, node = heapq.heappop(ready)
            buffer = buffers.pop(node, None)
            for number, end in enumerate(ends):
                if end.node is node and buffer is not None:
                    results[number] = buffer[end.output_nr]
            if buffer is None or (inputs is not None and not node.next_functions):
                computed: Sequence[Tensor | None] = [None] * len(node.next_functions)
            else:
                computed = _call(node, buffer)
            for (child, number), gradient in zip(node.next_functions, computed, strict=True):
                if child is None:
                    continue
                if gradient is not None:
                    add(child, number, gradient)
                counts[child] -= 1
                if not counts[child]:
                    heapq.heappush(ready, (-child._sequence_nr(), len(counts) + id(child), child))
    return results


def _call(node: Any, buffer: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        result = node.apply(*buffer)
        given = iter([result] if isinstance(result, Tensor) else result)
        # Results of arguments that are not tensors have no edge.
        wanted = [gradient for gradient, needed in zip(given, node.needs_input_grad, strict=True) if needed]
        left = iter(wanted)
        return [None if child is None else next(left) for child, _ in node.next_functions]
    result = node(*buffer)
    return [result] if result is None or isinstance(result, Tensor) else result
