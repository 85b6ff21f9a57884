"""A teacher beyond protobuf's 2 GB is timed with external weights."""

from pathlib import Path

import pytest

from tests.support import little


def test_large_teacher_is_timed_with_external_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The teacher has 0.7 MB, the student 0.3.
    monkeypatch.setattr("questpress.export.conversion.onnx_export.MAX_EMBEDDED_BYTES", 500_000)
    out, cache = tmp_path / "run", tmp_path / "cache"
    little.check_success(little.job(data, out, cache))
    report = little.report(out)
    graph, weights = out / "bench/teacher.onnx", out / "bench/teacher.onnx.data"
    assert report["teacher"]["latency_ms"]["1"]["n"] > 0
    assert report["teacher"]["bytes"] == graph.stat().st_size + weights.stat().st_size
    assert weights.stat().st_size > 500_000 > graph.stat().st_size
    assert not (out / "artifact/student.onnx.data").exists()
    assert (out / "artifact/student.int8.onnx").exists()
    weights.unlink()
    again = little.job(data, out, cache)
    assert again.exit_code == 0 and weights.exists()
