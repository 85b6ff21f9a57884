"""After bias correction layers give on average what they give in float."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from questpress.export.int8 import correction
from questpress.export.int8.correction import correct_biases, with_all_biases
from questpress.export.int8.fake_quantize import FakeQuantized
from questpress.export.int8.quantizer import Prepared, calibrate_ranges, quantize
from questpress.export.int8.targets import find_target

from tests.support.graphs import assert_same_outputs, constants, graph_of, prepared, run_graph, weights

node = helper.make_node
TYPES = find_target("arm64")  # whose first convolution is int8, too
IMAGES = np.abs(weights(40, 3, 8, 8, seed=9))


def skewed(*shape: int, seed: int) -> np.ndarray:
    """One large weight in each channel, and small ones that rounding changes to one side."""
    w = np.full(shape, 0.0135, np.float32) + 0.003 * weights(*shape, seed=seed)
    w.reshape(len(w), -1)[:, 0] = 2
    return w


def two_layers(**biases: np.ndarray) -> onnx.ModelProto:
    first = ["input", "w", *(["b"] if "b" in biases else [])]
    nodes = [
        node("Conv", first, ["a"], name="first", pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["r"], name="relu"),
        node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("Gemm", ["f", "v", *(["c"] if "c" in biases else [])], ["output"], name="head", transB=1),
    ]
    return graph_of(nodes, {"w": skewed(6, 3, 3, 3, seed=0), "v": skewed(4, 6, seed=1), **biases})


def fake(ready: Prepared, ranges: object) -> FakeQuantized:
    return FakeQuantized(ready, quantize(ready, ranges, TYPES), TYPES).eval()  # type: ignore[arg-type]


def means(network: FakeQuantized, tensor: str) -> np.ndarray:
    with torch.no_grad():
        x = network(torch.from_numpy(IMAGES), wanted=[tensor])[tensor]
    return x.double().mean(dim=[d for d in range(x.dim()) if d != 1]).numpy()


def constant(ready: Prepared, name: str) -> np.ndarray:
    return constants(ready.model)[name]


def test_each_layers_mean_output_is_the_float_ones() -> None:
    ready = prepared(two_layers(b=weights(6, seed=2), c=weights(4, seed=3)))
    ranges, _ = calibrate_ranges(ready.model, [IMAGES], "minmax", ready.scope.op_types)
    before = fake(ready, ranges)
    corrected = correct_biases(ready, before, IMAGES)
    after = fake(corrected, ranges)

    # By hand: the first layer's error is that of rounded images through rounded weights.
    with torch.no_grad():
        x = torch.from_numpy(IMAGES)
        seen = before(x, wanted=["input_DequantizeLinear_Output", "w_DequantizeLinear_Output"])
        rounded, w = seen["input_DequantizeLinear_Output"], seen["w_DequantizeLinear_Output"]
        quantized = torch.nn.functional.conv2d(rounded, w, padding=1)
        exact = torch.nn.functional.conv2d(x, torch.tensor(constant(ready, "w")), padding=1)
        error = (quantized - exact).mean(dim=(0, 2, 3)).numpy()
    assert np.abs(error).max() > 1e-3
    assert np.allclose(constant(corrected, "b"), constant(ready, "b") - error, atol=1e-5)

    # The last layer's, after all that comes before it is quantized and corrected.
    expected = run_graph(ready.model, IMAGES)[0].mean(axis=0)
    with after.rounding(frozenset(after.sources()) - {"output"}):
        now = means(after, "output")
    with before.rounding(frozenset(before.sources()) - {"output"}):
        was = means(before, "output")
    assert np.abs(was - expected).max() > 20 * np.abs(now - expected).max()
    assert np.allclose(now, expected, atol=1e-4 * np.ptp(expected))


def test_only_biases_change() -> None:
    ready = prepared(two_layers(b=weights(6), c=weights(4)))
    untouched = ready.model.SerializeToString()
    ranges, _ = calibrate_ranges(ready.model, [IMAGES], "minmax", ready.scope.op_types)
    corrected = correct_biases(ready, fake(ready, ranges), IMAGES)
    assert ready.model.SerializeToString() == untouched
    for name, changed in {"w": False, "v": False, "b": True, "c": True}.items():
        assert np.array_equal(constant(ready, name), constant(corrected, name)) != changed
    again = correct_biases(ready, fake(ready, ranges), IMAGES)
    assert again.model.SerializeToString() == corrected.model.SerializeToString()


def test_bias_that_two_layers_share_is_left_alone() -> None:
    nodes = [
        node("Conv", ["input", "w", "shared"], ["a"], name="first"),
        node("Conv", ["a", "v", "shared"], ["b"], name="second"),
        node("Conv", ["b", "u", "own"], ["output"], name="third"),
    ]
    w, v, u = (skewed(3, 3, 1, 1, seed=seed) for seed in range(3))
    ready = prepared(graph_of(nodes, {"w": w, "v": v, "u": u, "shared": weights(3), "own": weights(3)}))
    ranges, _ = calibrate_ranges(ready.model, [IMAGES], "minmax", ready.scope.op_types)
    corrected = correct_biases(ready, fake(ready, ranges), IMAGES)
    assert np.array_equal(constant(corrected, "shared"), constant(ready, "shared"))
    assert not np.array_equal(constant(corrected, "own"), constant(ready, "own"))


def test_layers_without_a_bias_get_zeros() -> None:
    ready = prepared(two_layers())
    complete = with_all_biases(ready)
    assert [len(n.input) for n in complete.model.graph.node if n.op_type in ("Conv", "Gemm")] == [3, 3]
    assert constant(complete, "first_bias").shape == (6,) and constant(complete, "head_bias").shape == (4,)
    assert_same_outputs(ready.model, complete.model, IMAGES[:4])
    ranges, _ = calibrate_ranges(complete.model, [IMAGES], "minmax", complete.scope.op_types)
    corrected = correct_biases(complete, fake(complete, ranges), IMAGES)
    assert constant(corrected, "first_bias").any() and constant(corrected, "head_bias").any()


def test_gemm_whose_weight_is_not_turned_gets_a_bias_of_its_columns() -> None:
    nodes = [node("Flatten", ["input"], ["f"]), node("Gemm", ["f", "v"], ["output"], name="head")]
    complete = with_all_biases(prepared(graph_of(nodes, {"v": weights(192, 5)})))
    assert constant(complete, "head_bias").shape == (5,)
    onnx.checker.check_model(complete.model, full_check=True)


def test_few_images_are_used_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = prepared(two_layers(b=weights(6), c=weights(4)))
    ranges, _ = calibrate_ranges(ready.model, [IMAGES], "minmax", ready.scope.op_types)
    network = fake(ready, ranges)
    monkeypatch.setattr(correction, "MAX_ACTIVATION_BYTES", 1)
    single = correct_biases(ready, network, IMAGES)
    assert np.array_equal(constant(single, "b"), constant(correct_biases(ready, network, IMAGES[:1]), "b"))
