"""fp16 files: their logits, and what their emulation finds that ONNX Runtime's CPU kernels hide."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from questpress.export import runtime
from questpress.export.conversion.half import emulate_half, write_half
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.errors import ExportError
from questpress.export.runtime import Classifier
from questpress.models.build import build
from questpress.pipeline.stages.formats import compare_logits
from questpress.pipeline.tasks import load_task
from questpress.pipeline.tasks.base import Outputs

from tests.support.networks import LABELS, PREPROCESSING, color_classifier


def logits(path: Path, pixels: np.ndarray) -> np.ndarray:
    model = Classifier.load(path, threads=1)
    return model.logits(model.to_input(pixels))


@pytest.mark.parametrize(("name", "takes_pixels"), [("test_efficientnet", True), ("test_vit", False)])
def test_fp16_logits_are_those_of_fp32_and_of_torch_in_fp16(
    name: str, takes_pixels: bool, tmp_path: Path
) -> None:
    preprocessing = runtime.Preprocessing.create(64, 1.0, "bilinear", "squash")
    torch.manual_seed(0)
    network = build(name, num_classes=3, image_size=64, seed=0).eval()
    metadata = runtime.build_metadata(preprocessing, LABELS, {}, takes_pixels=takes_pixels)
    pixels = preprocessing if takes_pixels else None
    source, half, emulated = (tmp_path / f"{file}.onnx" for file in ("fp32", "fp16", "emulated"))
    fp32 = export_onnx(network, source, 64, metadata=metadata, pixels=pixels)
    file = write_half(source, half)
    emulate_half(half, emulated)
    assert file.bytes < 0.62 * fp32.bytes and file.bytes == half.stat().st_size
    assert (file.opset, file.ir_version) == (fp32.opset, fp32.ir_version)
    model, before = onnx.load(half), onnx.load(source)
    onnx.checker.check_model(model, full_check=True)
    assert (model.graph.input, model.graph.output) == (before.graph.input, before.graph.output)
    assert model.metadata_props == before.metadata_props
    weights = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert weights == {TensorProto.FLOAT16}

    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    expected, shipped, rounded = (logits(path, images) for path in (source, half, emulated))
    largest = np.abs(expected).max()
    assert rounded.dtype == shipped.dtype == np.float32
    for result in (shipped, rounded):
        assert 0 < np.abs(result - expected).max() < 0.01 * largest
    np.testing.assert_array_equal(rounded, rounded.astype(np.float16))  # every tensor, the logits too
    with torch.no_grad():
        inputs = torch.from_numpy(runtime.normalize(images, preprocessing))
        of_torch = network.half()(inputs.half()).float().numpy()
    assert np.abs(rounded - of_torch).max() < 0.01 * largest


def test_overflow_that_the_cpu_hides_is_found(tmp_path: Path) -> None:
    weights = [
        numpy_helper.from_array(np.float32(scale * np.eye(3).reshape(3, 3, 1, 1)), name)
        for name, scale in (("up", 60_000), ("down", 1e-3))
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "up"], ["large"]),
            helper.make_node("Conv", ["large", "down"], ["small"]),
            helper.make_node("GlobalAveragePool", ["small"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["logits"]),
        ],
        "overflow",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, runtime.build_metadata(PREPROCESSING, LABELS, {}))
    source, half, emulated = (tmp_path / f"{file}.onnx" for file in ("fp32", "fp16", "emulated"))
    onnx.save(model, source)
    write_half(source, half)
    emulate_half(half, emulated)
    inputs = np.full((1, 3, 8, 8), 2, dtype=np.float32)
    outputs = [Classifier.load(path, threads=1).logits(inputs) for path in (source, half, emulated)]
    np.testing.assert_allclose(outputs[0], 120, rtol=1e-3)
    np.testing.assert_allclose(outputs[1], 120, rtol=1e-3)  # 120,000 exceeds fp16, but is never in fp16
    assert not np.isfinite(outputs[2]).any()


def test_network_that_cannot_be_converted_is_an_error(tmp_path: Path) -> None:
    path = color_classifier(tmp_path / "fp32.onnx")
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"fp32.onnx cannot be converted to fp16: .*NoSuchOperator"):
        write_half(path, tmp_path / "half.onnx")


@pytest.mark.parametrize(
    ("half", "problem"),
    [
        ([[3.0, 0.0], [np.inf, 4.0]], "logits are not finite on some of 2 images. The largest value of fp16"),
        ([[3.0, 0.0], [0.0, 4.3]], "logits of up to 4 differ by 0.3, .* on 2 of 2 images"),
        ([[3.0, 0.0], [0.0, 4.1]], None),
    ],
)
def test_logits_that_differ_from_fp32_are_refused(half: list[list[float]], problem: str | None) -> None:
    labels, task = np.array([0, 1]), load_task("classification")
    fp32, fp16 = (Outputs(np.array(x), labels) for x in ([[3.0, 0.0], [0.0, 4.0]], half))
    if problem is None:
        assert compare_logits(task, fp32, fp16, "fp16") == {"max_abs": pytest.approx(0.1), "same": 2, "n": 2}
    else:
        with pytest.raises(ExportError, match=problem):
            compare_logits(task, fp32, fp16, "fp16")


def test_several_other_predictions_are_refused() -> None:
    fp32 = np.tile([10.001, 10.0], (5, 1))  # nearly equal logits
    task, labels, half = load_task("classification"), np.zeros(5, np.int64), fp32.copy()
    half[:1, 0] -= 2e-3
    assert compare_logits(task, Outputs(fp32, labels), Outputs(half, labels), "fp16")["same"] == 4
    half[1, 0] -= 2e-3
    with pytest.raises(ExportError, match="the same on 3 of 5 images"):
        compare_logits(task, Outputs(fp32, labels), Outputs(half, labels), "fp16")
