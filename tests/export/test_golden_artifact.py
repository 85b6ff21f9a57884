"""An artifact of the first schema version loads for ever, and answers as it did when it was made.

`golden/` was written by questpress 0.1.0, from 60 pictures in three colours, and is never written anew: a
change that it does not survive wants a new schema version, beside which the first is still read.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from questpress.export.runtime import ArtifactError, Classifier, read_manifest

GOLDEN = Path(__file__).with_name("golden")

PROBABILITIES = json.loads((GOLDEN.parent / "golden_answers.json").read_text())
"""Of each file, for each of ``pictures()``, in the order of the labels."""


def pictures() -> list[np.ndarray]:
    """A slope in each colour, with some of the others: uint8 [24,20,3]."""
    y, x = np.mgrid[:24, :20]
    found = []
    for channel in (2, 1, 0):
        pixels = np.stack([(3 * y + 2 * x + 40 * c) % 120 for c in range(3)], axis=-1)
        pixels[..., channel] += 120
        found.append(pixels.astype(np.uint8))
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("int8", 0.05)])
def test_it_answers_as_it_did(precision: str, tolerance: float) -> None:
    # Processors without VNNI add products of int8 in 16 bits, which changes the last digits.
    classifier = Classifier.load(GOLDEN, precision=precision, threads=1)
    assert list(classifier.labels) == ["blue", "green", "red"]
    answers = classifier.predict(pictures(), top=3)
    assert [one.label for one in answers] == ["blue", "green", "red"]
    found = [[dict(one.top)[label] for label in classifier.labels] for one in answers]
    np.testing.assert_allclose(found, PROBABILITIES[precision], atol=tolerance)


def test_each_file_alone_answers_as_in_its_folder() -> None:
    for name, precision in (("student.onnx", "fp32"), ("student.int8.onnx", "int8")):
        alone = Classifier.load(GOLDEN / name, threads=1).predict(pictures(), top=3)
        assert alone == Classifier.load(GOLDEN, precision=precision, threads=1).predict(pictures(), top=3)


def test_the_program_that_was_shipped_with_it_answers(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "artifact")
    Image.fromarray(pictures()[2]).save(tmp_path / "red.png")
    done = subprocess.run(
        [sys.executable, "-I", tmp_path / "artifact" / "predict.py", tmp_path / "red.png", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[0])
    assert "red" in json.dumps(answer)


def test_a_manifest_of_a_later_version_is_one_sentence(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "later")
    manifest = tmp_path / "later" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ArtifactError, match="version"):
        read_manifest(tmp_path / "later")
