"""A run with --input uint8, whose files take pixels."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from questpress.export import runtime
from questpress.export.runtime import Classifier

from tests.support import little


@pytest.fixture(scope="module")
def pixel_run(finished: Path, tmp_path_factory: pytest.TempPathFactory, data: Path, cache: Path) -> Path:
    """The finished run with another input of its files."""
    assert finished.is_dir()
    out = tmp_path_factory.mktemp("runs") / "pixels"
    little.check_success(little.job(data, out, cache, "--input", "uint8"))
    return out


@pytest.mark.parametrize("name", ["student.onnx", "student.int8.onnx"])
def test_both_files_take_pixels(pixel_run: Path, name: str) -> None:
    model = onnx.load(str(pixel_run / "artifact" / name))
    taken = model.graph.input[0].type.tensor_type
    assert taken.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in taken.shape.dim] == ["batch", 16, 16, 3]
    assert {entry.key: entry.value for entry in model.metadata_props}["questpress.input"] == "uint8"


def test_manifest_and_report_describe_the_input(pixel_run: Path, finished: Path) -> None:
    assert json.loads((pixel_run / "artifact" / "manifest.json").read_text())["input"] == "uint8"
    report = little.report(pixel_run)
    description = report["student_int8"]["quantization"]["input"]
    assert description == "uint8; normalization folded into the first convolution"
    assert "normalization folded" in (pixel_run / "report.html").read_text()
    assert report["config"]["input"] == "uint8" and little.report(finished)["config"]["input"] == "float"


def test_same_student_ships_as_without(pixel_run: Path, finished: Path, data: Path) -> None:
    ours, theirs = little.report(pixel_run), little.report(finished)
    assert little.weights(pixel_run / "student.safetensors") == little.weights(
        finished / "student.safetensors"
    )
    assert ours["student"]["score"] == theirs["student"]["score"]
    assert ours["student"]["parity"]["max_abs"] < 1e-4
    photos = sorted(data.glob("*/00*.png"))
    for precision, most in (("fp32", 1e-4), ("int8", 0.1)):
        predictions = [
            [dict(prediction.top) for prediction in classifier.predict(photos)]
            for classifier in (
                runtime.Classifier.load(folder, precision=precision) for folder in (pixel_run, finished)
            )
        ]
        for a, b in zip(*predictions, strict=True):
            assert max(abs(a[label] - b[label]) for label in a) <= most


def test_bench_has_timed_the_files_on_pixels(pixel_run: Path) -> None:
    report = little.report(pixel_run)
    for subject in ("teacher", "student", "student_int8"):
        assert report[subject]["latency_ms"]["1"]["n"] > 0
    session = runtime.open_session(pixel_run / "artifact" / "student.onnx", 1)
    with pytest.raises(Exception, match="tensor\\(uint8\\)"):
        session.run(None, {"input": np.zeros((1, 3, 16, 16), np.float32)})


def test_predict_reads_a_photo(pixel_run: Path, data: Path) -> None:
    photo = next(data.glob("red/*.png"))
    result = little.compress("predict", pixel_run, photo)
    assert result.exit_code == 0 and f"{photo}: " in result.stdout and "%" in result.stdout


def test_network_without_foldable_layer_ships_with_a_note(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("questpress.export.conversion.pixel_input.fold_normalization", lambda *_: None)
    little.check_success(little.job(data, tmp_path, cache, "--input", "uint8"))
    report = little.report(tmp_path)
    [note] = [text for text in report["warnings"] if text.startswith("--input uint8: ")]
    assert "about 10 %" in note and little.STUDENT in note
    assert report["student_int8"]["quantization"]["input"].endswith("in float, before the network")
    assert report["student"]["parity"]["max_abs"] < 1e-4


def test_pixel_input_is_exported_again_without_training(
    a_run: Path, tmp_path: Path, data: Path, cache: Path
) -> None:
    out = tmp_path / "again"
    shutil.copytree(a_run, out)
    trained = little.record(out)["stages"]["student"]["finished"]
    little.check_success(little.job(data, out, cache, "--input", "uint8", "--until", "validate"))
    assert little.record(out)["stages"]["student"]["finished"] == trained
    files = [out / "artifact" / name for name in ("student.onnx", "student.int8.onnx")]
    assert all(Classifier(file.read_bytes(), file.name).takes_pixels for file in files)
