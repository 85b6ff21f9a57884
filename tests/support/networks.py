"""Toy networks and model files for tests of the export."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from questpress.export import runtime
from questpress.export.conversion.onnx_export import OnnxFile
from questpress.export.int8 import quantizer
from questpress.export.int8.targets import find_target
from questpress.models.build import build
from torch import nn

LABELS = ["red", "green", "blue"]
PREPROCESSING = runtime.Preprocessing.create(
    8, 1.0, "bilinear", "squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)


class SmallConvNet(nn.Module):
    """A small MobileNetV2: depthwise and plain convolutions, ReLU6, a residual, global pooling."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.classifier = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(x))
        return self.classifier(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def small_conv_net(classes: int = 4, seed: int = 0) -> SmallConvNet:
    """Return a network with non-trivial batch norm statistics."""
    torch.manual_seed(seed)
    network = SmallConvNet(classes).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, 16, 16) * 2 + 1)
    return network.eval()


def images(n: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, size, size), dtype=np.float32) * 2 + 1


def color_classifier(path: Path, metadata: dict[str, str] | None = None, size: int = 8) -> Path:
    """Write a model whose logits are 10 times the image's mean red, green and blue, without torch."""
    weights = numpy_helper.from_array(np.float32(10) * np.eye(3, dtype=np.float32), "weights")
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "colors",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    if metadata is None:
        metadata = runtime.build_metadata(PREPROCESSING, LABELS, {"student": "colors"})
    helper.set_model_props(model, metadata)
    onnx.save(model, str(path))
    return path


def write_little_manifest(folder: Path) -> None:
    """Write the manifest of an artifact with student.onnx, which may be hostile, with a valid checksum."""
    file = onnx_file(folder / "student.onnx")
    entry = {"name": "student.onnx", "precision": "fp32", "target": None, "bytes": file.bytes}
    manifest = {
        "schema_version": 1, "preprocessing": PREPROCESSING.to_dict(), "labels": LABELS,
        "files": [{**entry, "sha256": file.sha256}],
    }  # fmt: skip
    checksum = runtime.compute_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum}))


def onnx_file(path: Path) -> OnnxFile:
    content = path.read_bytes()
    return OnnxFile(path, len(content), hashlib.sha256(content).hexdigest(), 18, 8)


def quantize_int8(
    fp32: Path,
    int8: Path,
    calibration: quantizer.Batches,
    *,
    method: str = "minmax",
    target_name: str | None = None,
    rules: Collection[str] | None = None,
) -> quantizer.Int8File:
    """Quantize a file as the search does its first candidate, for this machine's target by default."""
    types = find_target(target_name or runtime.detect_target())
    prepared = quantizer.prepare(fp32, rules)
    batches, operators = prepared.fed(calibration), prepared.scope.op_types
    ranges, n = quantizer.calibrate_ranges(prepared.model, batches, method, operators)
    recipe = quantizer.recipe(prepared, types, {"method": method, "images": n})
    return quantizer.write_int8(prepared, quantizer.quantize(prepared, ranges, types), int8, recipe)


def signal_to_noise(reference: np.ndarray, output: np.ndarray) -> float:
    """Return the signal-to-noise ratio in decibels."""
    return float(10 * np.log10((reference**2).sum() / ((reference - output) ** 2).sum()))


def toy_detector(size: tuple[int, int]) -> Any:
    """Return a RetinaNet of three classes with new weights that finds some objects in noise."""
    network = build("retinanet:test_efficientnet", num_classes=3, image_size=size, seed=0).eval()
    network.requires_grad_(False)
    noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    classes, boxes = network.head.classification_head.cls_logits, network.head.regression_head.bbox_reg
    for layer, values, spread in zip((classes, boxes), network.raw(noise), (1.0, 0.2), strict=True):
        layer.weight *= spread / values.std()
    classes.bias.fill_(-2.0)
    return network


def toy_region_detector(size: tuple[int, int]) -> Any:
    """Return a Faster R-CNN of three classes with new weights whose scores and boxes differ widely."""
    network = build("fasterrcnn:test_efficientnet", num_classes=3, image_size=size, seed=0).eval()
    network.requires_grad_(False)
    for name, layer in network.named_modules():
        if name.endswith(("cls_logits", "bbox_pred", "cls_score")):
            layer.weight *= 30
    return network
