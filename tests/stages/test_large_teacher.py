"""A teacher beyond protobuf's 2 GB is timed with external weights."""

from pathlib import Path

import pytest

from tests.support import little


def test_large_teacher_is_timed_with_external_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The teacher has 0.7 MB, the student 0.3.
    monkeypatch.setattr("questpress.export.conversion.onnx_export.MAX_EMBEDDED_BYTES", 500_000)
    little.check_success(little.job(data, tmp_path, tmp_path / "cache"))
    report = little.report(tmp_path)
    graph, weights = tmp_path / "bench/teacher.onnx", tmp_path / "bench/teacher.onnx.data"
    assert report["teacher"]["latency_ms"]["1"]["n"] > 0
    assert report["teacher"]["bytes"] == graph.stat().st_size + weights.stat().st_size
    assert weights.stat().st_size > 500_000 > graph.stat().st_size
    assert not (tmp_path / "artifact/student.onnx.data").exists()
    assert (tmp_path / "artifact/student.int8.onnx").exists()
    weights.unlink()
    again = little.job(data, tmp_path, tmp_path / "cache")
    assert again.exit_code == 0 and weights.exists()
