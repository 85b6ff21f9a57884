"""Every rewriting rule computes what the graph computed, and leaves alone what it can't rewrite exactly."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.conversion.rewrite import RULES, rewrite
from torch import nn

from tests.support.graphs import graph_of, operators, rewritten, weights

node = helper.make_node


def images(n: int, size: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, channels, size, size), dtype=np.float32) * 2


@cache
def exported(name: str, size: int, **options: object) -> bytes:
    """A timm network with random weights, and batch norm statistics that are not the trivial ones."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.7, 1.6),
                (module.bias, -0.3, 0.3),
            ):
                nn.init.uniform_(tensor, low, high)
    with TemporaryDirectory() as folder:
        return export_onnx(network.eval(), Path(folder) / "a.onnx", size, metadata={}).path.read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("mobilenetv3_small_075", {}, set()),
        ("mobilenetv3_small_050", {"act_layer": nn.ReLU6}, set()),
        ("mobilenetv4_conv_small_035", {}, set()),
        # Squeeze-excite by sigmoid has an integer kernel as it is.
        ("efficientnet_b0", {"act_layer": nn.ReLU}, {"Sigmoid"}),
    ],
)
def test_rewritten_network_gives_the_same_outputs(
    name: str, options: dict[str, object], left: set[str]
) -> None:
    model = onnx.ModelProto.FromString(exported(name, 64, **options))
    assert rewritten(model, images(3, 64))
    assert set(operators(model)) - left <= {
        *("Conv", "Gemm", "Relu", "Clip", "Add", "Mul", "MaxPool", "AveragePool"),
        *("GlobalAveragePool", "Reshape", "Flatten"),
    }
    assert rewrite(model) == []


@pytest.mark.parametrize("rule", RULES)
def test_one_rule_alone_is_exact_too(rule: str) -> None:
    model = onnx.ModelProto.FromString(exported("mobilenetv3_small_075", 64))
    done_at_export = ("drop_no_ops", "fold_batch_norm", "clip_hard_sigmoid")
    expected = [] if rule in done_at_export else [rule]
    assert rewritten(model, images(2, 64), [rule]) == expected


def test_rules_can_be_left_out_and_a_wrong_name_is_refused() -> None:
    model = onnx.ModelProto.FromString(exported("mobilenetv3_small_050", 32))
    untouched = model.SerializeToString(deterministic=True)
    assert rewrite(model, []) == [] and model.SerializeToString(deterministic=True) == untouched
    with pytest.raises(ValueError, match=r"unknown rewrite rule 'faster'\. Choose from drop_no_ops, "):
        rewrite(model, ["faster"])


@pytest.mark.parametrize(
    ("axes", "keep", "found"), [((2, 3), 0, 1), ((-1, -2), 1, 1), ((1,), 1, 0), ((2,), 0, 0)]
)
def test_only_means_over_height_and_width_are_pooling(axes: tuple[int, ...], keep: int, found: int) -> None:
    nodes = [node("ReduceMean", ["input", "axes"], ["output"], keepdims=keep, name="mean")]
    model = graph_of(nodes, {"axes": np.array(axes, np.int64)}, given=["batch", 3, 4, 5])
    assert len(rewritten(model, weights(2, 3, 4, 5), ["pool_globally"])) == found
    assert operators(model)["GlobalAveragePool"] == found


@pytest.mark.parametrize("activation", ["HardSwish", "HardSigmoid"])
@pytest.mark.parametrize("bias", [True, False])
def test_activation_is_folded_into_the_convolution_before_it(activation: str, bias: bool) -> None:
    inputs = ["input", "w", "b"] if bias else ["input", "w"]
    nodes = [node("Conv", inputs, ["x"], name="c"), node(activation, ["x"], ["output"], name="a")]
    model = graph_of(nodes, {"w": weights(5, 3, 3, 3), "b": weights(5)})
    rewritten(model, images(2, 8))
    count = operators(model)
    assert count["Mul"] == (activation == "HardSwish") and count["Clip"] == 1 and not count[activation]
    # The layer's tensor holds other values than before: what was observed under its name is not its range.
    assert "x" not in {name for n in model.graph.node for name in n.output}


def test_custom_slope_is_preserved() -> None:
    nodes = [node("Conv", ["input", "w"], ["x"]), node("HardSigmoid", ["x"], ["output"], alpha=0.3, beta=0.4)]
    model = graph_of(nodes, {"w": weights(5, 3, 1, 1)})
    assert rewritten(model, images(2, 8)) == ["clip_hard_sigmoid"]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (1,), ()])
def test_factors_of_a_gemm_are_kept(transposed: int, bias: tuple[int, ...] | None) -> None:
    inputs = ["input", "w"] if bias is None else ["input", "w", "b"]
    gemm = node("Gemm", inputs, ["x"], alpha=0.5, beta=2.0, transB=transposed)
    constants = {"w": weights(5, 4) if transposed else weights(4, 5)}
    if bias is not None:
        constants["b"] = weights(*bias) if bias else np.float32(0.7)
    model = graph_of([gemm, node("HardSwish", ["x"], ["output"])], constants, given=["batch", 4])
    rewritten(model, weights(6, 4, seed=1))
    assert operators(model)["Mul"] == 1


def test_shared_weight_is_copied_before_a_change() -> None:
    nodes = [
        node("Conv", ["input", "w", "b"], ["x"]),
        node("HardSwish", ["x"], ["y"]),
        node("Conv", ["input", "w", "b"], ["z"]),
        node("Add", ["y", "z"], ["output"]),
    ]
    model = graph_of(nodes, {"w": weights(5, 3, 1, 1), "b": weights(5)})
    rewritten(model, images(2, 8))
    assert operators(model)["Mul"] == 1


def conv_and(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("output",)) -> onnx.ModelProto:
    first = node("Conv", ["input", "w", "b"], ["x"], name="conv")
    return graph_of([first, *nodes], {"w": weights(5, 3, 1, 1), "b": weights(5)}, outputs=outputs)


@pytest.mark.parametrize(
    "model",
    [
        conv_and(node("HardSwish", ["x"], ["y"]), node("Add", ["x", "y"], ["output"])),
        conv_and(node("HardSwish", ["x"], ["output"]), outputs=("output", "x")),
        conv_and(node("Relu", ["x"], ["r"]), node("HardSwish", ["r"], ["output"])),
        graph_of([node("HardSwish", ["input"], ["output"])], {}),
    ],
    ids=["read twice", "given out", "not from a layer", "from the input"],
)
def test_unfoldable_factor_stays_a_product(model: onnx.ModelProto) -> None:
    assert rewritten(model, images(2, 8)) == ["multiply_hard_swish"]
    assert operators(model)["Mul"] == 2 and not operators(model)["HardSwish"]


def test_hard_sigmoid_that_no_layer_can_take_stays() -> None:
    for model in (
        conv_and(node("HardSigmoid", ["x"], ["y"]), node("Mul", ["x", "y"], ["output"])),
        conv_and(node("HardSigmoid", ["x"], ["output"]), outputs=("output", "x")),
    ):
        assert rewritten(model, images(2, 8)) == []


def test_weights_that_are_given_or_computed_are_left_alone() -> None:
    given = conv_and(node("HardSigmoid", ["x"], ["output"]))
    given.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [5, 3, 1, 1]))
    computed = graph_of(
        [
            node("Neg", ["v"], ["w"]),
            node("Conv", ["input", "w"], ["x"]),
            node("HardSigmoid", ["x"], ["output"]),
        ],
        {"v": weights(5, 3, 1, 1)},
    )
    # Of x·yᵀ, a constant x is no layer's weight.
    first = graph_of(
        [node("Gemm", ["v", "input"], ["x"], transB=1), node("HardSigmoid", ["x"], ["output"])],
        {"v": weights(6, 4)},
        given=["batch", 4],
    )
    for model in (given, computed, first):
        assert rewrite(model) == [] and operators(model)["HardSigmoid"] == 1


def test_value_read_by_a_branch_is_not_changed() -> None:
    branch = helper.make_graph(
        [node("Identity", ["x"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)],
    )
    model = conv_and(
        node("HardSigmoid", ["x"], ["y"]),
        node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch),
        node("Add", ["y", "z"], ["output"]),
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    assert rewrite(model) == []


@pytest.mark.parametrize("layer", ["Conv", "Gemm"])
def test_batch_norm_that_was_left_is_folded(layer: str) -> None:
    constants = {
        "w": weights(5, 3, 1, 1) if layer == "Conv" else weights(3, 5),
        "γ": weights(5, seed=1),
        "β": weights(5, seed=2),
        "mean": weights(5, seed=3),
        "variance": np.array([0, 1e-3, 0.5, 1, 9], np.float32),
    }
    norm = node("BatchNormalization", ["x", "γ", "β", "mean", "variance"], ["output"], epsilon=1e-3)
    shape = ["batch", 3, 8, 8] if layer == "Conv" else ["batch", 3]
    model = graph_of([node(layer, ["input", "w"], ["x"]), norm], constants, given=shape)
    batch = images(4, 8) if layer == "Conv" else weights(4, 3)
    assert rewritten(model, batch) == ["fold_batch_norm"] and operators(model) == {layer: 1}


def test_batch_norm_before_its_convolution_stays() -> None:
    names = ["γ", "β", "mean", "variance"]
    nodes = [node("BatchNormalization", ["input", *names], ["x"]), node("Conv", ["x", "w"], ["output"])]
    model = graph_of(nodes, {"w": weights(5, 3, 3, 3)} | {name: np.ones(3, np.float32) for name in names})
    assert rewrite(model) == [] and operators(model)["BatchNormalization"] == 1


def test_dropout_and_identity_are_removed() -> None:
    model = graph_of(
        [
            node("Dropout", ["input", "ratio"], ["a"]),
            node("Identity", ["a"], ["b"]),
            node("Relu", ["b"], ["c"]),
            node("Identity", ["c"], ["output"]),
        ],
        {"ratio": np.float32(0.5)},
    )
    assert rewritten(model, images(2, 8)) == ["drop_no_ops"]
    assert operators(model) == {"Relu": 1, "Identity": 1}


def test_dropout_whose_mask_is_read_or_that_trains_stays() -> None:
    masked = graph_of(
        [
            node("Dropout", ["input"], ["a", "mask"]),
            node("Where", ["mask", "a", "input"], ["b"]),
            node("Relu", ["b"], ["output"]),
        ],
        {},
    )
    training = graph_of(
        [node("Dropout", ["input", "ratio", "train"], ["a"], seed=1), node("Relu", ["a"], ["output"])],
        {"ratio": np.float32(0.5), "train": np.array(True)},
    )
    assert rewrite(masked) == [] and rewrite(training) == []


def test_constant_nodes_are_constants() -> None:
    tensors = {"w": weights(5, 3, 1, 1), "axes": np.array([2, 3], np.int64)}
    made = [
        node("Constant", [], [name], value=onnx.numpy_helper.from_array(array))
        for name, array in tensors.items()
    ]
    rest = [
        node("Conv", ["input", "w"], ["x"]),
        node("HardSwish", ["x"], ["y"]),
        node("ReduceMean", ["y", "axes"], ["output"]),
    ]
    model = graph_of([*made, *rest], {})
    assert rewritten(model, images(2, 8)) == ["pool_globally", "multiply_hard_swish"]
