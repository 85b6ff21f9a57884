"""Runs with and without --calibrate."""

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from questpress.export.runtime import Classifier, render
from questpress.pipeline.errors import JobError
from questpress.pipeline.runs.results import Report
from questpress.pipeline.stages.export import check_temperature
from questpress.pipeline.stages.validate import _check_calibration

from tests.support import little
from tests.support.little import refused, report
from tests.support.pictures import open_digits


def run(out: Path, cache: Path, *more: str) -> None:
    little.check_success(little.compress(
        *little.NETWORKS, "--method", "none", "--image-size", "16", "--teacher-epochs", "1", "--epochs", "4",
        "--batch-size", "32", "--calibration-images", "32", "--until", "validate", "--out", out,
        "--cache", cache, *more,
    ))  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    run(out, cache)
    return out


@pytest.fixture(scope="module")
def tempered(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("tempered") / "run"
    run(out, cache, "--calibrate")
    return out


def logits(out: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a shipped file's logits on the test images, and the labels."""
    test = open_digits().test
    classifier = Classifier.load(out / "artifact" / name)
    pixels = np.stack([render(image.read(), classifier.preprocessing) for image in test])
    return classifier.predict_logits(pixels), np.array([image.label for image in test])


def test_student_is_the_same_file_and_its_fp32_logits_are_divided_by_the_temperature(plain, tempered):
    assert (plain / "student.safetensors").read_bytes() == (tempered / "student.safetensors").read_bytes()
    t = report(tempered)["temperature"]["value"]
    assert 0.05 < t < 20 and abs(t - 1) > 0.02
    (before, _), (after, _) = logits(plain, "student.onnx"), logits(tempered, "student.onnx")
    assert np.allclose(after * t, before, atol=1e-4)
    assert (after.argmax(1) == before.argmax(1)).all()


@pytest.mark.parametrize(
    ("before", "after", "warns"), [(5.3, 15.0, True), (15.0, 5.3, False), (2.0, 2.01, False)]
)
def test_calibration_that_makes_the_test_ece_worse_is_a_warning(before, after, warns):
    context = Mock()
    _check_calibration(context, before, after)
    assert context.display.warn.called == warns
    if warns:
        assert "the ECE was 5.3 %, and is 15.0 %" in context.display.warn.call_args[0][0]


def test_calibration_changes_no_prediction(plain, tempered):
    a, b = report(plain), report(tempered)
    assert a["student"]["score"] == b["student"]["score"]
    assert a["confusion"] == b["confusion"]


def test_temperature_is_in_the_manifest_and_in_both_files(plain, tempered):
    t = report(tempered)["temperature"]["value"]
    manifest = json.loads((tempered / "artifact/manifest.json").read_text())
    assert manifest["origin"]["temperature"] == t
    for name in ("student.onnx", "student.int8.onnx"):
        entries = Classifier.load(tempered / "artifact" / name).session.get_modelmeta().custom_metadata_map
        assert json.loads(entries["questpress.origin"])["temperature"] == t
    assert "temperature" not in json.loads((plain / "artifact/manifest.json").read_text())["origin"]


@pytest.mark.parametrize(
    ("key", "name"), [("student", "student.onnx"), ("student_int8", "student.int8.onnx")]
)
def test_calibration_is_measured_on_each_shipped_file_before_and_after(plain, tempered, key, name):
    results = report(tempered)
    measured = results[key]["calibration"]
    t = results["temperature"]["value"]
    given, labels = logits(tempered, name)
    assert measured["temperature"] == t and measured["n"] == len(labels) == 179
    assert measured["nll"] == pytest.approx(nll(given, labels), rel=1e-4)
    assert measured["before"]["nll"] == pytest.approx(nll(given * t, labels), rel=1e-4)
    assert measured["ece"] != measured["before"]["ece"]
    assert measured["accuracy"] == pytest.approx(results[key]["score"]["percent"])
    without = report(plain)[key]["calibration"]
    assert without["before"] is None and without["temperature"] is None
    if key == "student":
        assert measured["before"]["ece"] == pytest.approx(without["ece"], abs=0.01)
    assert results["temperature"]["nll_after"] < results["temperature"]["nll_before"]


def nll(z: np.ndarray, labels: np.ndarray) -> float:
    z = z.astype(np.float64)
    return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]).mean())


def test_teachers_calibration_is_measured_too(plain):
    teacher, teachers = (report(plain)[key] for key in ("teacher", "teachers"))
    assert teacher["calibration"]["n"] == 179
    assert teachers[0]["calibration"] == teacher["calibration"]
    assert teacher["calibration"]["accuracy"] == pytest.approx(teacher["score"]["percent"])
    Report.model_validate(report(plain))


def test_report_shows_the_temperature(tempered):
    t = report(tempered)["temperature"]["value"]
    for name in ("report.html", "report.md"):
        page = (tempered / name).read_text()
        assert "Calibration" in page and "NLL" in page and f"{t:.2f}" in page


def test_several_teachers_are_measured_each_and_together(data, cache, tmp_path):
    out = tmp_path / "run"
    result = little.job(
        data, out, cache, "--teacher", little.STUDENT, "--method", "quest", "--until", "validate"
    )
    assert result.exit_code == 0, result.output
    teacher, teachers = (report(out)[key] for key in ("teacher", "teachers"))
    assert [entry["calibration"]["n"] for entry in teachers] == [6, 6]
    assert teacher["calibration"]["accuracy"] == pytest.approx(teacher["score"]["percent"])


def test_calibrate_without_val_images_is_refused(cache, tmp_path):
    given = little.photos(
        tmp_path / "data", {f"{r}/{c}": n for r, n in (("train", 12), ("val", 4)) for c in little.CLASSES}
    )
    result = little.job(given, tmp_path / "run", cache, "--val-fraction", "0", "--calibrate")
    refused(result, 2, "--calibrate", "Set --val-fraction")
    assert not (tmp_path / "run").exists()


def test_changed_predictions_are_an_error():
    plain = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
    check_temperature(plain, plain / np.float32(1.7), 1.7)
    check_temperature(np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32), 2.0)
    with pytest.raises(JobError, match="temperature"):
        check_temperature(plain, plain / np.float32(1.7), 1.71)
    with pytest.raises(JobError, match="temperature"):
        check_temperature(plain, plain * np.float32(np.nan), 1.7)
