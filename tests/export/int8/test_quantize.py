"""The int8 file stays close to the float one, is small, carries its metadata, and runs in integers."""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from questpress.export import runtime
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.errors import ExportError
from questpress.export.int8.quantizer import int8_scope
from torch import nn

from tests.support.networks import (
    color_classifier,
    images,
    quantize_int8,
    signal_to_noise,
    small_conv_net,
)

METADATA = runtime.build_metadata(
    runtime.Preprocessing.create(16), ["a", "b", "c", "d"], {"student": "small"}
)


def logits(path: Path, batch: np.ndarray) -> np.ndarray:
    return runtime.open_session(path, 1).run(None, {"input": batch})[0]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "small.onnx"
    return export_onnx(small_conv_net(), path, 16, metadata=METADATA).path


@pytest.mark.parametrize("method", ["minmax", "percentile", "moving-average", "entropy"])
def test_int8_logits_stay_close_to_float(fp32: Path, tmp_path: Path, method: str) -> None:
    file = quantize_int8(fp32, tmp_path / "a.onnx", [images(32)], method=method)
    fresh = images(64, seed=1)
    assert signal_to_noise(logits(fp32, fresh), logits(file.path, fresh)) > (
        15 if method == "entropy" else 25
    )
    assert file.recipe["calibration"] == {"method": method, "images": 32}


def test_all_but_the_first_convolution_runs_in_integers(fp32: Path, tmp_path: Path) -> None:
    file = quantize_int8(fp32, tmp_path / "a.onnx", [images(16)], target_name="x86-vnni")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node)
    assert kinds["QLinearConv"] == 2 and kinds["QLinearGlobalAveragePool"] == 1 and kinds["QGemm"] == 1
    assert kinds["QuantizeLinear"] == 1 and kinds["DequantizeLinear"] == 1
    floats = [kind for kind in kinds if kind in ("Conv", "Gemm", "ReduceMean", "Clip", "Add")]
    assert floats == ["Conv"] and kinds["Conv"] == 1


def test_metadata_is_carried_over_and_the_file_predicts_alone(fp32: Path, tmp_path: Path) -> None:
    file = quantize_int8(fp32, tmp_path / "a.onnx", [images(16)])
    model = onnx.load(str(file.path))
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert {key: entries[key] for key in METADATA} == METADATA
    assert json.loads(entries["questpress.quantization"]) == file.recipe
    assert file.ir_version == model.ir_version == 8 and file.opset == 18
    assert file.bytes == file.path.stat().st_size
    assert runtime.Classifier.load(file.path).labels == ("a", "b", "c", "d")


def test_same_input_gives_the_same_bytes_in_any_process(fp32: Path, tmp_path: Path) -> None:
    here = quantize_int8(fp32, tmp_path / "here.onnx", [images(16)])
    np.save(tmp_path / "images.npy", images(16))
    code = (
        "import numpy, sys; from tests.support.networks import quantize_int8; "
        "quantize_int8(sys.argv[1], sys.argv[2], [numpy.load(sys.argv[3])])"
    )
    for seed in ("1", "2"):
        there = tmp_path / f"there{seed}.onnx"
        subprocess.run(
            [sys.executable, "-c", code, str(fp32), str(there), str(tmp_path / "images.npy")],
            check=True,
            cwd=Path(__file__).parents[3],
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert there.read_bytes() == here.path.read_bytes()


def test_how_calibration_images_are_cut_into_batches_does_not_matter(fp32: Path, tmp_path: Path) -> None:
    whole = quantize_int8(fp32, tmp_path / "a.onnx", [images(20)])
    cut = quantize_int8(fp32, tmp_path / "b.onnx", lambda: iter([images(20)[:3], images(20)[3:]]))
    assert whole.sha256 == cut.sha256


def test_quantization_prints_and_leaves_nothing(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    handlers, filters = list(logging.getLogger().handlers), list(logging.getLogger().filters)
    siblings = sorted(fp32.parent.iterdir())
    for method in ("minmax", "percentile"):
        quantize_int8(fp32, tmp_path / "a.onnx", [images(8)], method=method)
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.onnx", "cwd", "temporary"]
    assert sorted(fp32.parent.iterdir()) == siblings
    assert (logging.getLogger().handlers, logging.getLogger().filters) == (handlers, filters)


def test_calibration_without_images_or_with_broken_ones_is_refused(fp32: Path, tmp_path: Path) -> None:
    broken = images(4)
    broken[2, 0, 0, 0] = np.nan
    for calibration, reason in [
        ([], "there are none"),
        ([images(0)], "there are none"),
        ([broken], "images contain values that are not finite"),
        ([np.full((4, 3, 16, 16), 3e38, np.float32)], "activations on the calibration images are not finite"),
    ]:
        with pytest.raises(ExportError, match=reason):
            quantize_int8(fp32, tmp_path / "a.onnx", calibration)
    with pytest.raises(ExportError, match=r"Unknown calibration method 'best'\. Choose from minmax"):
        quantize_int8(fp32, tmp_path / "a.onnx", [images(4)], method="best")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        quantize_int8(tmp_path / "text.onnx", tmp_path / "a.onnx", [images(4)])
    assert not (tmp_path / "a.onnx").exists()


def test_transformer_keeps_attention_and_its_residual_stream_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=5, img_size=32)
    file = export_onnx(network, tmp_path / "vit.onnx", 32, metadata={})
    scope = int8_scope(onnx.load(str(file.path)))
    assert scope.op_types == ("Conv", "Gemm", "MatMul") and scope.kept_float
    int8 = quantize_int8(file.path, tmp_path / "vit.int8.onnx", [images(16, 32)])
    fresh = images(16, 32, seed=1)
    assert signal_to_noise(logits(file.path, fresh), logits(int8.path, fresh)) > 20


def test_head_without_convolutions_and_one_class_quantize(tmp_path: Path) -> None:
    path = color_classifier(tmp_path / "colors.onnx", {})
    file = quantize_int8(path, tmp_path / "a.onnx", [images(64, 8)])
    assert signal_to_noise(logits(path, images(8, 8, 1)), logits(file.path, images(8, 8, 1))) > 25
    for classes in (1, 1000):
        path = export_onnx(small_conv_net(classes), tmp_path / "b.onnx", 16, metadata={}).path
        file = quantize_int8(path, tmp_path / "c.onnx", [images(8)])
        assert logits(file.path, images(3)).shape == (3, classes)


def test_mobilenetv2_shrinks_at_least_3_4_times(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv2_100", num_classes=10)
    fp32 = export_onnx(network, tmp_path / "a.onnx", 32, metadata={})
    int8 = quantize_int8(fp32.path, tmp_path / "b.onnx", [images(8, 32)])
    assert fp32.bytes / int8.bytes >= 3.7


def test_network_with_group_norm_stays_partly_float_and_keeps_its_hard_swish(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 4, 3), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    path = export_onnx(network, tmp_path / "a.onnx", 16, metadata={}).path
    file = quantize_int8(path, tmp_path / "b.onnx", [images(16)])
    assert file.recipe["rewritten"] == ["pool_globally"]
    fresh = images(16, seed=1)
    assert signal_to_noise(logits(path, fresh), logits(file.path, fresh)) > 25
