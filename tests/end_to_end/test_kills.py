"""A run killed at a random moment ends as if nothing had happened (tests/campaigns/kills.py)."""

import sys

import pytest

from tests.campaigns import kills

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def test_killed_run_resumes_to_the_same_bits(tmp_path):
    outcomes = list(kills.campaign(tmp_path, range(1), 0, ["student"]))
    assert [(outcome.differs, outcome.left) for outcome in outcomes] == [((), 0)]
    # The comparison sees something: weights, files that ship, curves, figures, answers of the store.
    names = kills.left_by(tmp_path / "whole")
    for name in (
        "teacher.safetensors", "student.safetensors", "artifact/student.int8.onnx", "artifact/manifest.json",
        "metrics.jsonl student 3", "report.json student_int8", "run.json stages",
    ):  # fmt: skip
        assert name in names
    assert sum("map.ids.npy" in name for name in names) == 2  # of two views
    # And what is damaged.
    [entry, *_] = (tmp_path / "whole" / "cache" / "teacher-outputs").glob("*/map.p.npy")
    entry.write_bytes(entry.read_bytes()[:-2] + b"\0\1")
    (tmp_path / "whole" / "run" / "student.safetensors").write_bytes(b"")
    found = kills.left_by(tmp_path / "whole")
    differs = kills.differences(found, names)
    assert f"cache teacher-outputs {entry.parent.name}" in differs and "student.safetensors" in differs
