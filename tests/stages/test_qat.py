"""Runs with quantization-aware training: features, heads, learned ranges and resuming."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.int8.correction import with_all_biases
from questpress.export.int8.fake_quantize import FakeQuantized
from questpress.export.int8.quantizer import calibrate_ranges, prepare, quantize
from questpress.export.int8.targets import find_target
from questpress.models.build import build
from questpress.models.readout import Readouts
from questpress.pipeline.errors import JobError
from questpress.pipeline.training.student import QuantizedReadouts
from safetensors.numpy import load_file

from tests.support.little import job, report

QAT = ("--qat", "--qat-epochs", "2")


def graph_of(network: torch.nn.Module, size: int, folder: Path) -> tuple[FakeQuantized, torch.Tensor]:
    file = export_onnx(network, folder / "a.onnx", size, metadata={})
    images = np.random.default_rng(0).standard_normal((8, 3, size, size), dtype=np.float32)
    prepared = with_all_biases(prepare(file.path))
    ranges, _ = calibrate_ranges(prepared.model, [images], "minmax", prepared.scope.op_types)
    types = find_target("x86-vnni")
    return FakeQuantized(prepared, quantize(prepared, ranges, types), types), torch.from_numpy(images)


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "cifar_resnet8", "repghostnet_050", "mobilenetv2_050", "regnety_002"]
)
def test_readouts_are_found_in_the_graph_and_equal_the_networks(name: str, tmp_path: Path) -> None:
    network = build(name, num_classes=5, image_size=96, seed=0).eval()
    graph, images = graph_of(network, 96, tmp_path)
    own = Readouts(network, 96)
    reads = frozenset({"map", "vector", "logits", "cells"}) & own.offers
    readouts = QuantizedReadouts(graph, network, images[:4], images[:4], reads)
    with torch.no_grad(), graph.rounding(frozenset()):
        mine, its = readouts(images, reads), own(images, reads)
    for read in reads:
        assert torch.allclose(mine[read], its[read], atol=2e-3 * float(its[read].abs().max())), read
    rounded = readouts(images, reads)  # what the quantized network sees
    assert not torch.equal(rounded["map"], mine["map"])
    if "cells" in reads:
        rounded["cells"].square().mean().backward()
        assert all(w.grad is not None and torch.isfinite(w.grad).all() for w in graph.weights.values())
        with torch.no_grad(), graph.rounding(frozenset(graph.axes)):
            weights = readouts(images, reads)
        torch.testing.assert_close(weights["cells"][:, 0], weights["logits"], rtol=1e-4, atol=1e-4)
        assert not torch.equal(weights["cells"], mine["cells"])


def test_missing_feature_in_the_graph_is_refused(tmp_path: Path) -> None:
    network = build("cifar_resnet8", num_classes=5, image_size=16, seed=0).eval()
    other = build("cifar_resnet8", num_classes=5, image_size=16, seed=1).eval()
    graph, images = graph_of(network, 16, tmp_path)
    with pytest.raises(JobError, match=r"does not compute the feature (logits|map)"):
        QuantizedReadouts(graph, other, images[:4], images[:4], frozenset({"map"}))


def test_gamma_of_zero_gives_numbers_and_gradients(tmp_path: Path) -> None:
    network = build("resnet10t", num_classes=5, image_size=32, seed=0).eval()
    for module in network.modules():
        if hasattr(module, "bn2"):
            torch.nn.init.zeros_(module.bn2.weight)
            torch.nn.init.zeros_(module.bn2.bias)
    graph, images = graph_of(network, 32, tmp_path)
    logits = graph(images)[graph.output]
    logits.square().mean().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in graph.parameters() if p.grad is not None)


@pytest.fixture(scope="module", params=["quest", "quest+mimic+kd+sdd"])
def recovered(request: Any, tmp_path_factory: pytest.TempPathFactory, data: Path, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("qat") / "run"
    result = job(
        data, out, cache, "--method", request.param, "--qat", "--qat-epochs", "2", "--until", "validate"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    return out


def test_learned_ranges_reach_the_quantizer(recovered: Path) -> None:
    (entry,) = report(recovered)["int8"]
    assert entry["tried"][0]["name"] == "learned"
    assert report(recovered)["recovery"]["epochs"] == 2
    before = {t.name: t for t in onnx.load(str(recovered / "artifact/student.onnx")).graph.initializer}
    after = {t.name: t for t in onnx.load(str(recovered / "qat/student.onnx")).graph.initializer}
    moved = [
        name
        for name in before.keys() & after.keys()
        if before[name].data_type == onnx.TensorProto.FLOAT
        and not np.array_equal(numpy_helper.to_array(before[name]), numpy_helper.to_array(after[name]))
    ]
    assert len(moved) > 5
    ranges = json.loads((recovered / "qat/ranges.json").read_text())["ranges"]
    assert ranges and all(entry["scale"] > 0 for entry in ranges.values())


def test_methods_resume_with_their_heads(recovered: Path) -> None:
    heads = load_file(recovered / "student.heads.safetensors")
    assert any(name.startswith("methods/") for name in heads)
    lines = [json.loads(line) for line in (recovered / "metrics.jsonl").read_text().splitlines()]
    qat = [line for line in lines if line["stage"] == "qat"]
    assert len(qat) == 2
    student = [line["losses"] for line in lines if line["stage"] == "student"]
    assert qat[0]["losses"].keys() == student[-1].keys()
    # Fresh heads would begin where the student's training began.
    assert qat[0]["losses"]["loss"] < student[0]["loss"]


def test_resumed_qat_equals_uninterrupted_qat(
    recovered: Path, tmp_path: Path, data: Path, cache: Path
) -> None:
    again = tmp_path / "run"
    method = json.loads((recovered / "report.json").read_text())["method"]
    options = ("--method", method, *QAT)
    assert job(data, again, cache, *options, "--until", "export").exit_code == 0
    assert job(data, again, cache, *options, "--until", "validate").exit_code == 0
    assert (again / "qat/student.onnx").read_bytes() == (recovered / "qat/student.onnx").read_bytes()
    assert (again / "artifact/student.int8.onnx").read_bytes() == (
        recovered / "artifact/student.int8.onnx"
    ).read_bytes()
