"""The nodes of a file that run in float are named with the reason."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper
from questpress.export import runtime
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.conversion.rewrite import RULES
from questpress.export.int8 import quantizer
from questpress.export.int8.quantizer import Scope, int8_scope
from questpress.export.int8.search import (
    CONVERTS_BETWEEN,
    CONVERTS_INPUT,
    CONVERTS_OUTPUT,
    KEPT,
    WRITES_FLOAT,
    float_nodes,
)
from questpress.export.int8.targets import TARGETS
from questpress.export.results import FloatNode

from tests.support.graphs import graph_of, weights
from tests.support.networks import quantize_int8

node = helper.make_node


def images(n: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 3, size, size), dtype=np.float32)


@pytest.fixture(autouse=True)
def no_float_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left in float for its speed."""
    for name, target in TARGETS.items():
        monkeypatch.setitem(TARGETS, name, replace(target, float_stem=False))


def int8_of(name: str, folder: Path, rules: Collection[str] | None = None) -> Path:
    torch.manual_seed(0)
    path = export_onnx(timm.create_model(name, num_classes=5), folder / "a.onnx", 32, metadata={}).path
    return quantize_int8(path, folder / "b.onnx", [images(8)], rules=rules).path


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_int8_network_is_float_only_at_its_ends(name: str, tmp_path: Path) -> None:
    path = int8_of(name, tmp_path)
    ends = [("QuantizeLinear", CONVERTS_INPUT), ("DequantizeLinear", CONVERTS_OUTPUT)]
    assert [(n.op_type, n.why) for n in float_nodes(path)] == ends
    assert float_nodes(path.read_bytes()) == float_nodes(path)


def test_operators_without_an_integer_kernel_are_named(tmp_path: Path) -> None:
    others = RULES.keys() - {"multiply_hard_swish"}
    path = int8_of("mobilenetv3_small_050", tmp_path, others)
    file = {n.name: n.op_type for n in onnx.load(str(path)).graph.node}
    entries = float_nodes(path)
    named = {n.name for n in entries if n.op_type == "HardSwish"}
    assert named == {name for name, kind in file.items() if kind == "HardSwish"} != set()
    reason = "ONNX Runtime has no integer kernel for HardSwish"
    assert {n.why for n in entries if n.op_type == "HardSwish"} == {reason}
    assert {n.why for n in entries if n.op_type != "HardSwish"} == {
        CONVERTS_INPUT,
        CONVERTS_OUTPUT,
        CONVERTS_BETWEEN,
    }


def test_nodes_kept_float_on_purpose_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scope(model: onnx.ModelProto) -> Scope:
        first = next(n.name for n in model.graph.node if n.op_type == "Conv")
        return Scope(int8_scope(model).op_types, (first,))

    monkeypatch.setattr(quantizer, "int8_scope", scope)
    path = int8_of("resnet18", tmp_path)
    stem = next(n.name for n in onnx.load(str(path)).graph.node if n.op_type == "Conv")
    assert FloatNode(name=stem, op_type="Conv", why=KEPT) in float_nodes(path, [stem])
    without = next(n for n in float_nodes(path) if n.name == stem)
    assert without.why == "an integer kernel exists, but the node reads the input in float"


def test_nodes_of_a_float_file_are_explained() -> None:
    nodes = [
        node("Conv", ["input", "w"], ["x"], name="first"),
        node("Erf", ["x"], ["y"], name="second"),
        node("Conv", ["y", "v"], ["output"], name="third"),
    ]
    model = graph_of(nodes, {"w": weights(16, 3, 1, 1), "v": weights(4, 16, 1, 1)})
    reasons = {n.name: n.why for n in float_nodes(model.SerializeToString())}
    assert reasons["first"] == "an integer kernel exists, but the node reads the input in float"
    assert reasons["second"] == "ONNX Runtime has no integer kernel for Erf"
    assert reasons["third"].startswith("an integer kernel exists, but the node reads the float output of ")


def test_output_that_is_not_converted_is_the_reason() -> None:
    scale, zero = {"s": np.float32(0.1)}, {"z": np.array(0, np.uint8)}
    nodes = [
        node("QuantizeLinear", ["input", "s", "z"], ["q"], name="q"),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        node("Sigmoid", ["d"], ["output"], name="sigmoid"),
    ]
    entries = float_nodes(graph_of(nodes, scale | zero).SerializeToString())
    assert entries[-1] == FloatNode(name="sigmoid", op_type="Sigmoid", why=WRITES_FLOAT)


def test_file_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(runtime.ArtifactError, match="onnxruntime cannot load a model given as bytes"):
        float_nodes(b"nothing")
