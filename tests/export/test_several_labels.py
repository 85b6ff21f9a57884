"""A shipped network for images of several labels: each label for itself, those above their thresholds."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from questpress.export import runtime
from questpress.export.artifact import ShippedFile, write_manifest
from questpress.export.conversion.onnx_export import OnnxFile, with_metadata
from questpress.export.runtime import ArtifactError, Classifier

from tests.support.networks import LABELS, PREPROCESSING, color_classifier, onnx_file

THRESHOLDS = [0.9, 0.2, 0.5]


def described(thresholds: list[float] | None) -> dict[str, str]:
    return runtime.build_metadata(PREPROCESSING, LABELS, {}, thresholds)


@pytest.fixture
def file(tmp_path: Path) -> OnnxFile:
    return onnx_file(color_classifier(tmp_path / "student.onnx", described(THRESHOLDS)))


def test_labels_are_those_that_reach_their_threshold(file: OnnxFile) -> None:
    classifier = Classifier.load(file.path)
    pixels = np.full((4, 4, 3), 128, np.uint8)
    logits = classifier.predict_logits(runtime.render(pixels, classifier.preprocessing)[None])[0]
    [prediction] = classifier.predict([pixels])
    assert sum(probability for _, probability in prediction.top) != pytest.approx(1)
    p = dict(zip(LABELS, 1 / (1 + np.exp(-logits.astype(np.float64))), strict=True))
    assert dict(prediction.top) == pytest.approx(p)
    expected = {label for label, least in zip(LABELS, THRESHOLDS, strict=True) if p[label] >= least}
    assert {label for label, _ in prediction.labels} == expected
    assert [q for _, q in prediction.labels] == sorted((q for _, q in prediction.labels), reverse=True)


def test_single_label_network_has_no_thresholds(tmp_path: Path) -> None:
    assert not {key for key in described(None) if key in ("questpress.task", "questpress.thresholds")}
    color_classifier(tmp_path / "one.onnx", described(None))
    classifier = Classifier.load(tmp_path / "one.onnx")
    [prediction] = classifier.predict([np.full((4, 4, 3), (0, 0, 255), np.uint8)])
    assert classifier.thresholds is None and prediction.labels == [(prediction.label, prediction.probability)]


def test_manifest_without_a_task_is_of_one_label_and_one_with_it_has_thresholds(file: OnnxFile) -> None:
    folder = file.path.parent
    for thresholds in (None, THRESHOLDS):
        write_manifest(
            folder, files=[ShippedFile(file, "fp32")], preprocessing=PREPROCESSING, labels=LABELS, origin={},
            thresholds=thresholds,
        )  # fmt: skip
        manifest = json.loads((folder / "manifest.json").read_text())
        assert ("task" in manifest) == ("thresholds" in manifest) == (thresholds is not None)
        activation = "softmax" if thresholds is None else "sigmoid"
        assert [output["activation"] for output in manifest["outputs"]] == [activation]
        loaded = Classifier.load(folder, precision="fp32").thresholds
        assert (None if loaded is None else loaded.tolist()) == thresholds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "has version 2, this runtime supports version 1"),
        ({"task": "regression"}, "unknown task 'regression'"),
        ({"thresholds": [0.5]}, r"thresholds must be 3 numbers from 0 to 1, got \[0\.5\]"),
        ({"thresholds": [0.5, 0.5, 7]}, "thresholds must be 3 numbers"),
        ({"thresholds": [0.5, 0.5, True]}, "thresholds must be 3 numbers"),
        ({"thresholds": None}, "thresholds must be 3 numbers"),
    ],
)
def test_manifest_that_cannot_be_followed_is_refused(
    file: OnnxFile, change: dict[str, object], words: str
) -> None:
    folder = file.path.parent
    path = write_manifest(
        folder, files=[ShippedFile(file, "fp32")], preprocessing=PREPROCESSING, labels=LABELS, origin={},
        thresholds=THRESHOLDS,
    )  # fmt: skip
    manifest = json.loads(path.read_text()) | change
    path.write_text(json.dumps(manifest | {"checksum": runtime.compute_checksum(manifest)}))
    with pytest.raises(ArtifactError, match=words):
        Classifier.load(folder)


def test_other_metadata_leaves_the_network_as_it_is(file: OnnxFile) -> None:
    pixels = np.full((2, 3, 8, 8), 0.25, np.float32)
    before = Classifier.load(file.path).logits(pixels)
    changed = with_metadata(file, described([0.1, 0.1, 0.1]))
    after = Classifier.load(file.path)
    assert after.thresholds is not None and after.thresholds.tolist() == [0.1, 0.1, 0.1]
    np.testing.assert_array_equal(after.logits(pixels), before)
    assert changed.bytes == file.path.stat().st_size and changed.opset == file.opset


def test_metadata_have_the_keys_of_ultralytics() -> None:
    for metadata in (described(None), described(THRESHOLDS)):
        assert ast.literal_eval(metadata["names"]) == dict(enumerate(LABELS))
        assert ast.literal_eval(metadata["imgsz"]) == [8, 8]
        assert (metadata["task"], metadata["stride"]) == ("classify", "1")


def test_sigmoid_is_stable_for_large_logits() -> None:
    np.testing.assert_allclose(runtime.sigmoid(np.float32([-1000, 0, 1000])), [0, 0.5, 1], atol=1e-12)
