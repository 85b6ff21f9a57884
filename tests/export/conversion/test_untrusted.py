"""Untrusted ONNX files are refused with one sentence before a runtime loads them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
from onnx import TensorProto, helper, numpy_helper
from questpress.export.conversion import untrusted
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.conversion.untrusted import read_untrusted
from questpress.export.errors import ExportError

from tests.support.hostile_onnx import HARMS, define, external, little
from tests.support.networks import quantize_int8


@pytest.mark.parametrize(("harm", "message"), HARMS)
def test_untrusted_onnx_file_is_refused(
    harm: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path
) -> None:
    model = little()
    harm(model)
    file = tmp_path / "untrusted.onnx"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=message) as refused:
        read_untrusted(file)
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)
    assert len(str(refused.value)) < len(str(file)) + 300


def test_too_many_nodes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(untrusted, "MAX_NODES", 1)
    (tmp_path / "many.onnx").write_bytes(little().SerializeToString())
    with pytest.raises(ExportError, match="more than 1 nodes"):
        read_untrusted(tmp_path / "many.onnx")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x08" * 5000, b"\xff" * 100])
def test_non_onnx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"is not an ONNX file|contains no network"):
        read_untrusted(tmp_path / "no.onnx")


def test_messages_nested_by_the_thousand_are_refused(tmp_path: Path) -> None:
    """Written by hand: onnx itself writes none so deep."""
    content = b""
    for _ in range(5000):  # a graph, in an attribute, in a node, in a graph
        for field in (6, 5, 1):
            content = bytes([field << 3 | 2]) + _length(content) + content
    (tmp_path / "deep.onnx").write_bytes(b"\x3a" + _length(content) + content)
    with pytest.raises(ExportError, match="is not an ONNX file"):
        read_untrusted(tmp_path / "deep.onnx")


def _length(content: bytes) -> bytes:
    number, found = len(content), b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def test_sparse_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large.onnx").open("wb") as file:
        file.truncate(1 << 40)  # none of it on the disk
    with pytest.raises(ExportError, match="larger than 2 GB"):
        read_untrusted(tmp_path / "large.onnx")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(ExportError, match="is not a file"):
        read_untrusted(tmp_path / "pipe.onnx")


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_external_weights_of_large_models_may_not_be_links(kind: str, tmp_path: Path) -> None:
    model = little()
    external(model)
    model.graph.initializer[0].external_data[0].value = "own.onnx.data"
    file, data, secret = tmp_path / "own.onnx", tmp_path / "own.onnx.data", tmp_path / "secret"
    file.write_bytes(model.SerializeToString())
    secret.write_bytes(bytes(24))
    with pytest.raises(ExportError, match="refers to data in another file"):  # there is none
        read_untrusted(file, external_data=True)
    data.write_bytes(bytes(24))
    assert read_untrusted(file, external_data=True)[1].graph.initializer[0].external_data
    with pytest.raises(ExportError, match="refers to data in another file"):
        read_untrusted(file)
    data.unlink()
    data.symlink_to(secret) if kind == "symbolic" else data.hardlink_to(secret)
    with pytest.raises(ExportError, match="is a link to another file"):
        read_untrusted(file, external_data=True)


def test_file_with_functions_and_branches_own_is_read(tmp_path: Path) -> None:
    model = little()
    define(model, "F", [helper.make_node("Relu", ["a"], ["b"])])
    model.graph.node.append(helper.make_node("F", ["y"], ["z"], domain="own"))
    branch = helper.make_graph(
        [helper.make_node("Relu", ["z"], ["r"])],  # z is of the graph around it
        "branch",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    sure = numpy_helper.from_array(np.array(True), "sure")
    model.graph.node.append(helper.make_node("Constant", [], ["c1"], value=sure))
    model.graph.node.append(helper.make_node("If", ["c1"], ["q"], then_branch=branch, else_branch=branch))
    (tmp_path / "own.onnx").write_bytes(model.SerializeToString())
    assert len(read_untrusted(tmp_path / "own.onnx")[1].graph.node) == 5


def test_folder_and_missing_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.onnx"):
        with pytest.raises(ExportError, match="is not a file"):
            read_untrusted(path)


def test_our_own_files_are_read_and_their_bytes_given_back(tmp_path: Path) -> None:
    network = timm.create_model("lcnet_050", num_classes=3)
    fp32 = export_onnx(network, tmp_path / "fp32.onnx", 32, metadata={"a": "b"})
    images = [np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)]
    int8 = quantize_int8(fp32.path, tmp_path / "int8.onnx", images)
    for path in (fp32.path, int8.path):
        content, model = read_untrusted(path)
        assert content == path.read_bytes()
        assert len(model.graph.node) > 10
