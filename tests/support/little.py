"""Little data, little networks, and the command with both: what the tests of the job share."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
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
    """A noisy picture in its class's colour: uint8 [H,W,3]."""
    rng = np.random.default_rng([label, seed])
    pixels = rng.integers(0, 120, (height, width, 3))
    pixels[..., 2 - label % 3] += 120
    return pixels.astype(np.uint8)


def photos(root: Path, counts: dict[str, int] | None = None, first: int = 0) -> Path:
    """``counts['train/red']`` PNG files in each folder; without counts, 20 in each of three classes."""
    for name, count in (counts or dict.fromkeys(CLASSES, 20)).items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        label = CLASSES.index(folder.name) if folder.name in CLASSES else len(folder.name)
        role = sum(map(ord, name)) * 1000
        for number in range(count):
            PillowImage.fromarray(picture(label, first + role + number)).save(folder / f"{number:03d}.png")
    return root


def compress(*arguments: str | Path) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def job(data: Path, out: Path, cache: Path, *more: str | Path) -> Result:
    """A whole little job; ``more`` comes last, and of an option given twice the last counts."""
    return compress(
        *NETWORKS, *SMALL, *SHORT, "--set", "quest.words=8", "--data", data, "--out", out, "--cache", cache,
        *more,
    )  # fmt: skip


def command(*arguments: str | Path) -> list[str]:
    """The command for a process of its own."""
    return [sys.executable, "-m", "questpress.pipeline", *map(str, arguments)]


def little_command(data: Path, out: Path, cache: Path, *more: str | Path) -> list[str]:
    return command(
        *NETWORKS, *SMALL, *SHORT, "--set", "quest.words=8", "--data", data, "--out", out, "--cache", cache,
        *more,
    )  # fmt: skip


def python(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def one_core() -> None:
    """For a process that is to train on one thread, as the tests' own does, and to be interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        # Tests run side by side, each with a core of its own.
        number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def refused(result: Result, code: int, *words: str) -> str:
    """The one sentence of a job that was refused; fails where it is anything else than that."""
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
    """What a run has noted; without its checksum, so that a test may write it back with changes."""
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    found.pop("checksum", None)  # the test may have written it back already
    return found


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def weights(file: Path) -> dict[str, bytes]:
    """Every tensor of a weights file, to the bit."""
    return {name: tensor.tobytes() for name, tensor in load_file(file).items()}


def files(root: Path, but: Sequence[str] = ()) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder but a run's lock: its time of change and its content."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).as_posix() not in (LOCK, *but)
    }
