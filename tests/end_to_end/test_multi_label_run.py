"""A run on multi-label data: two to four of the built-in digits in one image."""

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from questpress.export.runtime import Classifier, sigmoid
from questpress.pipeline.api.options import read_options
from questpress.pipeline.api.resolve import resolve
from questpress.pipeline.api.validate.validate import validate
from questpress.pipeline.data.sources import open_data
from questpress.pipeline.report.terminal import report_table
from questpress.pipeline.runs.results import Report
from questpress.pipeline.tasks import load_task
from safetensors.numpy import load_file

from benchmarks import digits_on_canvas
from tests.support import little

METHODS = "quest+kd+mimic+feed"


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = digits_on_canvas.write(tmp_path_factory.mktemp("data") / "canvas", images=160, seed=1)
    return path


@pytest.fixture(scope="module")
def run(labels: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "canvas"
    little.check_success(little.job(labels, out, cache, "--method", METHODS, "--until", "validate"))
    return out


def test_report_has_map_and_f1_of_the_files_that_ship(run: Path, labels: Path) -> None:
    report, data = little.report(run), open_data(str(labels))
    assert report["data"]["task"] == "multi-label" and report["confusion"] is None
    test = data.test
    targets = np.array([[label in image.labels for label in range(10)] for image in test], dtype=np.float32)
    for key, name in (("student", "student.onnx"), ("student_int8", "student.int8.onnx")):
        score = report[key]["score"]
        assert score["metric"] == "mAP" and score["correct"] is None
        classifier = Classifier.load(run, file=name)
        outputs = classifier.predict([image.read() for image in test], top=10)
        p = np.array([[dict(output.top)[label] for label in data.classes] for output in outputs])
        logits = np.log(p) - np.log1p(-p)
        assert score["percent"] == pytest.approx(load_task("multi-label").percent(logits, targets), abs=0.05)
        decided = np.array([[label in dict(output.labels) for label in data.classes] for output in outputs])
        right = 2 * (decided & (targets > 0)).sum() / (decided.sum() + targets.sum())
        assert score["details"]["micro F1"]["percent"] == pytest.approx(100 * right)
        assert score["low"] <= score["percent"] <= score["high"] and score["n"] == len(test)
    losses = [epoch["losses"] for epoch in report["epochs"] if epoch["stage"] == "student"]
    assert all({"loss", "ce", *METHODS.split("+")} == set(row) for row in losses)
    assert all(epoch["train_accuracy"] is None and epoch["val_accuracy"] > 0 for epoch in report["epochs"])


def test_thresholds_are_the_fp32_files_best_on_the_val_images(run: Path, labels: Path) -> None:
    manifest = json.loads((run / "artifact" / "manifest.json").read_text())
    assert manifest["task"] == "multi-label" and len(manifest["thresholds"]) == 10
    data = open_data(str(labels))
    outputs = Classifier.load(run, precision="fp32").predict([i.read() for i in data.val], top=10)
    p = np.array([[dict(output.top)[label] for label in data.classes] for output in outputs])
    targets = np.array([[label in i.labels for label in range(10)] for i in data.val], dtype=np.float32)
    expected = load_task("multi-label").choose_thresholds(np.log(p) - np.log1p(-p), targets)
    np.testing.assert_allclose(manifest["thresholds"], expected, atol=1e-6)
    for name in ("student.onnx", "student.int8.onnx"):
        model = onnx.load(run / "artifact" / name)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        assert entries["questpress.task"] == "multi-label"
        assert json.loads(entries["questpress.thresholds"]) == manifest["thresholds"]
    assert set(manifest["files"][0]["accuracy"]) == {"map", "n", "low", "high", "micro_f1", "macro_f1"}


def test_single_file_predicts_as_the_folder(run: Path, labels: Path) -> None:
    images = sorted((labels.parent / "images").iterdir())[:4]
    alone = Classifier.load(run / "artifact" / "student.int8.onnx").predict(images)
    assert alone == Classifier.load(run).predict(images)
    for prediction in alone:
        assert prediction.top[0] == (prediction.label, prediction.probability)


def test_predict_prints_the_labels_above_their_thresholds(run: Path, labels: Path) -> None:
    image = labels.parent / "images" / "00000.png"
    [expected] = Classifier.load(run).predict([image])
    stdout = little.compress("predict", run, image).stdout
    shown = ", ".join(f"{label} {100 * p:.1f} %" for label, p in expected.labels)
    assert stdout == f"{image}: {shown or 'none of the labels'}\n"
    content = json.loads(little.compress("predict", run, image, "--json").stdout)
    assert [row["label"] for row in content["labels"]] == [label for label, _ in expected.labels]
    assert len(content["top"]) == 3


def test_page_shows_map_and_classes_but_no_confusion(run: Path) -> None:
    for name in ("report.html", "report.md"):
        text = (run / name).read_text()
        for words in ("mAP", "several per image", "threshold", "Micro F1"):
            assert words in text, (name, words)
        for words in ("Confusion", "Most confused", "Accuracy"):
            assert words not in text, (name, words)
    columns = report_table(Report.model_validate(little.report(run))).columns
    assert columns[1] == "mAP"
    example = little.report(run)["examples"][0]
    assert ", " in example["label"] and 0 < example["student_probability"] <= 1


def test_teacher_agreement_compares_predicted_labels(run: Path, labels: Path) -> None:
    report, data = little.report(run), open_data(str(labels))
    thresholds = np.array([row["threshold"] for row in report["teacher"]["score"]["classes"]])
    teacher = sigmoid(load_file(run / "teacher.logits.safetensors")["0"]) >= thresholds
    outputs = Classifier.load(run).predict([image.read() for image in data.test])
    student = np.array([[label in dict(output.labels) for label in data.classes] for output in outputs])
    same = int((teacher == student).all(1).sum())
    assert report["student_int8"]["agreement"]["correct"] == same


def test_validate_scores_the_files_as_the_report_does(run: Path, tmp_path: Path) -> None:
    result, report = validate(run, out=tmp_path, quiet=True), little.report(run)
    assert result.task == "multi-label" and result.n == report["data"]["test"]
    for net, key in zip(result.networks, ("student_int8", "student"), strict=False):
        score = net.score
        assert score is not None and net.confusion is None
        assert score.percent == pytest.approx(report[key]["score"]["percent"])
        micro = report[key]["score"]["details"]["micro F1"]["percent"]
        assert score.details["micro F1"].percent == pytest.approx(micro)
        shown = {row.label: row.n for row in score.classes}
        assert {row.label: row.n for row in net.per_class} == shown
    assert not (run / "bench" / "teacher.onnx").exists() and "not compared with a teacher" in result.notes[0]
    rows = list(csv.DictReader((tmp_path / "mistakes.csv").open(encoding="utf-8")))
    assert len(rows) == sum(net.mistakes for net in result.networks)
    assert all(set(row["label"].split(", ")) != set(row["prediction"].split(", ")) for row in rows)
    assert "average precision" in (tmp_path / "validation.html").read_text()


def test_single_label_model_is_not_validated_on_multi_label_data(labels: Path, finished: Path) -> None:
    little.refused(little.compress("validate", finished, "--data", labels), 2, "multi-label")


def test_methods_for_one_label_and_a_file_without_images_are_refused(
    labels: Path, tmp_path: Path, cache: Path
) -> None:
    dkd = ("--method", "dkd", "--set", "dkd.tau=2")
    given = (*little.NETWORKS, *little.SMALL, "--cache", cache, "--out", tmp_path / "out")
    little.refused(little.compress(*given, "--data", labels, *dkd), 2, "multi-label", "quest")
    (tmp_path / "labels.csv").write_text("file,labels\na.png,cat;dog\n")
    little.refused(little.compress(*given, "--data", tmp_path / "labels.csv"), 2, "1 of 1 images", "a.png")


def test_weights_are_balanced_only_if_requested(run: Path, labels: Path) -> None:
    assert little.record(run)["config"]["balance"] == "off"
    given = {"teacher": little.TEACHER, "student": little.STUDENT, "data": str(labels), "image_size": 16}
    assert resolve(read_options({**given, "balance": "auto"}))[0].balance == "auto"
