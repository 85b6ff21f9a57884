"""Small data, small networks, and functions that run the command with them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image as PillowImage
from questpress.pipeline.cli.main import cli
from questpress.pipeline.runs.files import LOCK_FILE as LOCK
from safetensors.numpy import load_file

CLASSES = ("blue", "green", "red")
TEACHER, STUDENT = "cifar_resnet14", "cifar_resnet8"
NETWORKS = ("--teacher", TEACHER, "--teacher-weights", "none", "--student", STUDENT)
SMALL = (
    "--image-size", "16", "--batch-size", "16", "--bench-seconds", "0.1",
    "--calibration-images", "16", "--calibration", "minmax",
)  # fmt: skip
SHORT = ("--teacher-epochs", "2", "--epochs", "2")


def picture(label: int, seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    """Return a noisy image in the color of its class, uint8 [H,W,3]."""
    rng = np.random.default_rng([label, seed])
    pixels = rng.integers(0, 120, (height, width, 3))
    pixels[..., 2 - label % 3] += 120
    return pixels.astype(np.uint8)


def photos(root: Path, counts: dict[str, int] | None = None, first: int = 0) -> Path:
    """Write ``counts['train/red']`` PNG files into each folder; by default 20 into each of three classes."""
    for name, count in (counts or dict.fromkeys(CLASSES, 20)).items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        label = CLASSES.index(folder.name) if folder.name in CLASSES else len(folder.name)
        role = sum(map(ord, name)) * 1000
        for number in range(count):
            PillowImage.fromarray(picture(label, first + role + number)).save(folder / f"{number:03d}.png")
    return root


class Calls:
    """Calls a function when its pickle is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> Any:
        return self.called


def compress(*arguments: str | Path) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def job(data: Path, out: Path, cache: Path, *more: str | Path) -> Result:
    """Run a small job; ``more`` is last, so that it overrides the options before it."""
    return compress(*_job_arguments(data, out, cache), *more)


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of a new process."""
    return [sys.executable, "-m", "questpress.pipeline", *map(str, arguments)]


def little_command(data: Path, out: Path, cache: Path, *more: str | Path) -> list[str]:
    return command(*_job_arguments(data, out, cache), *more)


def _job_arguments(data: Path, out: Path, cache: Path) -> list[str]:
    folders = ["--data", str(data), "--out", str(out), "--cache", str(cache)]
    return [*NETWORKS, *SMALL, *SHORT, "--set", "quest.words=8", *folders]


def python(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def wait_for(done: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 90) -> None:
    """Wait until ``done`` returns True; fail if the process ends before."""
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def one_core() -> None:
    """Restrict this process to one core, so that it trains on one thread, and enable SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        # Each parallel test worker has its own core.
        number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def check_success(result: Result) -> Result:
    """Assert that a command succeeded and return its result."""
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(result: Result, code: int, *words: str) -> str:
    """Return the error of a failed command; assert that it is a single line with ``words``."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert not result.stdout
    return lines[0]


def record(out: Path) -> dict[str, Any]:
    """Return the record of a run without its checksum, so that a test can write it back with changes."""
    content: dict[str, Any] = json.loads((out / "run.json").read_text())
    content.pop("checksum", None)  # missing if a test wrote the record back
    return content


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


def weights(file: Path) -> dict[str, bytes]:
    """Return the bytes of each tensor of a weights file."""
    return {name: tensor.tobytes() for name, tensor in load_file(file).items()}


def files(root: Path, but: Sequence[str] = ()) -> dict[str, tuple[int, bytes]]:
    """Return the modification time and content of each file below a folder, except a run's lock."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).as_posix() not in (LOCK, *but)
    }
