"""Fake quantization computes as the file does, learns as it should, and leaves the rest alone."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper
from questpress.export import runtime
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.int8.fake_quantize import FakeQuantized, Range
from questpress.export.int8.quantizer import Prepared, calibrate_ranges, prepare, quantize, write_int8
from questpress.export.int8.targets import find_target

from tests.support import graphs
from tests.support.graphs import constants, graph_of, weights
from tests.support.networks import images, signal_to_noise, small_conv_net

node = helper.make_node


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    path = tmp_path_factory.mktemp("fake") / "small.onnx"
    return prepare(export_onnx(small_conv_net(), path, 16, metadata={}).path)


def quantized(prepared: Prepared, name: str, batch: np.ndarray) -> tuple[onnx.ModelProto, FakeQuantized]:
    ranges, _ = calibrate_ranges(prepared.model, [batch], "minmax", prepared.scope.op_types)
    types = find_target(name)
    qdq = quantize(prepared, ranges, types)
    return qdq, FakeQuantized(prepared, qdq, types).eval()


def of_file(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    return runtime.open_session(model.SerializeToString(), 1, fuse=False).run(None, {"input": batch})[0]


def of_fake(network: FakeQuantized, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(batch))[network.output].numpy()


@pytest.mark.parametrize("name", ["x86", "x86-vnni", "arm64"])
def test_fake_quantization_matches_the_file(prepared: Prepared, name: str) -> None:
    qdq, network = quantized(prepared, name, images(32))
    batch = images(64, seed=1)
    expected, output = of_file(qdq, batch), of_fake(network, batch)
    # Biases of 32 bits are rounded, too: now and then a number falls on the other side of a half.
    step = float(network.ranges[network.range_of[network.output]].affine()[0])
    off = np.abs(output - expected)
    assert (off <= 2.01 * step).all() and (off > 1e-3 * step).mean() < 0.15
    exact = runtime.open_session(prepared.model.SerializeToString(), 1).run(None, {"input": batch})[0]
    assert signal_to_noise(expected, output) > signal_to_noise(exact, expected) + 5


def test_residual_network_matches_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=5).train()
    with torch.no_grad():
        for _ in range(5):
            net(torch.from_numpy(images(16)))
    ready = prepare(export_onnx(net.eval(), tmp_path / "a.onnx", 16, metadata={}).path)
    batch = images(32, seed=1)
    exact = runtime.open_session(ready.model.SerializeToString(), 1).run(None, {"input": batch})[0]
    for name in ("x86-vnni", "arm64"):
        qdq, network = quantized(ready, name, images(32))
        expected, output = of_file(qdq, batch), of_fake(network, batch)
        assert signal_to_noise(expected, output) > signal_to_noise(exact, expected) + 2


def test_without_rounding_the_graph_is_float(prepared: Prepared) -> None:
    _, network = quantized(prepared, "x86-vnni", images(32))
    batch = images(8, seed=1)
    exact = runtime.open_session(prepared.model.SerializeToString(), 1).run(None, {"input": batch})[0]
    with network.rounding(frozenset()):
        output = of_fake(network, batch)
    assert np.abs(output - exact).max() <= 1e-5 * np.ptp(exact)
    assert network.only is None


def test_each_rounding_alone_makes_noise_and_together_they_are_all_of_it(prepared: Prepared) -> None:
    _, network = quantized(prepared, "arm64", images(32))
    batch = images(8, seed=1)
    with network.rounding(frozenset()):
        exact = of_fake(network, batch)
    sources = network.sources()
    assert {"input", "logits"} <= set(sources) and len(sources) == len(set(sources))
    products = [n for n in prepared.model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert {n.input[1] for n in products} <= set(sources)  # their weights, and no biases
    assert not {n.input[2] for n in products} & set(sources)
    for source in sources:
        with network.rounding(frozenset({source})):
            assert not np.array_equal(of_fake(network, batch), exact)
    with network.rounding(frozenset(sources)):
        together = of_fake(network, batch)
    assert np.array_equal(together, of_fake(network, batch))


def test_gradient_of_the_numbers_is_one_inside_the_range_and_none_outside() -> None:
    module = Range(0.1, 100, 0, 255)  # from −10.0 to 15.5
    x = torch.tensor([-12.0, -10.2, -9.9, 0.03, 7.77, 15.4, 15.7, 40.0], requires_grad=True)
    upstream = torch.arange(1.0, 9.0)
    (module(x) * upstream).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]


@pytest.mark.parametrize(("zero", "qmin", "qmax"), [(100, 0, 255), (-28, -128, 127)])
def test_gradient_of_an_end_is_that_of_what_it_cuts(zero: int, qmin: int, qmax: int) -> None:
    module = Range(0.1, zero, qmin, qmax)
    # What is inside lies on levels, so that all of the gradient comes from what is cut.
    low, high = (qmin - zero) * 0.1, (qmax - zero) * 0.1
    x = torch.tensor([low - 3, low - 1, 0.0, high + 1, high + 2, high + 3])
    upstream = torch.tensor([1.0, 2.0, 5.0, 1.0, 1.0, 4.0])
    (module(x) * upstream).sum().backward()
    share = 1 / np.sqrt(x.numel() * 255)
    assert module.logs.grad is not None
    # Of an end e^l times what it was, the derivative by l at 0 is the end.
    expected = [3.0 * low * share, 6.0 * high * share]
    assert module.logs.grad.tolist() == pytest.approx(expected, rel=1e-4)

    def clipped(down: float, up: float) -> float:
        ends = low * np.exp(down), high * np.exp(up)
        return float((x.double().clamp(*ends) * upstream).sum()) * share

    ε = 1e-5
    finite = [(clipped(ε, 0) - clipped(-ε, 0)) / (2 * ε), (clipped(0, ε) - clipped(0, -ε)) / (2 * ε)]
    assert module.logs.grad.tolist() == pytest.approx(finite, rel=1e-3)


def test_inside_the_range_its_scale_learns_by_the_rounding_error() -> None:
    module = Range(0.5, 4, 0, 255)
    x = torch.tensor([0.6, 1.3, 2.1])  # 1.2, 2.6 and 4.2 steps: rounded by −0.2, 0.4 and −0.2
    module(x).sum().backward()
    of_scale = (-0.2 + 0.4 - 0.2) / 255
    ends, share = (-2.0, 125.5), 1 / np.sqrt(3 * 255)
    assert module.logs.grad is not None
    assert module.logs.grad.tolist() == pytest.approx(
        [-of_scale * ends[0] * share, of_scale * ends[1] * share], abs=1e-6
    )


def test_end_that_is_zero_stays_zero() -> None:
    module = Range(0.02, 0, 0, 255)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    x = torch.linspace(-1, 9, 50)
    module(x).square().sum().backward()
    optimizer.step()
    scale, zero = module.affine()
    assert int(zero) == 0 and float(scale) != pytest.approx(0.02)
    assert module(x).min().item() == 0


def test_untrained_ranges_give_the_same_file(prepared: Prepared, tmp_path: Path) -> None:
    ranges, _ = calibrate_ranges(prepared.model, [images(32)], "minmax", prepared.scope.op_types)
    for name in ("x86", "x86-vnni", "arm64"):
        types = find_target(name)
        plain = quantize(prepared, ranges, types)
        overrides = FakeQuantized(prepared, plain, types).overrides()
        assert overrides
        again = quantize(prepared, ranges, types, overrides=overrides)
        files = [
            write_int8(prepared, model, tmp_path / f"{i}.onnx", {}) for i, model in enumerate((plain, again))
        ]
        assert files[0].sha256 == files[1].sha256
        assert hashlib.sha256(files[1].path.read_bytes()).hexdigest() == files[0].sha256


def test_learned_ranges_are_those_of_the_file(prepared: Prepared) -> None:
    types = find_target("x86-vnni")
    ranges, _ = calibrate_ranges(prepared.model, [images(32)], "minmax", prepared.scope.op_types)
    network = FakeQuantized(prepared, quantize(prepared, ranges, types), types).eval()
    with torch.no_grad():
        for index, module in enumerate(network.ranges.values()):
            module.logs.copy_(torch.tensor([-0.1 - 0.01 * index, -0.3 + 0.02 * index]))
    overrides = network.overrides()
    learned = quantize(prepared, ranges, types, overrides=overrides)
    held = constants(learned)
    seen = 0
    for n in learned.graph.node:
        if n.op_type == "QuantizeLinear":
            wanted = overrides[n.input[0].removesuffix("_QuantizeLinear_Input")]
            assert np.array_equal(held[n.input[1]], wanted["scale"])
            assert np.array_equal(held[n.input[2]], wanted["zero_point"])
            seen += 1
    assert seen == len(network.range_of) and "logits" in overrides
    batch = images(32, seed=1)
    expected, output = of_file(learned, batch), of_fake(network, batch)
    assert signal_to_noise(expected, output) > 30


def test_block_whose_last_channels_are_zero_gives_no_nan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=5, zero_init_last=True)
    ready = prepare(export_onnx(net.eval(), tmp_path / "a.onnx", 16, metadata={}).path)
    assert any(x.ndim == 4 and not x.any() for x in constants(ready.model).values())  # γ = 0, folded
    for name in ("x86", "x86-vnni", "arm64"):
        qdq, network = quantized(ready, name, images(16))
        batch = images(8, seed=1)
        output = network(torch.from_numpy(batch))[network.output]
        assert torch.isfinite(output).all() and np.isfinite(of_file(qdq, batch)).all()
        output.square().sum().backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
        weight = next(
            n for n in network.names if not network.weight(n).any() and network.weight(n).dim() == 4
        )
        assert network.weight(weight).grad is not None
        assert float(network.weight(weight).grad.abs().max()) > 0  # it can learn away from zero
        for override in network.overrides().values():
            assert np.isfinite(override["scale"]) and override["scale"] > 0


def test_one_dead_channel_among_live_ones_is_exactly_dead() -> None:
    w = weights(4, 3, 1, 1)
    w[2] = 0
    nodes = [
        node("Conv", ["input", "w"], ["a"], name="dead"),
        node("Relu", ["a"], ["b"], name="relu"),
        node("Conv", ["b", "v"], ["output"], name="reads"),
    ]
    model = graph_of(nodes, {"w": w, "v": weights(2, 4, 1, 1)}, given=("batch", 3, 16, 16))
    _, network = quantized(graphs.prepared(model), "arm64", images(8))
    with torch.no_grad():
        tensors = network(torch.from_numpy(images(2)), wanted=["b"])
    assert not tensors["b"][:, 2].any() and tensors["b"].any() and torch.isfinite(tensors["output"]).all()
