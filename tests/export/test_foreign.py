"""ONNX files of others: what is refused before a runtime sees them, each in one sentence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
from onnx import TensorProto, helper, numpy_helper
from questpress.export import foreign
from questpress.export.errors import ExportError
from questpress.export.foreign import read_foreign
from questpress.export.onnx_export import export_onnx
from questpress.export.quantize import quantize_int8


def little() -> onnx.ModelProto:
    """A convolution and a mean, from images to two numbers."""
    weight = numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("GlobalAveragePool", ["c"], ["y"])],
        "little",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2, 1, 1])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def external_in_an_attribute(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "hidden")
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="beside.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=tensor))


def external_in_a_sparse_tensor(model: onnx.ModelProto) -> None:
    values = TensorProto(name="s", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    values.external_data.add(key="location", value="/etc/passwd")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def external_in_a_branch(model: onnx.ModelProto) -> None:
    inner = little()
    external(inner)
    model.graph.node.append(helper.make_node("If", ["y"], ["z"], then_branch=inner.graph))


def a_strange_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil.example", 1))


def a_strange_node(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "evil.example"


def a_promise(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 2_000_000


def an_impossible_size(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**31, 2**31, 2, 2]


def a_negative_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -3


def a_circle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def a_deep_nest(model: onnx.ModelProto) -> None:
    graph = little().graph
    for _ in range(12):
        outer = little().graph
        outer.node.append(helper.make_node("If", ["y"], ["z"], then_branch=graph))
        graph = outer
    model.graph.CopyFrom(graph)


def nothing(model: onnx.ModelProto) -> None:
    model.graph.ClearField("node")


def no_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (external, "keeps data in another file"),
        (external_in_an_attribute, "keeps data in another file"),
        (external_in_a_sparse_tensor, "keeps data in another file"),
        (external_in_a_branch, "keeps data in another file"),
        (a_strange_domain, "operators of 'evil.example'"),
        (a_strange_node, "operator Conv of 'evil.example'"),
        (a_promise, "24 bytes, not 24,000,000"),
        (an_impossible_size, "impossible size"),
        (a_negative_size, "impossible size"),
        (a_circle, "goes in a circle"),
        (a_deep_nest, "nested more than 8 deep"),
        (nothing, "holds no network"),
        (no_type, "of no known type"),
    ],
)
def test_what_is_not_to_be_trusted_is_refused_in_a_sentence(
    harm: Callable[[onnx.ModelProto], None], told: str, tmp_path: Path
) -> None:
    model = little()
    harm(model)
    file = tmp_path / "foreign.onnx"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=told) as refused:
        read_foreign(file)
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)


def test_too_many_nodes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(foreign, "MOST_NODES", 1)
    (tmp_path / "many.onnx").write_bytes(little().SerializeToString())
    with pytest.raises(ExportError, match="more than 1 nodes"):
        read_foreign(tmp_path / "many.onnx")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x08" * 5000, b"\xff" * 100])
def test_what_is_no_onnx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"is no ONNX file|holds no network"):
        read_foreign(tmp_path / "no.onnx")


def test_a_folder_and_a_missing_file_are_told_apart_from_a_network(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.onnx"):
        with pytest.raises(ExportError, match="is no file"):
            read_foreign(path)


def test_our_own_files_are_read_and_their_bytes_given_back(tmp_path: Path) -> None:
    network = timm.create_model("lcnet_050", num_classes=3)
    fp32 = export_onnx(network, tmp_path / "fp32.onnx", 32, metadata={"a": "b"})
    images = [np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)]
    int8 = quantize_int8(fp32.path, tmp_path / "int8.onnx", images)
    for path in (fp32.path, int8.path):
        content, model = read_foreign(path)
        assert content == path.read_bytes()
        assert len(model.graph.node) > 10
