"""Detectors in the runtime and their int8 files: decoding, boxes in pixels, the artifact, the search."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from questpress.export import predict_cli, runtime
from questpress.export.artifact import ShippedFile, write_manifest, write_runtime
from questpress.export.conversion.onnx_export import OnnxFile, check_parity, export_onnx
from questpress.export.errors import ExportError
from questpress.export.int8.quantizer import Prepared, prepare
from questpress.export.int8.search import search
from questpress.export.int8.targets import find_target
from questpress.export.int8.torch_graph import GraphNetwork
from questpress.export.latency.extras import measure_end_to_end
from questpress.export.results import Verdict
from questpress.export.runtime import ArtifactError, Classifier, Decoder, Detector, Preprocessing, open_model
from torchvision.ops import boxes as ops

from tests.support.networks import color_classifier, onnx_file, quantize_int8, toy_detector

LABELS = ["cell", "platelet", "speck"]
SIZE = (64, 96)
BORDER = Preprocessing.create(SIZE, 1.0, "bilinear", "border")
PIXELS = np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3)).astype(np.uint8)
IMAGES = runtime.normalize(PIXELS, BORDER)


@pytest.fixture(scope="module")
def network() -> Any:
    return toy_detector(SIZE)


@pytest.fixture(scope="module")
def exported(network: Any, tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    path = tmp_path_factory.mktemp("detector") / "student.onnx"
    return export_onnx(network, path, SIZE, metadata=runtime.build_metadata(BORDER, LABELS, {}))


@pytest.fixture
def artifact(exported: OnnxFile, network: Any, tmp_path: Path) -> Path:
    path = tmp_path / "student.onnx"
    path.write_bytes(exported.path.read_bytes())
    write_manifest(
        tmp_path, files=[ShippedFile(onnx_file(path), "fp32")], preprocessing=BORDER, labels=LABELS,
        origin={}, decoder=Decoder.from_dict(network.decoder),
    )  # fmt: skip
    write_runtime(tmp_path)
    Image.fromarray(photo(150, 60)).save(tmp_path / "photo.png")
    return tmp_path


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def outputs(network: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = len(network.anchors)
    logits = torch.randn(1, count, len(LABELS), generator=generator) * (1 + seed % 3) - 2 - seed % 4
    return logits, torch.randn(1, count, 4, generator=generator) * 0.5


def decode(network: Any, logits: torch.Tensor, boxes: torch.Tensor) -> np.ndarray:
    decoder = Decoder.from_dict(network.decoder)
    return np.stack(
        [decoder.decode(image, SIZE) for image in zip(logits.numpy(), boxes.numpy(), strict=True)]
    )


def stable_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ordered, indices = values.sort(descending=True, stable=True)
    return ordered[:k], indices[:k]


def test_decoding_equals_torchvision(network: Any) -> None:
    counts = []
    for seed in range(50):
        logits, boxes = outputs(network, seed)
        expected = network.decode(logits, boxes).numpy()
        np.testing.assert_allclose(decode(network, logits, boxes), expected, atol=1e-5)
        counts.append(int((expected[0, :, 0] > 0).sum()))
    assert max(counts) == 100 and min(counts) < 100
    logits, _ = outputs(network, 0)
    assert (logits[0, : network.level_counts[0]] > -2.9).sum() > network.decoder["candidates"]


def test_decoding_equals_torchvision_with_ties(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # torchvision's order of equal scores is undefined in topk, and in the NMS of more than 1,000 boxes.
    monkeypatch.setattr(torch.Tensor, "topk", stable_topk)
    monkeypatch.setattr(ops, "_batched_nms_vanilla", ops._batched_nms_coordinate_trick)
    for seed in range(10):
        logits, boxes = outputs(network, seed)
        logits = logits.round()
        expected = network.decode(logits, boxes).numpy()
        assert len(np.unique(expected[0, :, 0])) < 10 < (expected[0, :, 0] > 0).sum()
        np.testing.assert_allclose(decode(network, logits, boxes), expected, atol=1e-5)


def test_no_detections_are_zeros(network: Any) -> None:
    logits, boxes = outputs(network, 0)
    logits[:] = -9
    np.testing.assert_array_equal(decode(network, logits, boxes), network.decode(logits, boxes).numpy())
    assert not decode(network, logits, boxes).any()


def test_file_equals_torch_and_decodes_as_the_network(network: Any, exported: OnnxFile) -> None:
    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    detector = open_model(exported.path)
    assert isinstance(detector, Detector)
    metadata = detector.session.get_modelmeta().custom_metadata_map
    largest = max(level.stride[0] for level in detector.decoder.anchors)
    assert (metadata["task"], metadata["stride"]) == ("detect", str(round(largest)))
    expected = [part.numpy() for part in network.raw(images)]
    for size in (1, 3):
        for image in range(0, 3, size):
            batch = images[image : image + size].numpy()
            outputs = detector.session.run(["logits", "boxes"], {"input": batch})
            for values, part in zip(outputs, expected, strict=True):
                np.testing.assert_allclose(values, part[image : image + size], atol=1e-4)
    assert check_parity(network, exported.path, images).max_abs <= 1e-4
    detections = detector.detections(images.numpy())
    assert (detections[:, 0, 0] > 0.5).all()
    np.testing.assert_allclose(detections, network(images).numpy(), atol=1e-4)
    assert detector.detections(images.numpy()[:0]).shape == (0, 100, 6)


def test_parity_of_the_boxes_is_checked(exported: OnnxFile) -> None:
    other = toy_detector(SIZE)
    with torch.no_grad():
        other.head.regression_head.bbox_reg.bias += 0.1
    with pytest.raises(ExportError, match=r"boxes differ from the network's by up to 0\.1 "):
        check_parity(other, exported.path, torch.randn(2, 3, *SIZE))


def test_file_that_takes_pixels_detects_the_same(network: Any, exported: OnnxFile, tmp_path: Path) -> None:
    about = runtime.build_metadata(BORDER, LABELS, {}, takes_pixels=True)
    file = export_onnx(network, tmp_path / "pixels.onnx", SIZE, metadata=about, pixels=BORDER)
    of_pixels, of_floats = Detector.load(file.path), Detector.load(exported.path)
    pixels = photo(*SIZE)[None]
    assert of_pixels.takes_pixels and not of_floats.takes_pixels
    expected = of_floats.session.run(None, {"input": of_floats.to_input(pixels)})
    for values, part in zip(of_pixels.session.run(None, {"input": pixels}), expected, strict=True):
        np.testing.assert_allclose(values, part, atol=1e-3)


@pytest.mark.parametrize("crop_mode", ["border", "squash", "center"])
@pytest.mark.parametrize(("height", "width"), [(300, 120), (120, 300), (50, 40), (64, 96)])
def test_boxes_are_in_pixels_of_the_image(height: int, width: int, crop_mode: str) -> None:
    p = Preprocessing.create(SIZE, 1.0, "bilinear", crop_mode, mean=(0, 0, 0))
    box = np.array([0.4 * width, 0.45 * height, 0.55 * width, 0.6 * height]).round().astype(int)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    rows, columns = np.nonzero(runtime.render(pixels, p)[:, :, 0] > 127)
    seen = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
    boxes = runtime.to_original(seen / (SIZE[1], SIZE[0], SIZE[1], SIZE[0]), height, width, p)
    pixel = max(height / SIZE[0], width / SIZE[1], 1)  # of the rendered image, in the image
    np.testing.assert_allclose(boxes[0], box, atol=pixel)


def test_detect_returns_labels_scores_and_boxes_in_the_image(artifact: Path) -> None:
    described = json.loads((artifact / "manifest.json").read_text())["outputs"]
    assert {output["name"]: output["activation"] for output in described} == {
        "logits": "sigmoid",
        "boxes": None,
    }
    detector = Detector.load(artifact, precision="fp32")
    pixels = photo(150, 60)
    rendered = runtime.render(pixels, BORDER)[None]
    [rows] = detector.detections(detector.to_input(rendered))
    everything, best = detector.detect([pixels], 0.0), detector.detect([artifact / "photo.png"])
    assert 0 < len(best[0]) < len(everything[0])
    assert best[0] == [detection for detection in everything[0] if detection.score >= 0.5]
    scores = [detection.score for detection in everything[0]]
    assert scores == sorted(scores, reverse=True) and min(scores) > 0.05
    first = best[0][0]
    assert (first.label, first.score) == (LABELS[int(rows[0, 1])], rows[0, 0])
    # 150 rows on 64: 26 columns in the middle of 96.
    scale, left = 150 / 64, 35
    expected = (rows[0, 2:] * (96, 64, 96, 64) - (left, 0, left, 0)) * scale
    np.testing.assert_allclose(first.box, expected.clip(0, (60, 150, 60, 150)), atol=1.5)
    for detection in everything[0]:
        x1, y1, x2, y2 = detection.box
        assert 0 <= x1 < x2 <= 60 and 0 <= y1 < y2 <= 150


def test_predict_py_prints_and_draws_boxes(artifact: Path) -> None:
    [expected] = Detector.load(artifact, precision="fp32").detect([artifact / "photo.png"], 0.6)
    command = [sys.executable, "predict.py", "--threads", "1", "--min-score", "0.6", "photo.png"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=artifact, capture_output=True, text=True, check=False)

    done = run("--json", "--draw", "drawn.png")
    assert (done.returncode, done.stderr) == (0, "")
    line = json.loads(done.stdout)
    assert line["image"] == "photo.png" and len(line["detections"]) == len(expected) > 0
    for entry, detection in zip(line["detections"], expected, strict=True):
        assert entry["label"] == detection.label
        assert entry["score"] == pytest.approx(detection.score, abs=1e-4)
        assert entry["box"] == pytest.approx(detection.box, abs=0.1)
    drawn, before = np.array(Image.open(artifact / "drawn.png")), photo(150, 60)
    assert drawn.shape == before.shape and (drawn != before).any()
    lines = run().stdout.splitlines()
    assert len(lines) == len(expected) and lines[0].startswith(f"photo.png: {expected[0].label} ")
    assert run("--min-score", "1").stdout == "photo.png: no objects\n"
    for more, message in (
        (["--draw", "photo.png"], "cannot write photo.png: it is the image itself"),
        (["--draw", "x.nothing"], "cannot write x.nothing: unknown file extension: .nothing"),
        (["photo.png", "--draw", "x.png"], "--draw requires one image file"),
        (["--min-score", "nan"], "must be a number from 0 to 1, got 'nan'"),
        (["--top", "2"], "--top requires a classifier, student.onnx is a detector"),
    ):
        done = run(*more)
        assert done.returncode in (1, 2) and message in done.stderr and done.stderr.count("\n") == 1


def test_classes_refuse_models_of_the_other_one(artifact: Path, exported: OnnxFile, tmp_path: Path) -> None:
    colors = color_classifier(tmp_path / "colors.onnx")
    with pytest.raises(ArtifactError, match="is a detector, use Detector"):
        Classifier.load(artifact, precision="fp32")
    with pytest.raises(ArtifactError, match="is a detector, use Detector"):
        Classifier(exported.path.read_bytes(), "student.onnx")
    with pytest.raises(ArtifactError, match="is a classifier, use Classifier"):
        Detector.load(colors)
    with pytest.raises(ArtifactError, match="is not a detector"):
        Detector(colors.read_bytes(), "colors.onnx")
    with pytest.raises(SystemExit, match="2"):
        predict_cli.main(["--artifact", str(colors), "--draw", "x.png", str(artifact / "photo.png")])


LEVEL = {"grid": [1, 1], "stride": [8, 8], "cells": [[-4, -4, 4, 4]]}
INVALID: list[dict[str, Any]] = [
    {"kind": "fasterrcnn"}, {"kind": None}, {"anchors": None}, {"anchors": []}, {"anchors": [LEVEL]},
    {"anchors": [{"grid": [1, 1]}]}, {"anchors": [LEVEL | {"grid": [10**9, 1]}]},
    {"anchors": [LEVEL | {"grid": [8192, 8192]}]}, {"anchors": [LEVEL | {"grid": [1.5, 1]}]},
    {"anchors": [LEVEL | {"cells": [[float("nan"), 0, 1, 1]]}]},
    {"anchors": [LEVEL | {"cells": [[4, 4, 4, 4]]}]}, {"anchors": [LEVEL | {"cells": [[0, 0, 1]]}]},
    {"anchors": [LEVEL | {"stride": [float("inf"), 8]}]},
    {"box_weights": [1, 1, 1]}, {"box_weights": [0, 1, 1, 1]}, {"score_threshold": 0}, {"nms_iou": "high"},
    {"nms_iou": float("nan")}, {"candidates": True}, {"candidates": 10**9}, {"detections": 0},
]  # fmt: skip


@pytest.mark.parametrize("change", INVALID, ids=str)
def test_invalid_decoder_is_refused(change: dict[str, Any], artifact: Path, network: Any) -> None:
    decoder = network.decoder | change
    manifest = json.loads((artifact / "manifest.json").read_text()) | {"decoder": decoder}
    manifest |= {"checksum": runtime.compute_checksum(manifest)}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    model = onnx.load(artifact / "student.onnx")
    entries = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, entries | {"questpress.decoder": json.dumps(decoder)})
    onnx.save(model, artifact / "harmed.onnx")
    for path in (artifact, artifact / "harmed.onnx"):
        with pytest.raises(ArtifactError) as raised:
            open_model(path, precision="fp32")
        assert "\n" not in str(raised.value)


def test_file_without_a_decoder_or_with_other_labels_is_refused(artifact: Path) -> None:
    model = onnx.load(artifact / "student.onnx")
    entries = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {k: v for k, v in entries.items() if k != "questpress.decoder"})
    with pytest.raises(ArtifactError, match="metadata of x is invalid: 'decoder'"):
        runtime.open_content(model.SerializeToString(), "x")
    onnx.helper.set_model_props(model, entries | {"questpress.labels": '["cell"]'})
    with pytest.raises(ArtifactError, match=r"x has logits of shape .* require \[batch, \d+, 1\]"):
        runtime.open_content(model.SerializeToString(), "x")


def test_outputs_that_are_not_finite_are_refused(exported: OnnxFile, tmp_path: Path) -> None:
    model = onnx.load(exported.path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = np.full(tuple(tensor.dims), np.nan, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="returns outputs that are not finite"):
        Detector.load(tmp_path / "x.onnx").detect([photo(*SIZE)])


def test_latency_from_an_image_file_includes_decoding(artifact: Path) -> None:
    files, images = [("student", artifact / "student.onnx")], [(artifact / "photo.png").read_bytes()]
    [(times, samples)] = measure_end_to_end(
        files, images, threads=1, seconds=0.1, progress=lambda _fraction, _step: None
    )
    assert times.run > 0 and samples.shape[1] == 4


@pytest.fixture(scope="module")
def prepared(exported: OnnxFile) -> Prepared:
    return prepare(exported.path)


def raw(path: Path) -> list[np.ndarray]:
    return Detector.load(path).session.run(["logits", "boxes"], {"input": IMAGES})


def test_int8_file_detects_nearly_the_same(exported: OnnxFile, tmp_path: Path) -> None:
    file = quantize_int8(exported.path, tmp_path / "int8.onnx", [IMAGES])
    for values, expected in zip(raw(file.path), raw(exported.path), strict=True):
        assert values.shape == expected.shape and values.dtype == np.float32
        assert np.corrcoef(values.ravel(), expected.ravel())[0, 1] > 0.97
    assert file.bytes < 0.4 * exported.path.stat().st_size
    detector = Detector.load(file.path)
    assert detector.decoder == Detector.load(exported.path).decoder
    assert detector.detect(PIXELS[:1])[0]


def test_scores_and_boxes_are_rounded_separately(exported: OnnxFile, tmp_path: Path) -> None:
    model = onnx.load(quantize_int8(exported.path, tmp_path / "int8.onnx", [IMAGES]).path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    last = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    scales = {value.name: float(constants[last[value.name].input[1]]) for value in model.graph.output}
    for (name, scale), values in zip(scales.items(), raw(exported.path), strict=True):
        assert scale == pytest.approx((values.max() - values.min()) / 255, rel=0.05), name


def test_norms_of_the_heads_stay_float_and_the_rest_is_integer(prepared: Prepared) -> None:
    kinds = {node.name: node.op_type for node in prepared.model.graph.node}
    kept = [kinds[name] for name in prepared.scope.kept_float]
    assert kept.count("Mul") == kept.count("Add") == list(kinds.values()).count("InstanceNormalization") == 40
    assert set(kept) == {"Reshape", "Mul", "Add", "Relu"}
    assert {"Add", "Concat", "Resize", "Conv"} <= set(prepared.scope.op_types)


def test_torch_graph_computes_both_outputs(exported: OnnxFile, prepared: Prepared) -> None:
    with torch.no_grad():
        values = GraphNetwork(prepared.model)(torch.from_numpy(IMAGES))
    for name, expected in zip(("logits", "boxes"), raw(exported.path), strict=True):
        np.testing.assert_allclose(values[name], expected, atol=1e-4)


def test_search_takes_all_steps(exported: OnnxFile, prepared: Prepared, tmp_path: Path) -> None:
    boxes = raw(exported.path)[1]

    def judge(file: Path) -> Verdict:
        noise = float(np.square(raw(file)[1] - boxes).sum())
        return Verdict(score=-noise, lost=noise, holds=False, sqnr=-noise)

    target = find_target(runtime.detect_target())
    result = search(prepared, [IMAGES[:2]], target, tmp_path, judge, calibrators=("minmax",))
    names = [candidate.name for candidate in result.candidates]
    assert result.stopped is None and result.chosen is None
    assert names[0] == "minmax" and any("biases corrected" in name for name in names)
    islands = [c for c in result.candidates if c.kept_float]
    assert len(islands) > 3 and islands[-1].score > result.candidates[0].score
    sqnr = [source.sqnr for source in result.sources]
    assert sqnr == sorted(sqnr) and np.isfinite(sqnr[0])
