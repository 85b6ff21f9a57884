"""Flipped bytes in a run folder: files are regenerated, or the damage is reported."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from questpress.export.errors import ExportError
from questpress.pipeline.errors import JobError
from questpress.pipeline.methods.quest.vocabulary import FeatureMatrix
from questpress.pipeline.runs import files
from questpress.pipeline.runs.files import atomic_write
from questpress.pipeline.runs.folder import RunFolder, read_config
from questpress.pipeline.runs.results import Epoch

from tests.support import little
from tests.support.little import compress, job, record, refused, report

NESTED = "[" * 100_000


def flip(file: Path, at: bytes | None = None) -> None:
    """Change one bit, in the middle or in the last byte of ``at``."""
    content = bytearray(file.read_bytes())
    place = len(content) // 2 if at is None else content.index(at) + len(at) - 1
    content[place] ^= 1
    file.write_bytes(content)


# The record of a run.


def test_damaged_record_is_restored_from_its_copy(a_run, data, cache, caplog):
    before = (a_run / "run.json").read_bytes()
    flip(a_run / "run.json", b'"train": 4')  # of 58 images, and still JSON
    done = compress("report", a_run, "--json")
    assert done.exit_code == 0 and "Its backup .run.json is used" in caplog.text
    score = json.loads(before)["stages"]["teacher"]["facts"]["teacher"]["score"]
    assert json.loads(done.stdout)["teacher"]["score"]["correct"] == score["correct"]
    assert job(data, a_run, cache).exit_code == 0
    assert record(a_run)["stages"] == json.loads(before)["stages"]


@pytest.mark.parametrize("content", ["", "{", NESTED, '{"schema_version": 1, "stages": {}, "checksum": "0"}'])
def test_record_damaged_twice_is_refused(a_run, content):
    for name in ("run.json", ".run.json"):
        (a_run / name).write_text(content)
    before = little.files(a_run)
    for command in (("report", a_run), ("validate", a_run), ("export", a_run)):
        refused(compress(*command), 2, "run.json cannot be read")
    assert little.files(a_run) == before


def test_run_whose_record_is_lost_can_be_started_over(a_run, data, cache):
    for name in ("run.json", ".run.json"):
        (a_run / name).write_text("{")
    refused(job(data, a_run, cache), 2, "--fresh")
    assert job(data, a_run, cache, "--fresh", "--until", "teacher").exit_code == 0
    assert list(record(a_run)["stages"]) == ["teacher"]


@pytest.mark.parametrize("option", ["calibration_images: 16", "batch_size: 16", "seed: 0"])
def test_edited_config_is_refused(a_run, option):
    flip(a_run / "config.yaml", option.encode())
    refused(compress("export", a_run), 2, "config.yaml", "Run the original command again")
    assert compress("report", a_run).exit_code == 0  # has them from the record


def test_folders_of_images_may_be_edited_in_the_config(a_run, tmp_path):
    moved = {name: str(tmp_path / name) for name in ("data", "data_dir", "unlabeled")}
    (a_run / "config.yaml").write_text(yaml.safe_dump(read_config(a_run) | moved))
    assert read_config(a_run).items() >= moved.items()


# Curves.


def test_damaged_curves_are_reported(a_run, data, cache, caplog):
    assert job(data, a_run, cache).exit_code == 0 and "metrics.jsonl" not in caplog.text
    flip(a_run / "metrics.jsonl", b'"loss":1')
    assert compress("report", a_run).exit_code == 0
    assert job(data, a_run, cache).exit_code == 0
    assert "metrics.jsonl is damaged: the curves of teacher in the report may be wrong" in caplog.text


def test_logged_epoch_replaces_later_ones_of_its_training(tmp_path, finished):
    run = RunFolder(tmp_path / "run")
    run.open(fresh=False)
    run.begin({}, {}, "compress")
    epochs = [Epoch.model_validate(epoch) for epoch in report(finished)["epochs"]]
    for epoch in epochs:
        run.log_epoch(epoch)
    run.log_epoch(epochs[-2])
    assert run.curves() == [epoch.model_dump_json() for epoch in epochs[:-1]]


# Files that stages and commands leave.


def test_damaged_report_is_rendered_again(a_run, data, cache):
    assert job(data, a_run, cache).exit_code == 0  # names this folder
    before = little.files(a_run)
    for name in ("report.json", "artifact/README.md"):
        flip(a_run / name)
    assert job(data, a_run, cache).exit_code == 0
    after = little.files(a_run)
    for name in ("report.json", "artifact/README.md"):
        assert after[name][1] == before[name][1]
    assert after["report.html"] == before["report.html"]


def test_damaged_report_is_not_compared(a_run, tmp_path):
    flip(a_run / "report.json", b'"train": 4')
    result = compress("compare", a_run, a_run, "--out", tmp_path / "out")
    refused(result, 2, "report.json", "checksum does not match")


def test_damaged_predictions_and_teachers_are_refused(a_run, finished, tmp_path):
    flip(a_run / "test_predictions.safetensors")
    result = compress("compare", a_run, finished, "--out", tmp_path / "out")
    refused(result, 1, "test_predictions", "Run the original command again")
    flip(a_run / "bench" / "teacher.onnx")
    result = compress("validate", a_run, "--out", tmp_path / "out")
    refused(result, 1, "teacher.onnx", "was modified after the run wrote it")


def test_damaged_bench_is_reported(a_run):
    (a_run / "bench" / "bench.json").write_text('{"checksum": "0"}')
    refused(compress("report", a_run), 1, "bench.json is damaged", "compress bench")


def test_deeply_nested_manifest_is_refused(a_run, data):
    (a_run / "artifact" / "manifest.json").write_text(NESTED)
    refused(compress("predict", a_run, data / "red" / "000.png"), 2, "manifest.json cannot be read")


# What the system refuses.


def test_file_system_without_locks_is_reported(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def set_flock_error(number: int):
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    set_flock_error(errno.ENOLCK)
    with files.lock(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
    set_flock_error(errno.EACCES)  # returned by some file systems if the lock is taken
    with pytest.raises(JobError, match="another process"), files.lock(tmp_path):
        pass


def test_io_error_is_reported(a_run, monkeypatch):
    def dying(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "run.json")

    monkeypatch.setattr("questpress.pipeline.runs.record.read_json", dying)
    refused(compress("report", a_run), 1, "run.json: Input/output error")  # not damage


def test_uncreatable_folder_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(JobError, match="Could not write"),
        atomic_write(tmp_path / "file" / "deeper" / "a.txt"),
    ):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_streamed_features_on_a_full_disk_are_an_error_and_not_the_end_of_the_process(tmp_path):
    import torch

    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a little disk")
    try:
        held = FeatureMatrix(64, 1024, tmp_path / "features.f16")  # 128 kB, once they are written
        with pytest.raises(OSError, match="No space left"):
            held.fill([torch.rand(64, 1024, 1, 1)], (1, 1), 64)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_export_that_fails_leaves_the_artifact_that_there_was(a_run, monkeypatch):
    def fails(*_, **__):
        raise ExportError("it does not compute what the network does")

    before = {name: content for name, (_, content) in little.files(a_run / "artifact").items()}
    monkeypatch.setattr("questpress.pipeline.stages.export.check_parity", fails)
    refused(compress("export", a_run, "--opset", "19"), 1, "does not compute")
    assert {name: content for name, (_, content) in little.files(a_run / "artifact").items()} == before


def test_missing_input_is_not_a_write_error(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, atomic_write(tmp_path / "out.bin") as part:
        part.write_bytes((tmp_path.parent / "elsewhere" / "in.bin").read_bytes())
    assert "in.bin" in str(raised.value) and list(tmp_path.iterdir()) == []
    with pytest.raises(JobError, match="Could not write"), atomic_write(tmp_path / "out.bin") as part:
        (part / "no such folder").write_bytes(b"")
