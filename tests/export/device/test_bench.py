"""`predict.py --bench`: intervals, flags, and what its file contains."""

import getpass
import json
import platform
import time
from pathlib import Path

import numpy as np
import pytest
from questpress.export import predict_cli
from questpress.export.device import bench
from questpress.export.device.bench import Timing
from questpress.export.runtime import processor

from tests.export.device.test_self_test import write_artifact


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_intervals_cover_the_median_of_correlated_blocks(spread: float) -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        blocks = [10 + rng.normal(0, spread) + rng.normal(0, 0.1, 30) for _ in range(25)]
        p50 = bench.compute_intervals(blocks)["p50"]
        assert p50["value"] == np.median(np.concatenate(blocks))
        covered += p50["low"] <= 10 <= p50["high"]
    assert 277 <= covered <= 299  # 285 at 95 %, standard deviation 3.8; independent samples would cover half


def test_percentiles_of_too_few_samples_are_left_out() -> None:
    assert list(bench.compute_intervals([np.ones(32), np.ones(31)])) == ["p50"]
    assert bench.compute_intervals([np.ones(64)]) == {
        name: {"value": 1.0, "low": 1.0, "high": 1.0} for name in ("p50", "p90")
    }
    assert bench.compute_intervals([np.ones(10)]) == {}


def test_times_are_those_of_the_calls_in_turn() -> None:
    seen: list[float] = []

    def call(seconds: float) -> None:
        seen.append(seconds)
        time.sleep(seconds)

    timing = Timing(call, [0.002, 0.004])
    bench.time_together([timing], 0.05)
    measured = np.concatenate(timing.blocks)
    assert timing.count == len(measured) >= 11 and timing.seconds >= 0.05
    assert (measured >= 1000 * np.array(seen[-len(measured) :])).all()
    assert seen[-len(measured) :][:2] in ([0.002, 0.004], [0.004, 0.002])


def test_waiting_and_drift_are_flagged() -> None:
    waiting = Timing(time.sleep, [0.001])
    bench.time_together([waiting], 0.02)
    [flag] = [flag for flag in bench._find_flags("net", 1, waiting) if flag["name"] == "neighbor"]
    assert "of the time, as other processes used the cores: compare processor ms" in flag["sentence"]
    assert not [flag for flag in bench._find_flags("net", 2, waiting) if flag["name"] == "neighbor"]
    rng = np.random.default_rng(0)
    times = [np.full(5, 10 * (1.2 if block >= 20 else 1) + rng.normal(0, 0.05)) for block in range(30)]
    slower = Timing(len, [""], times, processor_seconds=sum(map(np.sum, times)) / 1000)
    [flag] = bench._find_flags("net", 1, slower)
    assert flag["name"] == "drift" and flag["sentence"].startswith("net became 20% slower")


def test_bench_times_the_files_of_this_processor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = write_artifact(tmp_path), tmp_path / "results"
    arguments = [
        "--bench",
        "--seconds",
        "0.05",
        "--threads",
        "1",
        "--artifact",
        str(folder),
        "--out",
        str(out),
    ]
    monkeypatch.setattr(bench, "PHOTOS", 2)
    assert predict_cli.main(arguments) == 0
    [path] = out.iterdir()
    text, shown = path.read_text("utf-8"), capsys.readouterr().out
    assert path.name == processor.bench_file_name(processor.processor_name())
    assert f"Written to {path}" in shown
    results = json.loads(text)["results"]
    assert [result["name"] for result in results] == ["student.int8.onnx", "student.onnx"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert results[0]["sha256"] == manifest["files"][0]["sha256"]
    for result in results:
        p50, end_to_end = result["latency_ms"]["p50"], result["end_to_end_ms"]["p50"]
        assert 0 < p50["low"] <= p50["value"] <= p50["high"] < end_to_end["value"]
        assert result["processor_ms"] > 0 and result["load_ms"] > p50["value"]
        assert f"{p50['value']:.3g} ({p50['low']:.3g} to {p50['high']:.3g})" in shown
    assert predict_cli.main([*arguments[:-1], str(path)]) == 1
    assert "File exists. Choose another --out" in capsys.readouterr().err
    assert platform.node() not in text and f'"{getpass.getuser()}"' not in text


def test_board_is_named_if_the_processor_is_not(tmp_path: Path) -> None:
    (tmp_path / "device-tree").mkdir()
    (tmp_path / "device-tree" / "model").write_bytes(b"Raspberry Pi 4 Model B Rev 1.4\0")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU part\t: 0xd08\n\nHardware\t: BCM2835\n")
    assert processor.processor_name(tmp_path) == "Raspberry Pi 4 Model B Rev 1.4"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD Ryzen 7\n")
    assert processor.processor_name(tmp_path) == "AMD Ryzen 7"
    name = "Intel(R) Core(TM) i7-8700 @ 3.20GHz"
    assert processor.bench_file_name(name) == "bench.intel-core-i7-8700-3-20ghz.json"
    assert processor.bench_file_name("…") == "bench.device.json"
