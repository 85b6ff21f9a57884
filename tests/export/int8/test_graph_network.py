"""An ONNX graph in torch computes what ONNX Runtime computes of it."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.errors import ExportError
from questpress.export.int8.quantizer import prepare
from questpress.export.int8.torch_graph import GraphNetwork, with_weights

from tests.support.graphs import constants, graph_of, run_graph, weights

node = helper.make_node


def computed(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    network = GraphNetwork(model).eval()
    with torch.no_grad():
        return network(torch.from_numpy(batch))[network.output].numpy()


def assert_same(model: onnx.ModelProto, batch: np.ndarray, tolerance: float = 1e-5) -> None:
    (expected,) = run_graph(model, batch, optimized=False)
    output = computed(model, batch)
    assert output.shape == expected.shape
    assert np.abs(output - expected).max() <= tolerance * max(1.0, float(np.ptp(expected)))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_efficientnet", "test_resnet"])
def test_networks_match_torch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7).train()
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32))  # so that no batch norm is the identity
    network.eval()
    file = export_onnx(network, tmp_path / "a.onnx", 32, metadata={})
    batch = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = network(batch).numpy()
    spread = float(np.ptp(expected))
    for model in (onnx.load(str(file.path)), prepare(file.path).model):
        assert np.abs(computed(model, batch.numpy()) - expected).max() <= 1e-4 * spread


W = {"w": weights(4, 3, 3, 3), "b": weights(4)}
HEAD = {"head": weights(192, 5), "bias": weights(5)}
SCALARS = {"zero": np.float32(0), "six": np.float32(6), "half": np.float32(0.5)}


def op(kind: str, inputs: str = "input", outputs: str = "output", **attributes: object) -> onnx.NodeProto:
    """Build a node; two spaces leave out an optional input."""
    return node(kind, inputs.split(" "), outputs.split(), **attributes)


POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}
FLAT = op("Flatten", "input", "f")


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([op("Conv", "input w b", pads=[0, 1, 2, 0], strides=[2, 1])], W),
        ([op("Conv", "input w", pads=[2, 1, 2, 1], dilations=[2, 1])], W),
        ([op("Conv", "input w", group=3, pads=[1, 1, 1, 1])], {"w": weights(6, 1, 3, 3)}),
        ([op("MaxPool", **POOL, ceil_mode=1)], {}),
        ([op("MaxPool", **POOL, pads=[0, 0, 1, 1])], {}),
        ([op("AveragePool", **POOL, pads=[1, 1, 1, 1], ceil_mode=1)], {}),
        ([op("AveragePool", kernel_shape=[3, 2], pads=[0, 1, 1, 0], count_include_pad=1)], {}),
        ([FLAT, op("Gemm", "f head bias")], HEAD),
        ([FLAT, op("Gemm", "f head", transB=1, alpha=0.5)], {"head": weights(5, 192)}),
        ([FLAT, op("Gemm", "f head bias", alpha=2.0, beta=3.0)], HEAD),
        ([op("Clip", "input zero six")], SCALARS),
        ([op("Clip", "input half")], SCALARS),
        ([op("Clip", "input  half")], SCALARS),
        ([op("Clip")], {}),
        ([op("Pad", "input pads half")], {"pads": np.array([0, 0, 1, 2, 0, 0, 3, 0]), **SCALARS}),
        (
            [op("Pad", "input pads  axes", mode="reflect")],
            {"pads": np.array([1, 2, 3, 0]), "axes": np.array([2, -1])},
        ),
        (
            [op("Split", "input sizes", "a b", axis=1), op("Concat", "b a", axis=1)],
            {"sizes": np.array([1, 2])},
        ),
        ([op("Split", "input", "a b c", axis=2, num_outputs=3), op("Concat", "c a b", axis=2)], {}),
        (
            [op("Slice", "input from to over by")],
            {"from": np.array([1, -6]), "to": np.array([3, 2**62]), "over": np.array([1, -1]),
             "by": np.array([1, 2])},
        ),
        (
            [op("Reshape", "input shape", "r"), op("Transpose", "r", perm=[0, 2, 1])],
            {"shape": np.array([0, 6, -1])},
        ),
        ([op("Transpose")], {}),
        (
            [op("ReduceMean", "input axes", "m", keepdims=0), op("Unsqueeze", "m new")],
            {"axes": np.array([2, 3]), "new": np.array([-1, -2])},
        ),
        (
            [op("GlobalAveragePool", "input", "g"), op("Squeeze", "g axes")],
            {"axes": np.array([2, 3])},
        ),
        ([op("HardSigmoid", alpha=1 / 6)], {}),
        ([op("HardSwish")], {}),
        ([op("Mul", "input half", "m"), op("Sub", "six m")], SCALARS),
        ([op("Gelu", approximate="tanh")], {}),
        ([op("PRelu", "input slope")], {"slope": weights(3, 1, 1)}),
        ([op("LeakyRelu")], {}),
        ([op("Softmax", axis=1)], {}),
        (
            [op("BatchNormalization", "input s t m v", epsilon=1e-3)],
            {k: np.abs(weights(3, seed=i)) for i, k in enumerate("stmv")},
        ),
    ],
    ids=lambda value: "-".join(n.op_type for n in value) if isinstance(value, list) else "",
)  # fmt: skip
def test_operator_matches_onnx_runtime(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> None:
    opset = 20 if nodes[0].op_type == "Gelu" else 18
    assert_same(graph_of(nodes, constants, opset=opset), 3 * weights(2, 3, 8, 8, seed=7))


def test_max_pool_whose_last_window_begins_in_the_padding_is_as_onnx_runtimes() -> None:
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}
    for size in (7, 8):
        model = graph_of(
            [node("MaxPool", ["input"], ["output"], **attributes)], {}, given=("batch", 3, size, size)
        )
        assert_same(model, weights(2, 3, size, size) - 5)


def two_layers() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["input", "layer.w"], ["a"], name="conv"),
        node("Clip", ["a", "zero", "six"], ["b"], name="clip"),
        node("Flatten", ["b"], ["c"], name="flat"),
        node("Gemm", ["c", "head", "bias"], ["output"], name="gemm"),
    ]
    constants = {
        "layer.w": weights(4, 3, 3, 3),
        "zero": np.float32(0),
        "six": np.float32(6),
        "head": weights(144, 5, seed=1),
        "bias": weights(5, seed=2),
    }
    return graph_of(nodes, constants)


def test_weights_are_the_float_constants_and_go_back_into_a_copy_of_the_graph() -> None:
    model = two_layers()
    untouched = model.SerializeToString()
    network = GraphNetwork(model)
    assert sorted(network.names) == ["bias", "head", "layer.w"]
    assert {p.shape for p in network.parameters()} == {(4, 3, 3, 3), (144, 5), (5,)}
    assert with_weights(model, network).SerializeToString() == untouched
    with torch.no_grad():
        network.weight("layer.w").mul_(2)
        network.weight("bias").add_(1)
    changed = with_weights(model, network)
    assert np.array_equal(constants(changed)["layer.w"], 2 * weights(4, 3, 3, 3))
    assert np.array_equal(constants(changed)["bias"], weights(5, seed=2) + 1)
    assert model.SerializeToString() == untouched


def test_weights_learn_by_torchs_gradients() -> None:
    network = GraphNetwork(two_layers())
    batch = torch.from_numpy(weights(2, 3, 8, 8, seed=3))
    network(batch)["output"].square().sum().backward()
    w, head, bias = (network.weight(name) for name in ("layer.w", "head", "bias"))
    copies = [weight.detach().clone().requires_grad_() for weight in (w, head, bias)]
    middle = torch.nn.functional.conv2d(batch, copies[0]).clamp(0, 6).flatten(1)
    (middle @ copies[1] + copies[2]).square().sum().backward()
    for weight, expected in zip((w, head, bias), copies, strict=True):
        assert weight.grad is not None and expected.grad is not None
        assert torch.allclose(weight.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_tensors_wanted_are_given_by_name_and_no_others() -> None:
    network = GraphNetwork(two_layers()).eval()
    batch = torch.from_numpy(weights(2, 3, 8, 8, seed=3))
    with torch.no_grad():
        tensors = network(batch, wanted=["a", "b"])
    assert sorted(tensors) == ["a", "b", "output"]
    assert torch.equal(tensors["b"], tensors["a"].clamp(0, 6))
    assert tensors["a"].min() < 0


def test_unsupported_operator_is_named() -> None:
    model = graph_of([node("CumSum", ["input", "axis"], ["output"], name="sums")], {"axis": np.array(1)})
    with pytest.raises(ExportError, match=r"has the operator CumSum \(sums\), which cannot be computed in"):
        GraphNetwork(model)


def test_unsupported_padding_is_named() -> None:
    for nodes, reason in [
        ([node("Conv", ["input", "w"], ["output"], auto_pad="SAME_UPPER")], "auto_pad SAME_UPPER cannot be"),
        (
            [node("AveragePool", ["input"], ["output"], kernel_shape=[2, 2], pads=[0, 0, 1, 1])],
            "an AveragePool with uneven padding cannot be",
        ),
    ]:
        with pytest.raises(ExportError, match=reason), warnings.catch_warnings():
            warnings.simplefilter("error")
            computed(graph_of(nodes, W), weights(1, 3, 8, 8))
