"""Malicious models and artifacts are refused by the runtime on a device, where onnx is not installed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from questpress.export import predict_cli, runtime
from questpress.export.runtime import ArtifactError, Classifier, refuse_external_data, session

from tests.support import hostile_onnx
from tests.support.networks import LABELS, PREPROCESSING, color_classifier, write_little_manifest

READS = [harm for harm, message in hostile_onnx.HARMS if "another file" in message or "train with" in message]


@pytest.mark.parametrize("harm", READS)
def test_weights_in_other_files_are_refused_before_a_session_is_made(
    harm: Callable[[onnx.ModelProto], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "open_session", lambda *_, **__: pytest.fail("a session was made"))
    model = hostile_onnx.little()
    harm(model)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        ArtifactError, match=r"^x\.onnx stores weights in another file, which is not allowed$"
    ):
        Classifier.load(tmp_path / "x.onnx")


def test_place_alone_is_enough_to_be_refused() -> None:
    model = hostile_onnx.little()
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(ArtifactError, match="another file"):
        refuse_external_data(model.SerializeToString(), "x")
    model.graph.initializer[0].data_location = TensorProto.DEFAULT
    refuse_external_data(model.SerializeToString(), "x")


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a",  # a graph without a length
        b"\x3a\xff\xff\xff\xff\x0f",  # of more bytes than there are
        b"\x3b",  # a group, which ONNX has none of
        b"\xff" * 12,  # a number without an end
        b"\x3a\x02\x2a\x05",  # a tensor that ends beyond its graph
    ],
)
def test_invalid_protobuf_is_refused(content: bytes) -> None:
    with pytest.raises(ArtifactError, match="is not a valid ONNX file"):
        refuse_external_data(content, "x")


def test_file_of_fields_without_end_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_MAX_FIELDS", 1000)
    with pytest.raises(ArtifactError, match="more than 1,000 fields"):
        refuse_external_data(b"\x08\x01" * 1001, "x")


def test_file_that_begins_like_onnx_runtimes_own_format_is_read_as_onnx(tmp_path: Path) -> None:
    """Otherwise a file checked as ONNX would be run in another format."""
    path = color_classifier(tmp_path / "x.onnx")
    content = path.read_bytes()
    assert content[:2] == b"\x08\x08"  # the version of the format, then whose it is
    path.write_bytes(content[:2] + b"\x12\x04ORTM" + content[2:])
    assert path.read_bytes()[4:8] == b"ORTM"
    assert Classifier.load(path, threads=1).labels == tuple(LABELS)


def colors(tmp_path: Path, harm: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(color_classifier(tmp_path / "x.onnx"))
    harm(model)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "x.onnx"


def two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def takes_text(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    model.graph.node[0].CopyFrom(helper.make_node("Identity", ["input"], ["pooled"]))
    del model.graph.node[1:]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("pooled", TensorProto.STRING, None))


def other_outputs(model: onnx.ModelProto) -> None:
    del model.graph.node[2:]
    model.graph.node.append(helper.make_node("Concat", ["flat", "flat"], ["twice"], axis=1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("twice", TensorProto.FLOAT, None))


def outputs_of_any_size(model: onnx.ModelProto) -> None:
    del model.graph.node[2:]
    model.graph.node.append(helper.make_node("NonZero", ["flat"], ["where"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("where", TensorProto.INT64, None))


def other_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 9


def no_labels(model: onnx.ModelProto) -> None:
    helper.set_model_props(model, runtime.build_metadata(PREPROCESSING, [], {}))


def deep_labels(model: onnx.ModelProto) -> None:
    entries = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, {**entries, "questpress.labels": "[" * 100_000})


def a_later_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99_999


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (two_inputs, r"it takes tensor\(float\), tensor\(float\)"),
        (takes_text, r"it takes tensor\(string\)"),
        (other_outputs, "has 6 outputs but 3 labels"),
        (outputs_of_any_size, r"shape \(1, 3\), got \(2, 0\)"),
        (other_size, "onnxruntime cannot run x.onnx"),
        (no_labels, "labels must be strings"),
        (deep_labels, "metadata of x.onnx is invalid"),
        (a_later_opset, "onnxruntime cannot load"),
    ],
)
def test_network_for_another_purpose_is_refused(
    harm: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message) as refused:
        Classifier.load(colors(tmp_path, harm), threads=1).predict([np.zeros((8, 8, 3), np.uint8)])
    assert "\n" not in str(refused.value)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact folder with a correct manifest."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    color_classifier(folder / "student.onnx")
    write_little_manifest(folder)
    return folder


def changed(artifact: Path, **change: Any) -> Path:
    """The artifact with a manifest that its author has changed, with a checksum that fits."""
    manifest = json.loads((artifact / "manifest.json").read_text()) | change
    (artifact / "manifest.json").write_text(
        json.dumps(manifest | {"checksum": runtime.compute_checksum(manifest)}), encoding="utf-8"
    )
    return artifact


def entry(artifact: Path) -> dict[str, Any]:
    [file] = json.loads((artifact / "manifest.json").read_text())["files"]
    return dict(file)


@pytest.mark.parametrize(
    "change",
    [
        {"preprocessing": "large"},
        {"preprocessing": {**PREPROCESSING.to_dict(), "crop_fraction": 10**400}},
        {"labels": "red"},
        {"labels": {"red": 1}},
        {"labels": []},
        {"files": {"a": 1}},
        {"files": [3]},
        {"files": []},
        {"files": [{"name": "student.onnx", "precision": "fp32", "bytes": 1, "sha256": "", "target": {}}]},
        {"task": "multi-label", "thresholds": [10**400] * 3},
        {"schema_version": 2},
        {"schema_version": [1]},
    ],
)
def test_invalid_manifest_is_refused(artifact: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError) as refused:
        Classifier.load(changed(artifact, **change), threads=1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 200_000, "", "null", '"x"', "\udcff", '{"schema_version": 1}'])
def test_unreadable_manifest_is_refused(artifact: Path, text: str) -> None:
    (artifact / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read"):
        Classifier.load(artifact)


def test_sparse_huge_manifest_is_not_read(artifact: Path) -> None:
    with (artifact / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match=r"1,099,511,627,776 bytes exceed the limit"):
        Classifier.load(artifact)


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "../student.onnx", "/etc/passwd", "x" * 5000])
def test_files_outside_the_folder_are_refused(artifact: Path, name: str) -> None:
    with pytest.raises(ArtifactError) as refused:
        Classifier.load(changed(artifact, files=[entry(artifact) | {"name": name}]))
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_neither_a_pipe_nor_a_device_is_waited_for(artifact: Path) -> None:
    (artifact / "student.onnx").unlink()
    os.mkfifo(artifact / "student.onnx")
    with pytest.raises(ArtifactError, match="it is not a file"):
        Classifier.load(artifact)
    (artifact / "student.onnx").unlink()
    (artifact / "student.onnx").symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="it is not a file"):
        Classifier.load(artifact)


def test_sparse_huge_model_is_not_read(artifact: Path) -> None:
    with (artifact / "student.onnx").open("r+b") as file:
        file.truncate(1 << 40)
    for path in (artifact, artifact / "student.onnx"):
        with pytest.raises(ArtifactError, match="limited to 2 GB"):
            Classifier.load(path)


STEERING = "red\x1b]0;owned\x07\x9b31m\u202eder\ud800\u2028"


def test_names_have_no_control_characters(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = changed(artifact, labels=[STEERING, "green", "blue"])
    photo = artifact.parent / "photo\x1b[2J.png"
    Image.new("RGB", (8, 8), "red").save(photo)
    for more in ([], ["--json"]):
        assert predict_cli.main(["--artifact", str(folder), "--threads", "1", *more, str(photo)]) == 0
        output = capsys.readouterr().out
        assert all(letter.isprintable() or letter in " \n" for letter in output)
        if more:
            assert json.loads(output)["top"][0]["label"] == STEERING
        else:
            escaped = "red\\x1b]0;owned\\x07\\x9b31m\\u202eder\\ud800\\u2028"
            assert "photo\\x1b[2J.png" in output and escaped in output
    photo.write_text("no image")
    assert predict_cli.main(["--artifact", str(folder), "--threads", "1", str(photo)]) == 1
    assert predict_cli.main(["--artifact", f"{folder}\x1b[2J", str(photo)]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_failing_network_is_an_error_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = colors(tmp_path, other_size)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photo.png")
    assert predict_cli.main(["--artifact", str(file), str(tmp_path / "photo.png")]) == 1
    assert capsys.readouterr().err.startswith("Error: onnxruntime cannot run x.onnx")
