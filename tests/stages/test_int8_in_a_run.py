"""The int8 search of a run and its files, and `compress export` on a finished run."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from questpress.export import predict_cli
from questpress.export.results import Candidate, FloatNode, Speedup
from questpress.export.runtime import Classifier, decode_image, render
from questpress.pipeline.stages import formats, quantize
from questpress.pipeline.tasks import load_task
from questpress.pipeline.tasks.base import Outputs

from tests.support import little
from tests.support.little import job, record, refused, report

MEASURE_LATENCY = quantize._measure_latency  # as it is before conftest.py replaces it


@pytest.fixture(scope="module")
def x86_vnni(one_thread: None) -> Any:  # noqa: ARG001  (which has candidates untimed)
    """Pretend a processor with VNNI, and time candidates."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("export.runtime.processor", "export.int8.targets", "pipeline.api.resolve"):
            patch.setattr(f"questpress.{place}.detect_target", lambda: "x86-vnni")
        patch.setattr(quantize, "_measure_latency", MEASURE_LATENCY)
        yield


@pytest.fixture(scope="module")
def a_run(
    x86_vnni: None,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
    data: Path,
    cache: Path,
) -> Path:
    out = tmp_path_factory.mktemp("int8") / "run"
    little.check_success(job(data, out, cache, "--calibration", "auto", "--until", "validate"))
    return out


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "artifact" / "manifest.json").read_text(encoding="utf-8"))


def activations(file: Path) -> set[int]:
    model = onnx.load(str(file))
    values = {t.name: t.data_type for t in model.graph.initializer}
    return {values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def test_calibrators_are_tried_and_one_ships(a_run: Path) -> None:
    (entry,) = report(a_run)["int8"]
    assert entry["target"] == "x86-vnni" and entry["file"] == "artifact/student.int8.onnx"
    candidates = entry["tried"]
    assert candidates[0]["name"] == "minmax"
    (ships,) = [c for c in candidates if c["ships"]]
    assert ships["holds"] and ships["score"] == max(c["score"] for c in candidates if c["holds"])
    assert ships["p50"] > 0 and ships["speedup"]["over"] == "fp32"
    times = {tuple(c["kept_float"]): c["p50"] for c in candidates}
    assert all(c["p50"] == times[tuple(c["kept_float"])] for c in candidates)  # timed once
    file = a_run / entry["file"]
    assert ships["bytes"] == file.stat().st_size
    assert entry["role"] == "val" and entry["n"] == 6
    kinds = {node["op_type"] for node in entry["float_parts"]}
    assert "QuantizeLinear" in kinds or "DequantizeLinear" in kinds
    assert not list(a_run.glob(".int8*"))  # candidates leave nothing behind


def test_calibration_images_are_recorded_by_hash(a_run: Path) -> None:
    recipe = report(a_run)["student_int8"]["quantization"]
    assert len(recipe["calibration"]["calibration_hash"]) == 64 and recipe["calibration"]["images"] == 16
    metadata = {e.key: e.value for e in onnx.load(str(a_run / "artifact/student.int8.onnx")).metadata_props}
    assert json.loads(metadata["questpress.quantization"]) == recipe


def test_files_of_single_images_are_the_same_otherwise(a_run: Path, tmp_path: Path, data: Path) -> None:
    out = Path(shutil.copytree(a_run, tmp_path / "run"))
    little.check_success(little.compress("export", out, "--batch", "1"))
    photos = sorted((data / "red").iterdir())[:3]
    for entry in manifest(out)["files"]:
        name = entry["name"]
        [dim, *_] = onnx.load(out / "artifact" / name).graph.input[0].type.tensor_type.shape.dim
        assert dim.dim_value == 1
        fixed, dynamic = (Classifier.load(run, file=name, threads=1) for run in (out, a_run))
        assert fixed.predict(photos) == dynamic.predict(photos)
        before = next(entry for entry in manifest(a_run)["files"] if entry["name"] == name)
        assert entry["accuracy"] == before["accuracy"]
    assert "float32 [1, 3, 16, 16]" in (out / "artifact" / "README.md").read_text("utf-8")
    assert not report(out)["bench"]["throughput"]


def test_further_formats_are_compared_and_used_only_by_name(
    a_run: Path,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(shutil.copytree(a_run, tmp_path / "run"))
    options = ("export", out, "--formats", "fp16", "--formats", "ort", "--bench-seconds", "0.1")
    little.check_success(little.compress(*options))
    files = {entry["name"]: entry for entry in manifest(out)["files"]}
    assert list(files) == [
        "student.int8.onnx", "student.onnx", "student.fp16.onnx", "student.ort", "student.int8.ort"
    ]  # fmt: skip
    entry, source = files["student.fp16.onnx"], files["student.onnx"]
    assert (entry["precision"], entry["target"], entry["quantization"]) == ("fp16", None, None)
    assert entry["bytes"] < 0.7 * source["bytes"] and entry["accuracy"]["n"] == source["accuracy"]["n"]
    photos = sorted((data / "red").iterdir())[:4]
    half, single = (Classifier.load(out, file=name, threads=1) for name in (entry["name"], source["name"]))
    pixels = np.stack([render(decode_image(photo), half.preprocessing) for photo in photos])
    difference = np.abs(half.predict_logits(pixels) - single.predict_logits(pixels)).max()
    assert difference <= 0.02 * np.abs(single.predict_logits(pixels)).max()
    assert entry["parity"]["max_abs"] > 0 and entry["parity"]["same"] == entry["parity"]["n"] == 6
    for name in ("student.ort", "student.int8.ort"):
        converted, onnx_file = files[name], files[name.replace(".ort", ".onnx")]
        same = ("precision", "target", "quantization", "accuracy", "opset", "ir_version")
        assert [converted[key] for key in same] == [onnx_file[key] for key in same]
        first, second = (Classifier.load(out, file=f["name"], threads=1) for f in (converted, onnx_file))
        np.testing.assert_allclose(first.predict_logits(pixels), second.predict_logits(pixels), atol=1e-4)
        content = (out / "artifact" / name).read_bytes()
        assert content[4:8] == b"ORTM" and b"ReorderOutput" not in content
    assert Classifier.load(out).name == "student.int8.onnx"
    assert Classifier.load(out, precision="fp16").name == "student.fp16.onnx"
    assert predict_cli.main(["--self-test", "--threads", "1", "--artifact", str(out)]) == 0
    assert "student.fp16.onnx: ok" in capsys.readouterr().out
    card = (out / "artifact/README.md").read_text("utf-8")
    assert card.count("with the same prediction on 6 of 6 test images") == 3
    # Files that differ too much are not written, and the former ones go.
    monkeypatch.setattr(formats, "MAX_DIFFERENCE", dict.fromkeys(formats.MAX_DIFFERENCE, -1))
    warnings: list[str] = []
    context: Any = SimpleNamespace(
        folder=SimpleNamespace(path=out),
        options=SimpleNamespace(formats=["fp16", "ort"]),
        task=load_task("classification"),
        display=SimpleNamespace(warn=warnings.append),
        progress=SimpleNamespace(update=lambda *_: None),
    )
    fp32 = Outputs(single.predict_logits(pixels), np.zeros(4, np.int64))
    sources = [formats.Source(Path("artifact/student.onnx"), None, fp32)]
    assert formats.write_formats(context, pixels, sources) == []
    assert {file.name for file in (out / "artifact").glob("student*")} == {
        "student.onnx",
        "student.int8.onnx",
    }
    for name, file, warning in zip(("fp16", "ort"), ("fp16.onnx", "ort"), warnings, strict=True):
        assert re.fullmatch(
            rf"--formats {name}: logits of up to \S+ differ by \S+, the prediction is the same on 4 of 4 "
            rf"images. student.{file} is not written",
            warning,
        )
    # The kernels of a processor without VNNI cannot check a file for others.
    monkeypatch.setattr(formats, "is_exact_here", lambda _: False)
    context.options.formats = ["ort"]
    source = formats.Source(Path("artifact/student.int8.onnx"), "arm64", fp32)
    assert formats.write_formats(context, pixels, [source]) == []
    assert (
        "student.int8.ort is not written, since this processor computes int8 files for arm64" in warnings[2]
    )


def test_export_makes_files_for_other_targets_and_trains_nothing(a_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    trained = record(out)["stages"]["student"]["finished"]
    result = little.compress(
        "export",
        out,
        "--target",
        "x86-vnni",
        "--target",
        "arm64",
        "--target",
        "x86",
        "--calibration",
        "minmax",
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert record(out)["stages"]["student"]["finished"] == trained
    names = {entry["target"]: entry["name"] for entry in manifest(out)["files"]}
    assert names == {
        "x86-vnni": "student.int8.onnx",
        "arm64": "student.int8.arm64.onnx",
        "x86": "student.int8.x86.onnx",
        None: "student.onnx",
    }
    artifact = out / "artifact"
    assert activations(artifact / "student.int8.onnx") == {TensorProto.UINT8}
    assert activations(artifact / "student.int8.arm64.onnx") == {TensorProto.INT8}
    weights = [
        numpy_helper.to_array(t)
        for t in onnx.load(str(artifact / "student.int8.x86.onnx")).graph.initializer
        if t.data_type == TensorProto.INT8 and t.name.endswith("weight_quantized")
    ]
    assert weights and max(int(abs(w.astype(int)).max()) for w in weights) <= 64
    entries = {entry["target"]: entry for entry in report(out)["int8"]}
    assert "this machine is" in entries["arm64"]["not_timed"] and entries["arm64"]["test_score"]["n"] > 0
    assert entries["x86"]["not_timed"] is None
    assert all(candidate["p50"] is None for candidate in entries["arm64"]["tried"])
    # The default file on this processor.
    assert Classifier.load(artifact).name == "student.int8.onnx"
    # An export for a single target removes the files for the others.
    assert little.compress("export", out, "--target", "x86-vnni").exit_code == 0
    assert sorted(p.name for p in artifact.glob("*.onnx")) == ["student.int8.onnx", "student.onnx"]


def test_fp32_ships_if_no_candidate_is_within_the_budget(
    a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    budget = quantize.Budget

    class Strict(budget):
        def judge(self, logits: Any) -> Any:
            return super().judge(logits).model_copy(update={"holds": False})

    monkeypatch.setattr(quantize, "Budget", Strict)
    result = little.check_success(little.compress("export", out, "--max-drop", "0", "--bench-seconds", "0.1"))
    assert [entry["name"] for entry in manifest(out)["files"]] == ["student.onnx"]
    assert not list((out / "artifact").glob("student.int8*"))
    results = report(out)
    assert results["student_int8"] is None and results["int8"][0]["file"] is None
    names = [candidate["name"] for candidate in results["int8"][0]["tried"]]
    assert any("biases corrected" in name for name in names) and any("nodes float" in name for name in names)
    assert Classifier.load(out).name == "student.onnx"
    assert "no int8" in result.stderr


def test_file_over_budget_ships_with_a_warning(
    a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    budget = quantize.Budget

    class OneImageLost(budget):
        def judge(self, logits: Any) -> Any:
            return super().judge(logits).model_copy(update={"lost": 100 / len(self.labels), "holds": True})

    monkeypatch.setattr(quantize, "Budget", OneImageLost)
    result = little.compress("export", out, "--max-drop", "0.7", "--calibration", "minmax")
    assert result.exit_code == 0, (result.output, result.exception)
    [warning] = [text for text in report(out)["warnings"] if "--max-drop" in text]
    assert warning in result.stderr
    for word in (
        "loses 16.67 points on 6 validation images, more than --max-drop 0.7",
        "this is 1 image only, which may be chance",
        "compress export RUN --qat",
        "--file student.onnx",
    ):
        assert word in warning


def test_training_images_decide_without_val_images(tmp_path: Path, data: Path, cache: Path) -> None:
    out = tmp_path / "run"
    result = little.check_success(job(data, out, cache, "--val-fraction", "0", "--until", "quantize"))
    (entry,) = report(out)["int8"]
    assert entry["role"] == "train" and entry["n"] == 16
    assert "There are no val images" in result.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--target", "x86", "--target", "x86"], "--target x86 is given twice"),
        (["--target", "riscv"], "riscv"),
        (["--opset", "17"], "--opset 17"),
        (["--opset", "999"], "--opset 999"),
        (["--qat-epochs", "2"], "--qat-epochs requires --qat"),
        (["--until", "qat"], "--until qat requires --qat"),
        (["--activation", "relu6"], "--activation relu6 is not supported"),
        (["--max-drop", "-1"], "max-drop"),
    ],
)
def test_invalid_int8_options_are_refused(
    tmp_path: Path, data: Path, cache: Path, options: list[str], sentence: str
) -> None:
    result = job(data, tmp_path / "run", cache, *options)
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.split()) and "Traceback" not in result.output


def test_export_of_an_unfinished_run_is_refused(tmp_path: Path, data: Path, cache: Path) -> None:
    assert "is not a run folder" in refused(little.compress("export", tmp_path), 2)
    out = tmp_path / "run"
    assert job(data, out, cache, "--until", "teacher").exit_code == 0
    assert "is not finished" in refused(little.compress("export", out), 2)


def test_invalid_option_leaves_the_artifact_unchanged(a_run: Path) -> None:
    before = little.files(a_run / "artifact")
    assert little.compress("export", a_run, "--opset", "3").exit_code == 2
    assert little.files(a_run / "artifact") == before


def test_other_activation_is_recorded_and_checked(tmp_path: Path, data: Path, cache: Path) -> None:
    out = tmp_path / "run"
    options = ("--student", "mobilenetv3_small_050", "--student-weights", "none", "--image-size", "32")
    little.check_success(job(data, out, cache, *options, "--activation", "relu6", "--until", "validate"))
    kinds = {node.op_type for node in onnx.load(str(out / "artifact/student.onnx")).graph.node}
    assert "HardSwish" not in kinds and "Clip" in kinds
    again = job(
        data, tmp_path / "other", cache, *options[:2], "--student-weights", out / "student.safetensors",
        "--image-size", "32", "--until", "student",
    )  # fmt: skip
    assert again.exit_code != 0 and "--activation relu6" in again.stderr


def build_candidate(low: float) -> Candidate:
    return Candidate(
        name="minmax", calibration="minmax", equalized=False, bias_corrected=False, kept_float=[],
        score=90.0, lost=0.0, sqnr=30.0, holds=True, ships=True, bytes=1, p50=1.0,
        speedup=Speedup(
            subject="student_int8", over="fp32", threads=1, ratio=low + 0.05, low=low, high=low + 0.1
        ),
    )  # fmt: skip


def test_slow_int8_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "ONNX Runtime has no integer kernel for HardSigmoid"
    parts = [FloatNode(name="a", op_type="HardSigmoid", why=kernel)] * 3
    monkeypatch.setattr(quantize, "detect_target", lambda: "x86-vnni")
    assert quantize.why_slow(build_candidate(1.01), parts) is None
    reason = quantize.why_slow(build_candidate(0.9), parts)
    assert reason is not None and "3 of its nodes run in float" in reason and "--activation relu6" in reason
    assert "so small" in (quantize.why_slow(build_candidate(0.9), []) or "")
    monkeypatch.setattr(quantize, "detect_target", lambda: "x86")
    assert "VNNI" in (quantize.why_slow(build_candidate(0.9), parts) or "")
    monkeypatch.setattr(quantize, "detect_target", lambda: "arm64")
    monkeypatch.setattr(quantize, "lacks_dot_products", lambda: True)
    assert "no int8 dot product" in (quantize.why_slow(build_candidate(0.9), parts) or "")
