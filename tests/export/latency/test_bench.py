"""Figures of a bench are those of its samples; a failed worker is an error, and none outlives the bench."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from questpress.export import runtime
from questpress.export.errors import ExportError
from questpress.export.latency import runner
from questpress.export.latency.machine import environment
from questpress.export.latency.runner import MIN_ROUNDS, Subject, Worker, bench

from tests.support.networks import color_classifier


def subject(folder: Path, name: str, size: int, n: int = 8) -> Subject:
    path = color_classifier(folder / f"{name}.onnx", {}, size)
    inputs = np.random.default_rng(0).standard_normal((n, 3, size, size), dtype=np.float32)
    return Subject(name, path, inputs)


def test_bench_times_every_subject_at_every_thread_count(tmp_path: Path) -> None:
    fractions: list[float] = []
    subjects = [subject(tmp_path, "small", 8), subject(tmp_path, "large", 512, n=2)]
    result = bench(
        subjects, threads=[1, 2, 1], seconds=0.3, seed=1, progress=lambda part, _: fractions.append(part)
    )
    assert [(x.subject, x.threads) for x in result.latencies] == [
        (name, count) for count in (1, 2) for name in ("small", "large")
    ]
    for latency, samples in zip(result.latencies, result.samples, strict=True):
        assert latency.n == len(samples.ms)
        assert samples.ms.sum() >= 300
        assert len(samples.blocks) >= MIN_ROUNDS
        assert latency.p50 == pytest.approx(np.median(samples.ms))
    assert result.latency("small", 1).p50 < result.latency("large", 1).p50
    speedup = result.speedup("small", "large", 1)
    assert speedup.ratio > 1 and speedup.low <= speedup.ratio <= speedup.high and speedup.verdict == "faster"
    assert fractions == sorted(fractions) and fractions[0] >= 0 and fractions[-1] == 1.0
    np.savez(tmp_path / "raw.npz", **result.to_arrays())
    with np.load(tmp_path / "raw.npz") as kept:
        np.testing.assert_array_equal(kept["large/2/ms"], result.samples[3].ms)
    with pytest.raises(KeyError):
        result.latency("small", 3)


def test_idle_workers_cost_no_time(tmp_path: Path) -> None:
    if not hasattr(os, "times") or not Path("/proc/self/stat").exists():
        pytest.skip("the processor time of another process is read from /proc")
    s = subject(tmp_path, "large", 256)
    np.save(tmp_path / "inputs.npy", s.inputs)
    with Worker("large", s.path, tmp_path / "inputs.npy", 2) as worker:
        worker.time_block(0.1)
        stat = Path(f"/proc/{worker._process.pid}/stat")

        def ticks() -> int:
            fields = stat.read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        time.sleep(0.1)
        before = ticks()
        time.sleep(0.5)
        assert ticks() - before <= 0.1 * os.sysconf("SC_CLK_TCK")


def test_worker_imports_no_torch() -> None:
    code = (
        "import sys, questpress.export.latency.worker, questpress.export.runtime\n"
        "print([m for m in ('torch', 'onnx', 'timm', 'scipy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bench_runs_from_python_c_in_a_folder_with_misleading_names(tmp_path: Path) -> None:
    s = subject(tmp_path, "a", 8)
    for trap in ("numpy.py", "json.py", "onnxruntime.py"):
        (tmp_path / trap).write_text("raise SystemExit('the wrong module')")
    code = f"""
import sys
sys.path = [entry for entry in sys.path if entry]
import numpy
from questpress.export.latency.runner import Subject, bench
inputs = numpy.zeros((2, 3, 8, 8), numpy.float32)
print(bench([Subject("a", {str(s.path)!r}, inputs)], threads=[1], seconds=0.05).latencies[0].n > 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_invalid_model_error_names_the_reason(tmp_path: Path) -> None:
    inputs = np.zeros((1, 3, 8, 8), np.float32)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match=r"text cannot be timed: .*cannot load"):
        bench([Subject("text", tmp_path / "text.onnx", inputs)], threads=[1], seconds=0.05)
    path = color_classifier(tmp_path / "a.onnx", {}, 8)
    with pytest.raises(ExportError, match=r"a cannot be timed: .*invalid dimensions"):
        bench([Subject("a", path, np.zeros((1, 3, 9, 9), np.float32))], threads=[1], seconds=0.05)


def test_worker_that_is_killed_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    s = subject(tmp_path, "a", 8)
    np.save(tmp_path / "inputs.npy", s.inputs)
    with Worker("a", s.path, tmp_path / "inputs.npy", 1) as worker:
        worker._process.kill()
        with pytest.raises(ExportError, match="a cannot be timed: its process ended with"):
            worker.time_block(0.05)
    assert worker._process.poll() is not None


def test_worker_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = subject(tmp_path, "a", 8)
    np.save(tmp_path / "inputs.npy", s.inputs)
    with Worker("a", s.path, tmp_path / "inputs.npy", 1) as worker:
        monkeypatch.setattr(runner, "_BLOCK_TIMEOUT", -29.5)
        with pytest.raises(ExportError, match="no reply within 0 s"):
            worker.time_block(30)
    assert worker._process.poll() is not None


def test_workers_end_with_the_bench_even_when_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Worker] = []
    original = Worker.__init__

    def start(self: Worker, *given: object) -> None:
        started.append(self)
        original(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "__init__", start)

    def interrupt(*_: object) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "time_block", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench([subject(tmp_path, "a", 8), subject(tmp_path, "b", 8)], threads=[1], seconds=0.1)
    assert len(started) == 3 and all(worker._process.poll() is not None for worker in started)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threads": []}, "threads"),
        ({"threads": [0]}, "threads"),
        ({"seconds": 0.0}, "must be positive"),
        ({"processes": 0}, "processes"),
        ({"names": ("a", "a")}, "distinct names"),
        ({"names": ()}, "distinct names"),
        ({"n": 0}, r"inputs \[n, 3, H, W\]"),
    ],
)
def test_empty_bench_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    names = change.pop("names", ("a", "b"))
    n = change.pop("n", 2)
    subjects = [subject(tmp_path, name, 8, n) for name in names]
    with pytest.raises(ExportError, match=reason):
        bench(subjects, **{"threads": [1], "seconds": 0.05, **change})


def test_environment_names_the_processor_and_no_host() -> None:
    here = environment()
    assert here.cpu and here.cores == runtime.allowed_cores()
    assert here.onnxruntime == ort.__version__
    import socket

    assert socket.gethostname() not in json.dumps(here.__dict__)


SLEEPER = """
import sys
import time
from questpress.export.latency.worker import serve

def load(model, threads, shape):
    assert model.endswith("a.onnx") and shape == (1, 3, 8, 8)
    return lambda image: time.sleep(float(sys.argv[1]) * threads)

serve(load)
"""


def test_script_times_another_runtime_in_the_same_rounds(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    plain = subject(tmp_path, "a", 8)
    asleep = replace(plain, name="asleep", command=(str(tmp_path / "sleeper.py"), "0.02"))
    result = bench([plain, asleep], threads=[1, 2], seconds=0.1)
    assert 20 <= min(result.samples[1].ms) < 40 <= min(result.samples[3].ms)
    assert result.speedup("a", "asleep", 2).verdict == "faster"
