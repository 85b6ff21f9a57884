"""A dry run reports the same errors as the start of the job and writes nothing."""

import os

from questpress.pipeline.runs import files as written
from questpress.pipeline.runs.files import lock

from tests.support.little import files, job, refused


def refused_alike(code, *words, data, out, cache, more=()):
    """The job and its dry run end with the same sentence."""
    dry = refused(job(data, out, cache, *more, "--dry-run"), code, *words)
    assert refused(job(data, out, cache, *more), code, *words) == dry


def test_other_options_in_the_same_folder_are_refused(a_run, data, cache):
    before = files(a_run)
    refused_alike(
        2, "other options", "epochs was 2, now 3", data=data, out=a_run, cache=cache, more=("--epochs", "3")
    )
    assert files(a_run) == before


def test_same_options_or_fresh_start_are_estimated_without_changes(a_run, data, cache):
    before = files(a_run)
    fresh = ("--epochs", "3", "--fresh", "--qat", "--qat-epochs", "1")
    both = ["teacher", "student"]
    for more, trained in (((), []), (fresh, [*both, "1"]), ((*fresh, "--until", "teacher"), both[:1])):
        result = job(data, a_run, cache, *more, "--dry-run")
        assert result.exit_code == 0 and "GB of disk" in result.stderr, result.output
        assert [line.split()[0] for line in result.stderr.splitlines()[1:-1]] == trained
    assert job(data, a_run, cache, "--max-drop", "3", "--dry-run").exit_code == 0
    assert files(a_run) == before


def test_folder_that_another_works_on_is_refused(tmp_path, data, cache):
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        refused_alike(1, "another process", data=data, out=tmp_path / "run", cache=cache)


def test_damaged_record_is_refused(tmp_path, data, cache):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    refused_alike(2, "run.json", "--fresh", data=data, out=tmp_path / "run", cache=cache)


def test_folder_that_cannot_be_created_is_refused(tmp_path, data, cache):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for out in (tmp_path / "file" / "run", tmp_path / "nowhere", tmp_path / "nowhere" / "run"):
        refused_alike(2, "cannot be written", data=data, out=out, cache=cache)
    assert (tmp_path / "file").read_text() == "precious" and not (tmp_path / "gone").exists()


def test_folder_without_permission_is_refused(tmp_path, data, cache, monkeypatch):
    # Root, as whom tests may run, has every permission.
    calls = []
    monkeypatch.setattr(written.os, "access", lambda path, mode: calls.append((path, mode)))
    refused(
        job(data, tmp_path / "new" / "run", cache, "--dry-run"), 2, "cannot be written: Permission denied"
    )
    assert (tmp_path, os.W_OK | os.X_OK) in calls and not (tmp_path / "new").exists()
