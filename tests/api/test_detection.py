"""A whole detection job: from COCO boxes to the artifact, and the commands on its run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from questpress.export.runtime import Detector, open_model
from questpress.pipeline.training import loop

from tests.support import little
from tests.support.boxes import COLORS, scene, write_coco
from tests.support.little import compress, refused, report

OPTIONS = (
    "--teacher-weights", "none", "--student-weights", "none", "--image-size", "64",
    "--batch-size", "8", "--teacher-epochs", "1", "--epochs", "1",
    "--calibration-images", "4", "--calibration", "minmax",
)  # fmt: skip


def networks(name: str) -> tuple[str, ...]:
    return ("--teacher", name, "--student", name, *OPTIONS)


RETINANET = networks("retinanet:test_efficientnet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    counts = {"train": range(16), "val": range(16, 22), "test": range(22, 28)}
    return write_coco(root, {split: [scene(seed) for seed in seeds] for split, seeds in counts.items()})


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    little.check_success(compress(
        *RETINANET, "--method", "mimic+pkd", "--set", "mimic.hashes=8", "--data", data,
        "--out", folder / "run", "--cache", folder / "cache", "--until", "validate",
    ))  # fmt: skip
    return folder / "run"


def test_run_reports_average_precision_and_ships_a_detector(finished: Path) -> None:
    content = report(finished)
    assert content["data"]["task"] == "detection" and content["data"]["test"] == 6
    assert content["student"]["score"]["metric"] == "AP" and content["student"]["score"]["n"] == 6
    assert {"AP50", "AP75"} <= content["student"]["score"]["details"].keys()
    epoch = next(e for e in content["epochs"] if e["stage"] == "student")
    assert {"ce", "mimic", "pkd"} <= epoch["losses"].keys()
    assert {"correlation", "equal_bits"} <= epoch["metrics"].keys()
    manifest = json.loads((finished / "artifact/manifest.json").read_text())
    assert manifest["task"] == "detection" and manifest["labels"] == sorted(COLORS)
    assert isinstance(open_model(finished / "artifact/student.onnx"), Detector)
    page = (finished / "report.html").read_text()
    assert "AP50" in page and "Precision, % by recall, %" in page


def test_prediction_draws_boxes(finished: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(scene(99).png)
    drawn = tmp_path / "drawn.png"
    result = little.check_success(
        compress("predict", finished, photo, "--json", "--min-score", "0", "--draw", drawn)
    )
    width, height = PillowImage.open(photo).size
    for found in json.loads(result.stdout)["detections"]:
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    assert PillowImage.open(drawn).size == (width, height)


def test_validation_repeats_the_score_of_the_run(finished: Path, data: Path) -> None:
    out = finished.parent / "validation"
    little.check_success(compress("validate", finished, "--data", data.parent / "test.json", "--out", out))
    validation = json.loads((out / "validation.json").read_text())
    scores = [network["score"]["percent"] for network in validation["networks"]]
    assert np.isclose(report(finished)["student_int8"]["score"]["percent"], scores, atol=1e-6).any()


def test_interrupted_two_stage_training_resumes_to_the_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its anchors and regions are sampled at random in each step.
    arguments = (
        *networks("fasterrcnn:test_efficientnet"), "--epochs", "2", "--method", "mimic+pkd",
        "--set", "mimic.hashes=8", "--data", data, "--cache", tmp_path / "cache", "--until", "student",
    )  # fmt: skip
    little.check_success(compress(*arguments, "--out", tmp_path / "whole"))
    real, steps = loop.backward, []

    def interrupted(*passed: Any) -> None:
        steps.append(1)
        if len(steps) == 4:  # in the second epoch, as the teacher is that of the first run
            raise KeyboardInterrupt
        real(*passed)

    monkeypatch.setattr(loop, "backward", interrupted)
    assert compress(*arguments, "--out", tmp_path / "run").exit_code == 130
    monkeypatch.setattr(loop, "backward", real)
    little.check_success(compress(*arguments, "--out", tmp_path / "run"))
    runs = (tmp_path / "whole", tmp_path / "run")
    whole, resumed = (little.weights(run / "student.safetensors") for run in runs)
    assert whole == resumed
    epochs = [[epoch["losses"] for epoch in report(run)["epochs"]] for run in runs]
    assert epochs[0] == epochs[1] and {"ce", "mimic", "pkd"} <= epochs[0][-1].keys()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--weight", "ce=0"), "--weight ce=0 does not support detection: no method trains the boxes"),
        (("--calibrate",), "--calibrate does not support detection: its scores have no temperature"),
        (("--formats", "fp16"), "--formats does not support detection: the files are compared by logits"),
        (("--qat",), "--qat does not support detection"),
        (("--randaugment", "2,9"), "--randaugment does not support detection: it moves objects"),
        (("--erasing", "0.5"), "--erasing does not support detection: it hides objects"),
        (("--mixup", "0.2"), "--mixup does not support detection: the boxes of two images"),
        (("--cutmix", "1"), "--cutmix does not support detection: it hides objects"),
        (("--method", "kd"), "--method kd does not support detection data"),
        (("--student", "resnet18"), "detector"),
    ],
)
def test_options_of_classifiers_are_refused(
    more: tuple[str, ...], message: str, data: Path, tmp_path: Path
) -> None:
    result = compress(*RETINANET, "--method", "pkd", "--data", data, "--out", tmp_path / "run", *more)
    assert message in refused(result, 2)
