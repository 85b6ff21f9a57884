"""Exact rewriting of a float ONNX graph into forms that ONNX Runtime can run wholly in int8."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx

from ..int8.rewrite import Graph
from .batch_norm import fold_batch_norm
from .channels import pad_depthwise_channels
from .hard_sigmoid import clip_hard_sigmoid
from .hard_swish import multiply_hard_swish
from .no_ops import drop_no_ops
from .pooling import pool_globally

Rule = Callable[[Graph], int]

RULES: dict[str, Rule] = {
    # In this order: what is in the way of another rule goes first.
    "drop_no_ops": drop_no_ops,
    "fold_batch_norm": fold_batch_norm,
    "pool_globally": pool_globally,
    "clip_hard_sigmoid": clip_hard_sigmoid,
    "multiply_hard_swish": multiply_hard_swish,
    "pad_depthwise_channels": pad_depthwise_channels,
}
# These pay where what they write runs in integers, and cost something where it doesn't.
FOR_INTEGERS = frozenset({"multiply_hard_swish", "pad_depthwise_channels"})


def rewrite(model: onnx.ModelProto, rules: Collection[str] | None = None) -> list[str]:
    """Apply `rules`, or all of RULES, to `model` in place; the names of those that found something to do.

    Each computes what the graph computed, up to the rounding of float32. Raises ValueError for a rule that
    isn't there.
    """
    unknown = sorted(set(rules or ()) - set(RULES))
    if unknown:
        raise ValueError(f"no rewriting rule {unknown[0]!r}; there are {', '.join(RULES)}")
    graph = Graph(model)
    found = [name for name, rule in RULES.items() if (rules is None or name in rules) and rule(graph)]
    graph.write()
    return found
