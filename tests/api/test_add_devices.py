"""`compress bench RUN --add`, `--device`: benches of devices in the report and the model card."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from questpress.pipeline.runs.results import Report

from tests.support.little import compress


@pytest.fixture(scope="module")
def measured(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of bench.DEVICE.json of the finished run's artifact."""
    out = tmp_path_factory.mktemp("device")
    predict = [sys.executable, str(finished / "artifact/predict.py"), "--bench", "--seconds", "0.02"]
    subprocess.run([*predict, "--threads", "1", "--out", str(out)], check=True, capture_output=True)
    [path] = out.iterdir()
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def write(folder: Path, content: dict[str, Any], processor: str) -> Path:
    path = folder / "some name.json"
    changed = content | {"device": content["device"] | {"processor": processor}}
    path.write_text(json.dumps(changed), encoding="utf-8")
    return path


def test_report_and_card_show_a_table_of_devices(
    a_run: Path, measured: dict[str, Any], tmp_path: Path
) -> None:
    done = compress("bench", a_run, "--add", write(tmp_path, measured, "Raspberry Pi <b>5"))
    assert done.exit_code == 0 and "Raspberry Pi" in done.stdout, done.stderr
    assert (a_run / "bench" / "bench.raspberry-pi-b-5.json").is_file()
    measured["results"][0]["latency_ms"]["p50"] = {"value": 123.4, "low": 119.0, "high": 131.0}
    flag = {
        "name": "neighbor",
        "file": "student.onnx",
        "threads": 1,
        "sentence": "student.onnx waited 9% of it.",
    }
    measured["flags"] = [flag]
    for name in ("Jetson", "Raspberry Pi <b>5"):  # the second replaces a device's earlier bench
        assert compress("bench", a_run, "--add", write(tmp_path, measured, name)).exit_code == 0
    report = Report.model_validate_json((a_run / "report.json").read_text("utf-8"))
    assert [bench.device.processor for bench in report.devices] == ["Jetson", "Raspberry Pi <b>5"]
    assert report.devices[1].results[0].latency_ms["p50"].value == 123.4
    card = (a_run / "artifact" / "README.md").read_text("utf-8")
    for text in ((a_run / "report.md").read_text("utf-8"), card):
        rows = [line for line in text.splitlines() if line.startswith("| Jetson | int8 | 1 |")]
        assert [row.split("|")[4].strip() for row in rows] == ["123 (119–131)"]
        [waited] = [line for line in text.splitlines() if line.startswith("| Jetson | fp32 | 1 |")]
        assert [cell.strip() for cell in waited.split("|")[4:6]] == ["–", "–"]
        assert flag["sentence"] in text
    page = (a_run / "report.html").read_text("utf-8")
    assert "Raspberry Pi &lt;b&gt;5" in page and "Raspberry Pi <b>" not in page


def test_results_of_files_that_were_exported_again_are_left_out(
    a_run: Path, measured: dict[str, Any], tmp_path: Path
) -> None:
    old = json.loads(json.dumps(measured))
    old["results"][0]["sha256"] = "0" * 64
    assert compress("bench", a_run, "--add", write(tmp_path, old, "Pi")).exit_code == 0
    [bench] = Report.model_validate_json((a_run / "report.json").read_text("utf-8")).devices
    assert [result.name for result in bench.results] == [r["name"] for r in measured["results"][1:]]
    old["results"] = old["results"][:1]
    done = compress("bench", a_run, "--add", write(tmp_path, old, "Pi"))
    assert done.exit_code == 2 and "timed other model files than those of" in done.stderr


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"bench_version": 2}, [], "is not a result of this version of predict.py --bench"),
        ({"results": [{}]}, [], "is not a result of this version"),
        ({"host": "pi"}, [], "is not a result of this version"),
        ({}, ["--seconds", "3"], "--add and --seconds cannot be used together"),
        ({}, ["--add", "nowhere.json"], "--add nowhere.json: No such file or directory"),
        ({}, ["other"], "--add requires one run folder, got 2 paths"),
    ],
)
def test_invalid_benches_of_devices_are_refused(
    finished: Path,
    measured: dict[str, Any],
    tmp_path: Path,
    change: dict[str, Any],
    options: list[str],
    message: str,
) -> None:
    before = (finished / "report.json").read_bytes()
    done = compress("bench", finished, "--add", write(tmp_path, measured | change, "Pi"), *options)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split())
    assert (finished / "report.json").read_bytes() == before


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program ssh that runs the command here and writes its destination to a file."""
    programs, log = tmp_path / "programs", tmp_path / "destination"
    programs.mkdir()
    (programs / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "ssh").write_text(f'#!/bin/sh\necho "$1" > {log}\ncd /\nexec sh -c "$2"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return log


def test_bench_over_ssh_is_added_to_the_report(a_run: Path, ssh: Path, tmp_path: Path) -> None:
    done = compress("bench", a_run, "--device", "ssh:pi@board.local", "--seconds", "0.02")
    assert done.exit_code == 0, done.stderr
    assert ssh.read_text() == "pi@board.local\n"
    [bench] = Report.model_validate_json((a_run / "report.json").read_text("utf-8")).devices
    assert bench.seconds == 0.02 and len(bench.results) >= 2
    assert list((tmp_path / "temporary").iterdir()) == []


def test_failing_bench_over_ssh_is_one_sentence(a_run: Path, ssh: Path) -> None:
    (ssh.parent / "programs" / "python3").write_text("#!/bin/sh\necho 'Error: no space' >&2\nexit 3\n")
    done = compress("bench", a_run, "--device", "ssh://pi@board:2222")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "--device ssh://pi@board:2222 failed: no space." in " ".join(done.stderr.split())
    assert ssh.read_text() == "ssh://pi@board:2222\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "pi@board"], "--device must have the form ssh:USER@HOST, got 'pi@board'"),
        (["--device", "ssh:-oProxyCommand=x"], "--device must have the form"),
        (["--device", "ssh:a;b"], "--device must have the form"),
        (["--device", "ssh:pi", "--quick"], "--device and --quick cannot be used together"),
        (["--device", "ssh:pi", "--seconds", "0"], "--seconds must be greater than 0 and finite, got 0"),
        (["--setup"], "--setup requires --device"),
    ],
)
def test_invalid_devices_are_refused(finished: Path, ssh: Path, options: list[str], message: str) -> None:
    done = compress("bench", finished, *options)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split())
    assert not ssh.exists()
