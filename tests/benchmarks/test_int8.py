"""The int8 comparison: arithmetic of the ratios, cells that are not repeated, and missing peers."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from questpress.export.latency.runner import BenchResult, environment
from questpress.export.latency.statistics import Samples

from benchmarks.int8 import compare as int8
from benchmarks.int8 import files as int8_files

SMALL = (
    "--models", "cifar_resnet8", "--size", "16", "--images", "16", "--threads", "1", "--seconds", "0.05",
)  # fmt: skip


def command(out: Path, *more: str) -> dict[str, Any]:
    int8.main([*SMALL, "--out", str(out), *more])
    written: dict[str, Any] = json.loads((out / "results.json").read_text())
    return written


def cell(milliseconds: dict[str, list[float]], *, error: str | None = None) -> dict[str, Any]:
    """Return a row as the benchmark writes it, from each subject's medians of rounds."""
    latencies = tuple(
        Samples(kind, 2, [np.full(11, median) for median in medians])
        for kind, medians in milliseconds.items()
    )
    files = {
        kind: int8_files.File(Path(f"/somewhere/{kind}.onnx"), (32 * kind[:1],), 2_000_000, 30.0)
        for kind in milliseconds
    }
    if error is not None:
        files["nncf"] = int8_files.File(Path("/somewhere/nncf.onnx"), error=error)
    figures = int8.figures(BenchResult(latencies, environment(), 0), files, 2)
    made_with = {
        "versions": {"onnxruntime": "1.31"},
        "images": {"data": "digits", "calibration": 16, "size": 224},
        "seconds": 5.0,
    }
    return {"model": "resnet18", "threads": 2, "made_with": made_with, **figures}


def test_ratios_are_of_the_same_rounds_and_spoken_with_their_interval() -> None:
    row = cell({"fp32": [8, 9, 12], "ours": [2, 3, 3], "onnxruntime": [2, 3, 3], "openvino": [1, 1, 1.5]})
    assert row["ours_against"]["fp32"]["ratio"] == pytest.approx(3)  # of the medians 9 and 3
    line = int8.ratios([row], ["fp32", "ours", "onnxruntime", "nncf", "openvino"]).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["resnet18", "2"] and cells[4] == "–"
    matches = [re.fullmatch(r"([\d.]+) \(([\d.]+) to ([\d.]+)\), (.+)", cells[i]) for i in (2, 3, 5)]
    ratios = [(float(match[1]), float(match[2]), float(match[3]), match[4]) for match in matches if match]
    assert [(ratio, verdict) for ratio, _, _, verdict in ratios] == [
        (3.0, "faster"), (1.0, "no difference"), (0.33, "slower"),
    ]  # fmt: skip
    # At least as wide as the rounds lie apart, and as processes of one file do.
    assert ratios[0][1] <= 3.0 and ratios[1][1:3] == (0.98, 1.02) and ratios[2][1] <= 0.33
    assert int8.latencies([row], ["fp32", "ours", "nncf"]).splitlines()[-1] == (
        "| resnet18 | 2 | 9 | 3 | – |"
    )
    assert "/somewhere" not in json.dumps(row)


def test_signal_to_noise_is_of_the_logits_variance() -> None:
    expected = np.array([[1.0, -1.0], [1.0, -1.0]])
    assert int8_files.signal_to_noise(expected, expected + 0.1) == pytest.approx(20)
    assert int8_files.signal_to_noise(expected, expected) == float("inf")


def test_finished_cells_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = command(out, "--peers", "onnxruntime")
    (row,) = first["cells"]
    assert set(row["latencies"]) == {"fp32", "ours", "onnxruntime"} and row["latencies"]["ours"]["mean"] > 0
    assert row["files"]["ours"]["logits_db"] > 10 and row["files"]["fp32"]["logits_db"] is None
    made = {path: path.stat().st_mtime_ns for path in out.glob("cifar_resnet8/*.onnx")}
    assert len(made) == 3 and "| cifar_resnet8 | 1 |" in (out / "results.md").read_text()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("timed again")

    with monkeypatch.context() as patched:
        patched.setattr(int8, "bench", again)
        assert command(out, "--peers", "onnxruntime") == first
        with pytest.raises(AssertionError, match="timed again"):
            command(out, "--peers", "onnxruntime", "--seconds", "0.06")
    ours = out / "cifar_resnet8" / "ours.onnx"
    whole = ours.read_bytes()
    ours.write_bytes(whole[:-1])
    fewer = command(out, "--peers", "none")
    assert ours.read_bytes() == whole and set(fewer["cells"][0]["latencies"]) == {"fp32", "ours"}
    untouched = [path for path, at in made.items() if path.stat().st_mtime_ns == at]
    assert sorted(path.name for path in untouched) == ["fp32.onnx", "onnxruntime.onnx"]
