"""--resident: the placement of training images changes neither weights nor report."""

import json
from pathlib import Path

import pytest
from questpress.pipeline.data import training_data

from tests.support import little


def test_workers_and_decoded_images_give_the_same_student(data: Path, finished: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    little.check_success(little.job(data, out, cache, "--resident", "workers", "--until", "student"))
    for name in ("teacher.safetensors", "prepared.safetensors", "student.safetensors"):
        assert little.weights(out / name) == little.weights(finished / name)
    ours, theirs = (json.loads((run / "report.json").read_text())["data"] for run in (out, finished))
    assert ours == theirs
    # Of the training images, nothing but their sizes was written.
    assert len(list((cache / "sizes").iterdir())) == 1
    rendered = sum(file.stat().st_size for file in cache.rglob("pixels.bin"))
    assert rendered <= 16 * 16 * 3 * (ours["val"] + ours["test"])


def test_placement_is_reported_and_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    monkeypatch.setattr(training_data, "free_disk", lambda _: 1e3)
    first = little.job(data, out, cache, "--until", "teacher")
    assert first.exit_code == 0 and "decoded by workers" in first.stderr and "free at" in first.stderr
    monkeypatch.undo()
    second = little.job(data, out, cache, "--until", "student")
    assert second.exit_code == 0 and "as when this run was started" in second.stderr
    assert little.record(out)["placement"] == "workers"
