"""Equalized channels change the ranges and not the function."""

import copy
import warnings

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from questpress.export.conversion.rewrite import rewrite
from questpress.export.int8.correction import CLEAR, equalize, layer_pairs

from tests.support.graphs import constants, graph_of, prepared, run_graph, weights

node = helper.make_node
IMAGES = weights(24, 3, 8, 8, seed=5)
SIX = {"zero": np.float32(0), "six": np.float32(6)}
UNEVEN = np.array([0.01, 0.1, 1, 1, 10, 100], np.float32)


def uneven(*, between: list[onnx.NodeProto], depthwise: bool = False) -> onnx.ModelProto:
    """A writer whose channels differ ten-thousandfold, and a reader that takes that back."""
    nodes = [
        node("Conv", ["input", "w", "b"], ["a"], name="writer", pads=[1, 1, 1, 1]),
        *between,
        *(
            [node("Conv", ["m", "d"], ["output"], name="reader", group=6)]
            if depthwise
            else [node("Conv", ["m", "v"], ["output"], name="reader")]
        ),
    ]
    column = UNEVEN[:, None, None, None]
    constants = {
        "w": weights(6, 3, 3, 3) * column,
        "b": weights(6, seed=1) * UNEVEN,
        "v": weights(4, 6, 1, 1, seed=2) / UNEVEN[:, None, None],
        "d": weights(6, 1, 3, 3, seed=3) / column,
        **SIX,
    }
    return graph_of(nodes, constants)


RELU = [node("Relu", ["a"], ["m"], name="relu")]
POOLED = [node("Relu", ["a"], ["p"], name="relu"), node("MaxPool", ["p"], ["m"], kernel_shape=[2, 2])]


def written(model: onnx.ModelProto) -> np.ndarray:
    """Return the writer's output for IMAGES."""
    both = copy.deepcopy(model)
    both.graph.output.append(helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, None))
    return run_graph(both, IMAGES)[1]


def spans(model: onnx.ModelProto) -> np.ndarray:
    """Return the largest absolute value of each channel of the writer's output."""
    return np.abs(written(model)).max(axis=(0, 2, 3))


def assert_same_function(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    batch = weights(16, 3, 8, 8, seed=11)
    for optimized in (True, False):
        (was,), (now,) = (run_graph(model, batch, optimized=optimized) for model in (before, after))
        assert np.abs(now - was).max() <= 1e-4 * np.abs(was).max()


@pytest.mark.parametrize("between", [RELU, POOLED], ids=["relu", "relu and pooling"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_equalization_across_relu_preserves_the_function(
    between: list[onnx.NodeProto], depthwise: bool
) -> None:
    ready = prepared(uneven(between=between, depthwise=depthwise))
    untouched = ready.model.SerializeToString()
    level = equalize(ready, IMAGES)
    assert level is not None and ready.model.SerializeToString() == untouched
    assert_same_function(ready.model, level.model)
    was, now = spans(ready.model), spans(level.model)
    assert was.max() / was.min() > 1e3
    assert now.max() / now.min() < (1.01 if depthwise else 10)


def test_scales_are_the_roots_of_the_ranges_ratios() -> None:
    model = uneven(between=RELU)
    level = equalize(prepared(model), IMAGES)
    assert level is not None
    was, now = constants(model), constants(level.model)
    v = np.abs(was["v"])[:, :, 0, 0]
    r = (v / v.max(axis=1, keepdims=True)).max(axis=0)
    s = np.sqrt(spans(model) / r)
    s = np.clip(s / np.median(s), 1e-3, 1e3)
    assert np.allclose(now["w"], was["w"] / s[:, None, None, None], rtol=1e-4)
    assert np.allclose(now["b"], was["b"] / s, rtol=1e-4)
    assert np.allclose(now["v"], was["v"] * s[:, None, None], rtol=1e-4)


@pytest.mark.parametrize(
    "between",
    [
        [node("HardSwish", ["a"], ["m"])],
        [node("Sigmoid", ["a"], ["m"])],
        [node("Relu", ["a"], ["r"]), node("Add", ["r", "a"], ["m"])],
        [node("Clip", ["a", "minus", "six"], ["m"])],
        [node("Clip", ["a", "zero"], ["m"])],
        [node("Clip", ["a", "zero", "six"], ["c"]), node("Clip", ["c", "zero", "six"], ["m"])],
    ],
    ids=["hard-swish", "sigmoid", "residual", "clip from below 0", "clip without end", "twice"],
)
def test_equalization_skips_other_operators(between: list[onnx.NodeProto]) -> None:
    model = uneven(between=RELU)
    del model.graph.node[:], model.graph.value_info[:]
    writer, reader = node("Conv", ["input", "w", "b"], ["a"]), node("Conv", ["m", "v"], ["output"])
    model.graph.node.extend([writer, *between, reader])
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-1), "minus"))
    assert layer_pairs(model) == []
    assert equalize(prepared(model), IMAGES) is None


def test_shared_maps_and_weights_are_not_scaled() -> None:
    w = {"w": weights(3, 3, 1, 1), "v": weights(3, 3, 1, 1, seed=1)}
    twice = [
        node("Conv", ["input", "w"], ["a"], name="writer"),
        node("Conv", ["a", "v"], ["b"], name="reader"),
        node("Add", ["a", "b"], ["output"], name="sum"),
    ]
    assert layer_pairs(graph_of(twice, w)) == []
    given_out = [twice[0], node("Conv", ["a", "v"], ["output"], name="reader")]
    assert layer_pairs(graph_of(given_out, w, outputs=("output", "a"))) == []
    shared = [twice[0], node("Conv", ["a", "w"], ["output"], name="reader")]
    assert layer_pairs(graph_of(shared, w)) == []
    assert [(p.writer, p.reader) for p in layer_pairs(graph_of(given_out, w))] == [("writer", "reader")]


def test_across_relu6_only_channels_clear_of_six_are_scaled() -> None:
    relu6 = [node("Clip", ["a", "zero", "six"], ["m"], name="relu6")]
    model = uneven(between=relu6)
    assert [p.bound for p in layer_pairs(model)] == [6.0]
    for tensor in model.graph.initializer:
        tensor.dims[:] = tensor.dims or [1]  # as the rewriting of HardSigmoid writes bounds
    assert [p.bound for p in layer_pairs(model)] == [6.0]
    level = equalize(prepared(model), IMAGES)
    assert level is not None
    top, now = (written(m).max(axis=(0, 2, 3)) for m in (model, level.model))
    clear = top < CLEAR * 6
    assert 0 < clear.sum() < 6
    moved = np.abs(constants(level.model)["w"] / constants(model)["w"] - 1).max(axis=(1, 2, 3)) > 1e-6
    assert not moved[~clear].any() and moved[clear].any()
    assert (now[clear] <= CLEAR * 6 + 1e-4).all()
    assert (now[clear & (top < 0.5)] > top[clear & (top < 0.5)]).all()
    (expected,), (output,) = run_graph(model, IMAGES), run_graph(level.model, IMAGES)
    assert np.abs(output - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("bounded", [False, True])
def test_zero_channels_stay_zero(bounded: bool) -> None:
    cut = ("Clip", ["zero", "six"]) if bounded else ("Relu", [])
    nodes = [
        node("Conv", ["input", "w", "b"], ["a"], name="writer"),
        node(cut[0], ["a", *cut[1]], ["c"], name="cut"),
        node("Conv", ["c", "dw"], ["d"], name="depthwise", group=5),
        node(cut[0], ["d", *cut[1]], ["e"], name="cut again"),
        node("Conv", ["e", "v"], ["output"], name="reader"),
    ]
    kernels = {
        "w": weights(5, 3, 1, 1),
        "b": weights(5),
        "dw": weights(5, 1, 3, 3, seed=1),
        "v": weights(4, 5, 1, 1, seed=2),
        **SIX,
    }
    model = graph_of(nodes, kernels)
    assert rewrite(model, ["pad_depthwise_channels"])
    padded = {n.name: n.input[1] for n in model.graph.node if n.op_type == "Conv"}
    assert constants(model)[padded["depthwise"]].shape == (16, 1, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        level = equalize(prepared(model), IMAGES)
    assert level is not None
    for name, axis in (("writer", 0), ("depthwise", 0), ("reader", 1)):
        w = constants(level.model)[padded[name]]
        assert np.isfinite(w).all() and not np.take(w, range(5, 16), axis).any()
    assert_same_function(model, level.model)


def test_head_behind_global_pooling_takes_up_the_scales() -> None:
    nodes = [
        node("Conv", ["input", "w", "b"], ["a"], name="writer"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("Gemm", ["f", "v"], ["output"], name="head"),
    ]
    for turned, v in ((0, weights(6, 4, seed=2)), (1, weights(4, 6, seed=2))):
        nodes[-1] = node("Gemm", ["f", "v"], ["output"], name="head", transB=turned)
        by_channel = UNEVEN[None] if turned else UNEVEN[:, None]
        column = UNEVEN[:, None, None, None]
        model = graph_of(
            nodes, {"w": weights(6, 3, 1, 1) * column, "b": weights(6) * UNEVEN, "v": v / by_channel}
        )
        level = equalize(prepared(model), IMAGES)
        assert level is not None
        assert not np.allclose(constants(level.model)["v"], constants(model)["v"])
        assert_same_function(model, level.model)
