"""`predict.py --self-test`: it finds outputs and preprocessing that differ from those at export."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from questpress.export import predict_cli, runtime
from questpress.export.artifact import ShippedFile, write_manifest
from questpress.export.device import self_test
from questpress.export.runtime import ArtifactError, Preprocessing

from tests.support.networks import LABELS, PREPROCESSING, color_classifier, onnx_file

FILTERED = replace(PREPROCESSING, interpolation="box")


def write_artifact(folder: Path, preprocessing: Preprocessing = PREPROCESSING) -> Path:
    files = [
        ShippedFile(onnx_file(color_classifier(folder / name)), precision, target=target)
        for name, precision, target in (
            ("student.int8.onnx", "int8", runtime.detect_target()),
            ("student.int8.other.onnx", "int8", "other"),
            ("student.onnx", "fp32", None),
        )
    ]
    write_manifest(folder, files=files, preprocessing=preprocessing, labels=LABELS, origin={})
    return folder


def change_manifest(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    manifest = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value}
    path.write_text(json.dumps(manifest | {"checksum": runtime.compute_checksum(manifest)}))


def run(folder: Path) -> int:
    return predict_cli.main(["--self-test", "--threads", "1", "--artifact", str(folder)])


def test_self_test_passes_on_the_machine_that_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_artifact(tmp_path)
    folder.chmod(0o555)
    assert run(folder) == 0
    assert capsys.readouterr() == (
        "preprocessing: ok, pixels differ by 0.00 levels, 1 is allowed\n"
        "student.int8.onnx: ok, outputs differ by 0.00% of their spread, 10% is allowed\n"
        "student.int8.other.onnx: skipped, it is for other\n"
        "student.onnx: ok, outputs differ by 0.00% of their spread, 1% is allowed\n",
        "",
    )
    assert (folder / "selftest.json").stat().st_size < 8_000


def test_stored_values_are_those_of_the_network(tmp_path: Path) -> None:
    test = json.loads((write_artifact(tmp_path) / "selftest.json").read_text())
    classifier = runtime.Classifier.load(tmp_path, precision="fp32", threads=1)
    decoded = [runtime.decode_image(self_test.base64.b64decode(image)) for image in test["images"]]
    rendered = np.stack([runtime.render(pixels, classifier.preprocessing) for pixels in decoded])
    means = 10 / 255 * rendered.mean(axis=(1, 2))
    np.testing.assert_allclose(test["files"]["student.onnx"]["logits"], means[:2], rtol=1e-5)
    assert test["pixels"][2] == rendered[2].ravel()[np.linspace(0, 191, 64).round().astype(int)].tolist()


@pytest.mark.parametrize(
    ("factors", "cause"),
    [
        ({"int8": 1.3}, r"the int8 kernels of onnxruntime .* Use --file student\.onnx"),
        ({"int8": 1.3, "fp32": 1.02}, r"onnxruntime .* computes other outputs on this processor"),
        ({"int8": np.nan}, "the int8 kernels"),
        ({"int8": 1.005, "fp32": 1.0001}, None),
    ],
)
def test_kernels_that_compute_something_else_are_found(
    tmp_path: Path,
    factors: dict[str, float],
    cause: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_artifact(tmp_path)
    correct = runtime.Model.run

    def run_inexactly(model: runtime.Model, batch: np.ndarray) -> list[np.ndarray]:
        factor = factors.get("int8" if "int8" in model.name else "fp32", 1)
        return [np.float32(factor) * output for output in correct(model, batch)]

    monkeypatch.setattr(runtime.Model, "run", run_inexactly)
    assert run(tmp_path) == int(cause is not None)
    lines = capsys.readouterr()
    assert lines.out.count("FAILED") == (len(factors) if cause else 0)
    if cause is not None:
        assert re.search(cause, lines.err) and lines.err.count("\n") == 1


def test_other_preprocessing_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_manifest(write_artifact(tmp_path), {"preprocessing": FILTERED.to_dict()})
    assert run(tmp_path) == 1
    assert "Pillow" in capsys.readouterr().err


def test_artifact_without_a_self_test_or_with_a_damaged_one_is_refused(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path)
    for content in (b"[]", b"{", b'{"images": ["?"], "pixels": [], "files": {}}'):
        (folder / "selftest.json").write_bytes(content)
        entry = {"name": "selftest.json", "bytes": len(content)}
        change_manifest(folder, {"self_test": entry | {"sha256": hashlib.sha256(content).hexdigest()}})
        with pytest.raises(ArtifactError, match=r"selftest\.json cannot be used: \w+Error: "):
            self_test.run_self_test(folder)
    (folder / "selftest.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"selftest\.json is damaged"):
        self_test.run_self_test(folder)
    change_manifest(folder, {"self_test": {"name": "../selftest.json", "bytes": 1, "sha256": ""}})
    with pytest.raises(ArtifactError, match="invalid file name"):
        self_test.run_self_test(folder)
    change_manifest(folder, {"self_test": None})
    with pytest.raises(ArtifactError, match=r"contains no selftest\.json\. Export the run again"):
        self_test.run_self_test(folder)


def test_order_of_regions_does_not_matter() -> None:
    regions = np.random.default_rng(0).random((100, 4))
    np.testing.assert_array_equal(self_test.sample(regions), self_test.sample(regions[::-1]))
    assert self_test.sample(np.array([-np.inf, 2.0])).tolist() == [-1e30, 2]
