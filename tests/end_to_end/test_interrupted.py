"""Runs that are killed, interrupted or out of disk can be resumed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from questpress.pipeline import stages
from questpress.pipeline.config.options import STAGES
from questpress.pipeline.runs.files import write_text

from tests.support import little
from tests.support.little import files, job, record, report, weights


def start_process(arguments: list[str], tmp_path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=little.one_core if sys.platform != "win32" else None, cwd=tmp_path,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")
def test_terminated_command_exits_with_130_and_can_resume(data, cache, tmp_path):
    more = ("--epochs", "500", "--until", "student")
    process = start_process(little.little_command(data, tmp_path / "run", cache, *more), tmp_path)
    little.wait_for((tmp_path / "run" / "checkpoint" / "student.pt").exists, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr and "to resume" in stderr.splitlines()[-1] and stdout == ""


@pytest.mark.parametrize("stage", ["prepare", "student", "quantize", "bench"])
def test_ctrl_c_in_a_stage_leaves_a_resumable_run(finished, data, cache, tmp_path, monkeypatch, stage):
    out = tmp_path / "run"
    if stage in ("quantize", "bench"):
        up_to(finished, out, stage)

    original = stages.load_stage

    def interrupting(name: str):
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        return interrupted if name == stage else original(name)

    monkeypatch.setattr(stages, "load_stage", interrupting)
    stopped = job(data, out, cache)
    assert stopped.exit_code == 130
    assert "Run the same command again to resume" in stopped.stderr and "Traceback" not in stopped.stderr
    before = list(record(out)["stages"])
    assert before == list(STAGES[: STAGES.index(stage)])
    monkeypatch.setattr(stages, "load_stage", original)
    resumed = job(data, out, cache, "--until", stage if stage in STAGES[4:] else "export")
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stderr.count("(kept)") == len(before)
    assert stage in record(out)["stages"]
    assert weights(out / "student.safetensors") == weights(finished / "student.safetensors")
    assert [e["losses"] for e in report(out)["epochs"]] == [e["losses"] for e in report(finished)["epochs"]]


# A full disk.


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_file_is_written_atomically(tmp_path, monkeypatch):
    from questpress.pipeline.errors import JobError

    write_text(tmp_path / "a.txt", "before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match=r"No space left on device\. Its previous content is unchanged"):
        write_text(tmp_path / "a.txt", "after")
    assert files(tmp_path).keys() == {"a.txt"} and (tmp_path / "a.txt").read_text() == "before"


@pytest.mark.parametrize("kind", ["fsync", "checkpoint", "weights"])
def test_full_disk_while_training_loses_nothing(data, cache, tmp_path, monkeypatch, kind):
    out = tmp_path / "run"
    assert job(data, out, cache, "--until", "prepare").exit_code == 0
    before = files(out)
    if kind == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif kind == "checkpoint":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr("questpress.models.checkpoint.save_file", full)
    result = job(data, out, cache, "--until", "student")
    little.refused(result, 1, "No space left on device", "unchanged")
    after = files(out)
    rewritten = {
        "config.yaml",
        "run.json",
        ".run.json",
        "metrics.jsonl",
        *map("report.{}".format, ("html", "md", "json")),
    }
    for name in before.keys() - rewritten:
        assert after[name] == before[name], name
    assert not [name for name in after if ".part" in name]
    monkeypatch.undo()
    assert job(data, out, cache, "--until", "student").exit_code == 0


def up_to(finished: Path, out: Path, stage: str) -> None:
    """Copy a finished run without the results of a stage and those after it."""
    shutil.copytree(finished, out)
    run_record = record(out)
    for later in STAGES[STAGES.index(stage) :]:
        for name in run_record["stages"].pop(later)["outputs"]:
            (out / name).unlink()
    write_text(out / "run.json", json.dumps(run_record))
