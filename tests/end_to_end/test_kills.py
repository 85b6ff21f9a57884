"""A run killed at a random moment resumes to the same results (tests/campaigns/kills.py)."""

import sys

import pytest

from tests.campaigns import kills

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def test_killed_run_resumes_to_the_same_bits(tmp_path):
    outcomes = list(kills.campaign(tmp_path, range(1), 0, ["student"]))
    assert [(outcome.differs, outcome.left) for outcome in outcomes] == [((), 0)]
    # The comparison covers weights, shipped files, curves, records and cached teacher outputs.
    names = kills.read_results(tmp_path / "whole")
    for name in (
        "teacher.safetensors", "student.safetensors", "artifact/student.int8.onnx", "artifact/manifest.json",
        "metrics.jsonl student 3", "report.json student_int8", "run.json stages",
    ):  # fmt: skip
        assert name in names
    assert sum("map.ids.npy" in name for name in names) == 2  # of two views
    # It detects damage.
    [entry, *_] = (tmp_path / "whole" / "cache" / "teacher-outputs").glob("*/map.p.npy")
    entry.write_bytes(entry.read_bytes()[:-2] + b"\0\1")
    (tmp_path / "whole" / "run" / "student.safetensors").write_bytes(b"")
    damaged = kills.read_results(tmp_path / "whole")
    differs = kills.find_differences(damaged, names)
    assert f"cache teacher-outputs {entry.parent.name}" in differs and "student.safetensors" in differs
