"""SIGKILL at random moments: what is gone on with ends as if nothing had happened (benchmarks/kills.py)."""

import sys

import pytest

from ..benchmarks.test_cells import FOLDER, load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def test_runs_killed_at_random_moments_end_in_the_bits_of_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # where its processes find it
    kills = load("kills")
    outcomes = list(kills.campaign(tmp_path, 2, seed=1))
    assert [outcome.differs for outcome in outcomes] == [()] * 2
    # The comparison sees something: weights, curves of both trainings, answers of the store.
    names = kills.left_by(tmp_path / "whole")
    for kind in ("teacher.safetensors", "student.safetensors", "curve of the student, epoch 8", "answers "):
        assert any(name.startswith(kind) for name in names), kind
    assert sum(".map.ids.npy" in name.replace(" ", ".") for name in names) == 3  # of three views
    # And what is damaged.
    [entry, *_] = (tmp_path / "whole" / "cache" / "answers").glob("*/map.p.npy")
    entry.write_bytes(entry.read_bytes()[:-2] + b"\0\1")
    assert names[f"answers {entry.parent.name}"] is True
    assert kills.left_by(tmp_path / "whole")[f"answers {entry.parent.name}"] is False
