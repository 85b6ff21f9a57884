"""Depthwise convolutions get channels of nothing, and nothing comes of them."""

import numpy as np
import onnx
import pytest
from onnx import helper
from questpress.export.conversion.rewrite import rewrite

from tests.support.graphs import constants, graph_of, rewritten, weights

node = helper.make_node
RULE = ["pad_depthwise_channels"]


def depthwise(given: str, taken: str, weight: str, channels: int) -> onnx.NodeProto:
    return node("Conv", [given, weight], [taken], group=channels, pads=[1, 1, 1, 1], name=taken)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Of each convolution's weight, by the name of its output."""
    held = constants(model)
    return {n.output[0]: held[n.input[1]].shape for n in model.graph.node if n.op_type == "Conv"}


def test_block_with_squeeze_and_excite_is_widened_inside_only() -> None:
    nodes = [
        node("Conv", ["input", "expand", "bias"], ["a"]),
        node("HardSwish", ["a"], ["b"]),
        depthwise("b", "c", "dw", 20),
        node("Relu", ["c"], ["d"]),
        node("GlobalAveragePool", ["d"], ["e"]),
        node("Conv", ["e", "reduce"], ["f"]),
        node("Relu", ["f"], ["g"]),
        node("Conv", ["g", "excite", "bias"], ["h"]),
        node("Sigmoid", ["h"], ["i"]),
        node("Mul", ["d", "i"], ["j"]),
        node("Conv", ["j", "project"], ["k"]),
        node("Add", ["input", "k"], ["output"]),
    ]
    constants = {
        "expand": weights(20, 3, 1, 1),
        "bias": weights(20),
        "dw": weights(20, 1, 3, 3, seed=1),
        "reduce": weights(6, 20, 1, 1, seed=2),
        "excite": weights(20, 6, 1, 1, seed=3),
        "project": weights(3, 20, 1, 1, seed=4),
    }
    model = graph_of(nodes, constants)
    assert rewritten(model, weights(2, 3, 8, 8, seed=5), RULE) == RULE
    assert shapes(model) == {
        "a": (32, 3, 1, 1),
        "c": (32, 1, 3, 3),
        "f": (6, 32, 1, 1),
        "h": (32, 6, 1, 1),
        "k": (3, 32, 1, 1),
    }
    assert rewrite(model, RULE) == []


def test_channels_that_run_through_residual_sums_are_widened_together() -> None:
    nodes = [
        node("Conv", ["input", "stem"], ["a"]),
        depthwise("a", "b", "dw1", 5),
        node("Add", ["a", "b"], ["c"]),
        depthwise("c", "d", "dw2", 5),
        node("Add", ["c", "d"], ["e"]),
        node("Clip", ["e", "low", "high"], ["f"]),
        node("Conv", ["f", "head"], ["output"]),
    ]
    constants = {
        "stem": weights(5, 3, 1, 1), "dw1": weights(5, 1, 3, 3), "dw2": weights(5, 1, 3, 3, seed=1),
        "head": weights(4, 5, 1, 1), "low": np.float32(0), "high": np.float32(6),
    }  # fmt: skip
    model = graph_of(nodes, constants)
    rewritten(model, weights(2, 3, 8, 8), RULE)
    assert shapes(model)["b"] == shapes(model)["d"] == (16, 1, 3, 3)


def test_two_layers_of_one_weight_are_widened_each_for_itself() -> None:
    nodes = [
        node("Conv", ["input", "w"], ["a"]),
        depthwise("a", "b", "dw", 3),
        depthwise("b", "c", "dw", 3),
        node("Conv", ["c", "w"], ["output"]),
    ]
    model = graph_of(nodes, {"w": weights(3, 3, 1, 1), "dw": weights(3, 1, 3, 3)})
    rewritten(model, weights(2, 3, 8, 8, seed=2), RULE)
    widened = {"a": (16, 3, 1, 1), "b": (16, 1, 3, 3), "c": (16, 1, 3, 3), "output": (3, 16, 1, 1)}
    assert shapes(model) == widened


CONSTANTS = {
    "w": weights(5, 3, 1, 1),
    "dw": weights(5, 1, 3, 3),
    "head": weights(2, 5, 1, 1),
    "each": weights(1, 5, 1, 1),
    "groups": weights(10, 1, 3, 3),
}
STEM = node("Conv", ["input", "w"], ["a"])
HEAD = node("Conv", ["b", "head"], ["output"])


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([depthwise("input", "b", "dw", 5), HEAD], ("output",)),
        ([STEM, depthwise("a", "output", "dw", 5)], ("output",)),
        ([STEM, depthwise("a", "b", "dw", 5), HEAD], ("output", "a")),
        ([STEM, depthwise("a", "b", "dw", 5), node("Flatten", ["b"], ["output"])], ("output",)),
        ([STEM, depthwise("a", "c", "dw", 5), node("Mul", ["c", "each"], ["b"]), HEAD], ("output",)),
        ([STEM, depthwise("a", "c", "dw", 5), node("Softmax", ["c"], ["b"], axis=1), HEAD], ("output",)),
        ([STEM, node("Conv", ["a", "groups"], ["b"], group=5), node("Relu", ["b"], ["output"])], ("output",)),
    ],
    ids=["input", "output", "given out", "flattened", "constant", "softmax", "two of each"],
)
def test_channels_that_others_count_on_stay(nodes: list[onnx.NodeProto], outputs: tuple[str, ...]) -> None:
    shape = ["batch", 5 if "input" in nodes[0].input and nodes[0].output[0] == "b" else 3, 8, 8]
    model = graph_of(nodes, CONSTANTS, given=shape, outputs=outputs)
    assert rewrite(model, RULE) == []
    assert all(16 not in shape for shape in shapes(model).values())


def test_as_many_channels_as_the_kernel_likes_stay() -> None:
    nodes = [STEM, depthwise("a", "b", "dw", 16), HEAD]
    constants = {"w": weights(16, 3, 1, 1), "dw": weights(16, 1, 3, 3), "head": weights(2, 16, 1, 1)}
    assert rewrite(graph_of(nodes, constants), RULE) == []
