"""int8 files of detectors: two outputs that are rounded separately, norms in float, and the search."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from questpress.export import runtime
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.int8.quantizer import Prepared, prepare
from questpress.export.int8.search import search
from questpress.export.int8.targets import find_target
from questpress.export.int8.torch_graph import GraphNetwork
from questpress.export.results import Verdict
from questpress.export.runtime import Detector, Preprocessing

from tests.support.networks import quantize_int8, toy_detector

SIZE = (64, 96)
P = Preprocessing.create(SIZE, 1.0, "bilinear", "border")
PIXELS = np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3)).astype(np.uint8)
IMAGES = runtime.normalize(PIXELS, P)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detectors") / "fp32.onnx"
    about = runtime.build_metadata(P, ["a", "b", "c"], {})
    return export_onnx(toy_detector(SIZE), path, SIZE, metadata=about).path


@pytest.fixture(scope="module")
def prepared(fp32: Path) -> Prepared:
    return prepare(fp32)


def raw(path: Path) -> list[np.ndarray]:
    return Detector.load(path).session.run(["logits", "boxes"], {"input": IMAGES})


def check_close(path: Path, fp32: Path) -> None:
    for values, expected in zip(raw(path), raw(fp32), strict=True):
        assert values.shape == expected.shape and values.dtype == np.float32
        assert np.corrcoef(values.ravel(), expected.ravel())[0, 1] > 0.97


def test_int8_file_detects_nearly_the_same(fp32: Path, tmp_path: Path) -> None:
    file = quantize_int8(fp32, tmp_path / "int8.onnx", [IMAGES])
    check_close(file.path, fp32)
    assert file.bytes < 0.4 * fp32.stat().st_size
    detector = Detector.load(file.path)
    assert detector.decoder == Detector.load(fp32).decoder
    assert detector.detect(PIXELS[:1])[0]


def test_scores_and_boxes_are_rounded_separately(fp32: Path, tmp_path: Path) -> None:
    model = onnx.load(quantize_int8(fp32, tmp_path / "int8.onnx", [IMAGES]).path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    last = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    scales = {value.name: float(constants[last[value.name].input[1]]) for value in model.graph.output}
    for (name, scale), values in zip(scales.items(), raw(fp32), strict=True):
        assert scale == pytest.approx((values.max() - values.min()) / 255, rel=0.05), name


def test_norms_of_the_heads_stay_float_and_the_rest_is_integer(prepared: Prepared) -> None:
    kinds = {node.name: node.op_type for node in prepared.model.graph.node}
    kept = [kinds[name] for name in prepared.scope.kept_float]
    assert kept.count("Mul") == kept.count("Add") == list(kinds.values()).count("InstanceNormalization") == 40
    assert set(kept) == {"Reshape", "Mul", "Add", "Relu"}
    assert {"Add", "Concat", "Resize", "Conv"} <= set(prepared.scope.op_types)


def test_torch_graph_computes_both_outputs(fp32: Path, prepared: Prepared) -> None:
    with torch.no_grad():
        values = GraphNetwork(prepared.model)(torch.from_numpy(IMAGES))
    for name, expected in zip(("logits", "boxes"), raw(fp32), strict=True):
        np.testing.assert_allclose(values[name], expected, atol=1e-4)


def test_search_takes_all_steps(fp32: Path, prepared: Prepared, tmp_path: Path) -> None:
    boxes = raw(fp32)[1]

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
