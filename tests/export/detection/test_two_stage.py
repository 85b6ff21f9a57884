"""Two-stage detectors in files and the runtime: a static graph, decoding of regions, int8 up to regions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from questpress.export import runtime
from questpress.export.conversion.onnx_export import OnnxFile, check_parity, export_onnx
from questpress.export.int8.quantizer import prepare
from questpress.export.runtime import ArtifactError, Decoder, Detector, Preprocessing

from tests.support.networks import quantize_int8, toy_region_detector

LABELS = ["cell", "platelet", "speck"]
SIZE = (64, 96)
BORDER = Preprocessing.create(SIZE, 1.0, "bilinear", "border")
PIXELS = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3)).astype(np.uint8)
IMAGES = torch.from_numpy(runtime.normalize(PIXELS, BORDER))


@pytest.fixture(scope="module")
def network() -> Any:
    return toy_region_detector(SIZE)


@pytest.fixture(scope="module")
def exported(network: Any, tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    path = tmp_path_factory.mktemp("regions") / "student.onnx"
    return export_onnx(network, path, SIZE, metadata=runtime.build_metadata(BORDER, LABELS, {}))


def test_decoding_equals_torchvision(network: Any) -> None:
    decoder = Decoder.from_dict(network.decoder)
    rng = np.random.default_rng(0)
    counts = []
    for seed in range(50):
        logits = torch.from_numpy(rng.normal(size=(1, 128, 4), scale=1 + seed % 3).astype(np.float32))
        boxes = torch.from_numpy(rng.normal(size=(1, 128, 4)).astype(np.float32))
        corners = np.sort(rng.random((1, 128, 2, 2)) * (96, 64), axis=2).reshape(1, 128, 4)
        regions = torch.from_numpy(corners.astype(np.float32))
        regions[0, 120:] = 0  # unused
        expected = network.decode(logits, boxes, regions).numpy()
        detections = decoder.decode([part[0].numpy() for part in (logits, boxes, regions)], SIZE)
        np.testing.assert_allclose(detections, expected[0], atol=1e-5)
        counts.append(int((expected[0, :, 0] > 0).sum()))
    assert max(counts) == 100 and min(counts) > 10


def test_file_equals_torch_at_any_batch_and_detects_the_same(network: Any, exported: OnnxFile) -> None:
    detector = Detector.load(exported.path)
    expected = [part.numpy() for part in network.raw(IMAGES[:3])]
    assert [node.name for node in detector.session.get_outputs()] == ["logits", "boxes", "regions"]
    for size in (1, 3):
        for image in range(0, 3, size):
            outputs = detector.session.run(None, {"input": IMAGES[image : image + size].numpy()})
            for values, part in zip(outputs, expected, strict=True):
                np.testing.assert_allclose(values, part[image : image + size], atol=1e-3, rtol=1e-4)
    assert check_parity(network, exported.path, IMAGES[:2]).max_abs <= 1e-3
    detections = detector.detections(IMAGES.numpy())
    assert (detections[:, 0, 0] > 0.1).all()
    np.testing.assert_allclose(detections, network(IMAGES).numpy(), atol=1e-4)


def test_regions_stay_float_and_heads_become_int8(exported: OnnxFile, tmp_path: Path) -> None:
    prepared = prepare(exported.path)
    kinds = {node.name: node.op_type for node in prepared.model.graph.node}
    kept = {kinds[name] for name in prepared.scope.kept_float}
    assert not kept & {"Conv", "Gemm", "MatMul"}
    file = quantize_int8(exported.path, tmp_path / "int8.onnx", [IMAGES.numpy()])
    model = onnx.load(file.path)
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    suppression = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"]
    assert suppression and not any(rounded & set(node.input) for node in suppression)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 20
    # Some regions differ, so only the best ones are compared.
    for ours, theirs in zip(
        Detector.load(file.path).detect(PIXELS, 0.1),
        Detector.load(exported.path).detect(PIXELS, 0.1),
        strict=True,
    ):
        assert ours[0].label in {detection.label for detection in theirs[:5]}


@pytest.mark.parametrize(
    "change", [{"candidates": 0}, {"nms_iou": 2}, {"box_weights": [1]}, {"candidates": 7}]
)
def test_invalid_decoder_is_refused(change: dict[str, Any], exported: OnnxFile, network: Any) -> None:
    model = onnx.load(exported.path)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    decoder = json.dumps(network.decoder | change)
    onnx.helper.set_model_props(model, entries | {"questpress.decoder": decoder})
    with pytest.raises(ArtifactError) as raised:
        runtime.open_content(model.SerializeToString(), "x")
    assert "\n" not in str(raised.value)
