"""The exported file is the network: same outputs, nothing of the machine in it, the same bytes every time."""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from questpress.export import runtime
from questpress.export.conversion.onnx_export import (
    MIN_OPSET,
    OnnxFile,
    check_parity,
    export_onnx,
    max_opset,
    merge_branches,
)
from questpress.export.errors import ExportError
from questpress.export.latency.runner import Subject, bench
from timm.layers import StdConv2d
from timm.models.byobnet import MobileOneBlock
from torch import nn

from tests.support.networks import (
    PREPROCESSING,
    SmallConvNet,
    quantize_int8,
    signal_to_noise,
    small_conv_net,
)

METADATA = runtime.build_metadata(
    runtime.Preprocessing.create(16), ["a", "b", "ç", "d"], {"student": "small", "teachers": []}
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallConvNet, OnnxFile]:
    network = small_conv_net()
    return network, export_onnx(
        network, tmp_path_factory.mktemp("export") / "small.onnx", 16, metadata=METADATA
    )


def test_onnx_matches_torch_at_any_batch_size(exported: tuple[SmallConvNet, OnnxFile]) -> None:
    network, file = exported
    images = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = network(images).detach().numpy()
    session = runtime.open_session(file.path, 1)
    for size in (1, 3, 7):
        output = np.concatenate([session.run(None, {"input": c.numpy()})[0] for c in images.split(size)])
        np.testing.assert_allclose(output, expected, atol=1e-5)
    parity = check_parity(network, file.path, images)
    assert parity.n == 7 and parity.batch_sizes == (1, 5)
    assert parity.max_abs <= 1e-5
    spread = expected.max() - expected.min()
    assert parity.max_rel == pytest.approx(parity.max_abs / spread)


def test_inputs_outputs_and_metadata_are_named(exported: tuple[SmallConvNet, OnnxFile]) -> None:
    _, file = exported
    model = onnx.load(str(file.path))
    assert model.graph.input[0].name == "input" and model.graph.output[0].name == "logits"
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch" and [d.dim_value for d in shape[1:]] == [3, 16, 16]
    out = model.graph.output[0].type.tensor_type.shape.dim
    assert out[0].dim_param == "batch" and out[1].dim_value == 4
    assert {entry.key: entry.value for entry in model.metadata_props} == METADATA
    assert file.opset == 18 and file.ir_version == model.ir_version == 8
    content = file.path.read_bytes()
    assert file.bytes == len(content)
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert "ç" in json.loads(METADATA["questpress.labels"])


@pytest.mark.parametrize(
    "name", ["mobileone_s0", "repvgg_a0", "repvit_m0_9", "fastvit_t8", "repghostnet_050", "levit_128s"]
)
def test_training_branches_are_merged(name: str) -> None:
    size = 224 if name.startswith("levit") else 64
    network = timm.create_model(name, num_classes=5).train()
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = None  # the statistics are those of the images
    network(images)
    network.eval().double()
    merged = merge_branches(network).double()
    expected, logits = network(images.double()), merged(images.double())
    assert (logits - expected).abs().max() < 1e-4 * (expected.max() - expected.min())
    count = [sum(parameter.numel() for parameter in n.parameters()) for n in (network, merged)]
    assert count[1] < count[0] and next(network.parameters()).dtype == torch.float64


def test_network_without_branches_is_only_copied() -> None:
    network = timm.create_model("mobilenetv2_035", num_classes=5)
    merged = merge_branches(network).state_dict()
    assert merged.keys() == network.state_dict().keys()
    assert all(torch.equal(merged[key], value) for key, value in network.state_dict().items())


def test_merged_network_is_exported_and_compared_with_the_unmerged_one(tmp_path: Path) -> None:
    blocks = [MobileOneBlock(3, 8, stride=2), MobileOneBlock(8, 8, group_size=1)]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    file = export_onnx(network, tmp_path / "a.onnx", 32, metadata={})
    assert check_parity(network, file.path, torch.randn(4, 3, 32, 32)).max_rel < 1e-4
    operators = [node.op_type for node in onnx.load(str(file.path)).graph.node]
    assert operators.count("Conv") == 2 and "Add" not in operators and "BatchNormalization" not in operators


def test_no_trace_of_source_files_is_left(exported: tuple[SmallConvNet, OnnxFile]) -> None:
    _, file = exported
    model = onnx.load(str(file.path))
    for entry in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.initializer):
        assert not entry.metadata_props and not entry.doc_string
    assert not model.graph.metadata_props and not model.doc_string
    content = file.path.read_bytes()
    home = str(Path.home()).encode()
    for trace in (b"site-packages", b"stack_trace", b"networks.py", b"SmallConvNet", home):
        assert trace not in content


def test_same_network_gives_the_same_bytes(exported: tuple[SmallConvNet, OnnxFile], tmp_path: Path) -> None:
    network, file = exported
    again = export_onnx(network, tmp_path / "again.onnx", 16, metadata=METADATA)
    assert again.path.read_bytes() == file.path.read_bytes()


def test_export_leaves_the_network_unchanged(tmp_path: Path) -> None:
    network = small_conv_net().to(memory_format=torch.channels_last).double()
    network.train()
    network.stem[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    export_onnx(network, tmp_path / "a.onnx", 16, metadata={})
    assert network.training and not network.stem[1].training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in network.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


def test_export_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    handlers, level = list(logging.getLogger().handlers), logging.getLogger("torch.onnx").level
    export_onnx(small_conv_net(), tmp_path / "a.onnx", 16, metadata={})
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert logging.getLogger().handlers == handlers and logging.getLogger("torch.onnx").level == level


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("test_vit", 32, {"img_size": 32}),
        ("test_byobnet", 32, {}),
        ("test_convnext", 32, {}),
        ("test_efficientnet", 32, {}),
    ],
)
def test_timm_families_can_be_exported(name: str, size: int, options: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5, **options).train()
    file = export_onnx(network, tmp_path / "a.onnx", size, metadata={})
    parity = check_parity(network, file.path, torch.randn(6, 3, size, size))
    assert min(parity.max_abs, parity.max_rel) <= 1e-4


class ZeroPaddedPool(nn.Module):
    """BiT's stem: the padding is 0 where the pooling's own would be minus infinity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(nn.functional.pad(-x.abs() - 1, (1, 1, 1, 1)), 3, 2)
        return x.mean((2, 3))


def test_zero_padding_before_a_max_pool_stays_zero(tmp_path: Path) -> None:
    file = export_onnx(ZeroPaddedPool(), tmp_path / "a.onnx", 8, metadata={})
    assert check_parity(ZeroPaddedPool(), file.path, torch.randn(5, 3, 8, 8)).max_abs <= 1e-5


class Standardized(nn.Module):
    """A convolution whose weights are standardized at every call, as those of BiT and NFNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = StdConv2d(3, 64, 5, padding=2, bias=False)
        self.again = StdConv2d(64, 4, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.conv(x).relu()).mean((2, 3))


def test_weights_computed_from_weights_are_computed_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Standardized()
    file = export_onnx(network, tmp_path / "a.onnx", 8, metadata={})
    check_parity(network, file.path, torch.randn(5, 3, 8, 8))
    model = onnx.load(str(file.path))
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "Conv", "ReduceMean"]
    weights = sum(parameter.numel() for parameter in network.parameters()) * 4
    assert weights < file.bytes < weights + 3000


class WrongAtBatch(nn.Module):
    """What an image gets depends on the others of its batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean((2, 3))
        return x - x.mean(0, keepdim=True)


class Loop(nn.Module):
    """Goes by the values of its input: no graph can hold it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if bool(x.sum() > 0) else x.amax((2, 3))


def test_parity_fails_for_another_network(exported: tuple[SmallConvNet, OnnxFile]) -> None:
    _, file = exported
    images = torch.randn(5, 3, 16, 16)
    with pytest.raises(ExportError, match=r"logits differ from the network's by up to \d.*0\.0001 is"):
        check_parity(small_conv_net(seed=1), file.path, images)
    with pytest.raises(ExportError, match=r"logits of shape \(5, 4\), the network \(5, 7\)"):
        check_parity(small_conv_net(classes=7), file.path, images)
    with pytest.raises(ExportError, match="no images"):
        check_parity(small_conv_net(), file.path, images[:0])


def test_parity_fails_for_non_finite_logits(tmp_path: Path) -> None:
    network = small_conv_net()
    with torch.no_grad():
        network.classifier.bias[2] = float("nan")
    file = export_onnx(network, tmp_path / "a.onnx", 16, metadata={})
    with pytest.raises(ExportError, match="not finite"):
        check_parity(network, file.path, torch.randn(5, 3, 16, 16))


def test_parity_fails_if_outputs_depend_on_the_batch(tmp_path: Path) -> None:
    file = export_onnx(WrongAtBatch(), tmp_path / "a.onnx", 8, metadata={})
    with pytest.raises(ExportError, match=r"logits differ from the network's by .* on 5 images"):
        check_parity(WrongAtBatch(), file.path, torch.randn(5, 3, 8, 8))


def test_network_that_cannot_be_exported_is_named_and_no_file_is_left(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Loop at 8 px cannot be exported to ONNX") as raised:
        export_onnx(Loop(), tmp_path / "a.onnx", 8, metadata={})
    assert "\n" not in str(raised.value)
    with pytest.raises(ExportError, match=r"not \[batch, classes\]"):
        export_onnx(nn.Conv2d(3, 4, 1), tmp_path / "a.onnx", 8, metadata={})
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="Could not write"):
        export_onnx(small_conv_net(), tmp_path / "file" / "a.onnx", 16, metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_network_over_2_gb_has_external_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("questpress.export.conversion.onnx_export.MAX_EMBEDDED_BYTES", 1000)
    network = small_conv_net()
    file = export_onnx(network, tmp_path / "big.onnx", 16, metadata=METADATA)
    data = tmp_path / "big.onnx.data"
    assert file.bytes == file.path.stat().st_size + data.stat().st_size
    check_parity(network, file.path, torch.randn(5, 3, 16, 16))
    inputs = np.zeros((2, 3, 16, 16), np.float32)
    timed = bench([Subject("big", file.path, inputs)], threads=[1], seconds=0.05)
    assert timed.latency("big", 1).n > 0
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    taking = export_onnx(network, tmp_path / "pixels.onnx", 16, metadata=METADATA, pixels=PREPROCESSING)
    assert taking.path.with_name("pixels.onnx.data").exists()
    normalized = torch.from_numpy(runtime.normalize(pixels, PREPROCESSING))
    check_parity(network, taking.path, normalized, pixels=pixels)
    monkeypatch.undo()
    export_onnx(network, tmp_path / "big.onnx", 16, metadata=METADATA)
    assert not data.exists()


@pytest.mark.parametrize("opset", [MIN_OPSET, max_opset()])
def test_oldest_and_the_newest_opset_are_written_and_quantized(opset: int, tmp_path: Path) -> None:
    network = small_conv_net()
    file = export_onnx(network, tmp_path / "a.onnx", 16, metadata=METADATA, opset=opset)
    written = {entry.domain: entry.version for entry in onnx.load(str(file.path)).opset_import}
    assert file.opset == opset and written[""] == opset
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert check_parity(network, file.path, images).max_abs <= 1e-5
    int8 = quantize_int8(file.path, tmp_path / "b.onnx", [images.numpy()])
    assert int8.opset == opset
    expected, quantized = (
        runtime.open_session(path, 1).run(None, {"input": images.numpy()})[0]
        for path in (file.path, int8.path)
    )
    assert signal_to_noise(expected, quantized) > 25


@pytest.mark.parametrize("opset", [0, MIN_OPSET - 1, max_opset() + 1])
def test_opset_out_of_range_is_refused(opset: int, tmp_path: Path) -> None:
    allowed = rf"Opset {opset} is not supported .* Choose one from 18 to {max_opset()}\."
    with pytest.raises(ExportError, match=allowed):
        export_onnx(small_conv_net(), tmp_path / "a.onnx", 16, metadata={}, opset=opset)
    assert not list(tmp_path.iterdir())


def test_opset_that_the_exporter_did_not_honor_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("questpress.export.conversion.onnx_export.check_opset", lambda _: None)
    with pytest.raises(ExportError, match=r"to opset 17: the exporter wrote opset 18\. Use"):
        export_onnx(small_conv_net(), tmp_path / "a.onnx", 16, metadata={}, opset=17)
    assert not list(tmp_path.iterdir())


def test_hard_sigmoid_is_written_as_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.Hardsigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    network = nn.Sequential(*layers).eval()
    path = export_onnx(network, tmp_path / "net.onnx", 8, metadata={}).path
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "Clip" in operators and "HardSigmoid" not in operators
    x = torch.randn(3, 3, 8, 8) * 9
    output = runtime.open_session(path, 1).run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(output, network(x).detach().numpy(), atol=1e-5)
