"""Growth of a job's processor time, memory and written bytes with images, QuEST's words and classes.

    python -m benchmarks.growth --out growth.json

Each series runs a job from data to ``compress compare`` while one size grows and the others stay: made-up
images of 16 pixels, small networks, one epoch, one thread. It is repeated in new processes, each of which
first runs a tiny job, so that imports and first uses are not counted.

- time: of the processor, user and system, in the stage and its child processes
- memory: highest resident memory of the process beyond that after the tiny job
- written: bytes of files that the stage changed, as the kernel counts them (0 on tmpfs)

An exponent is the slope of the least-squares line through the logarithms of all repetitions: 1 is
proportional growth, less means that a part is fixed. Its 95 % interval follows from the residuals. Costs
below 0.2 s, 20 MB and 2 MB written at the largest size have none.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import linregress, t

from benchmarks.cells import markdown

SIDE = 16
"""Of the images, in pixels."""

OPTIONS = (
    "--teacher cifar_resnet8 --teacher-weights none --student cifar_resnet8 --image-size 16 --batch-size 64 "
    "--teacher-epochs 1 --epochs 1 --calibration minmax --calibration-images 64 --max-drop 100 "
    "--val-fraction 0 --bench-seconds 0.02 --threads 1 --quiet"
)


@dataclass(frozen=True)
class Size:
    """Numbers of training images, of QuEST's words and of classes."""

    images: int = 500
    words: int = 256
    classes: int = 10


TINY = Size(64, 8, 2)

SERIES: dict[str, list[Size]] = {
    "images": [Size(images=500 * n) for n in (1, 2, 4, 8)],
    "words": [Size(images=2000, words=n) for n in (256, 512, 1024, 2048, 4096)],
    "classes": [Size(images=10_000, classes=n) for n in (10, 100, 1000, 10_000)],
}

COSTS: dict[str, tuple[float, int]] = {"seconds": (0.2, 1), "megabytes": (20.0, 0), "written": (2.0, 0)}
"""Least cost at the largest size that has an exponent, and the decimal places shown."""


def write_images(folder: Path, size: Size) -> None:
    """Write a smooth pattern for each class with noise, as equally many train and test images."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (size.classes, 4, 4, 3), dtype=np.uint8)
    for split in ("train", "test"):
        for label in range(size.classes):
            (folder / split / f"class_{label:05d}").mkdir(parents=True)
        for number in range(size.images):
            label = number % size.classes
            smooth = Image.fromarray(patterns[label]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            noisy = np.clip(np.asarray(smooth) + rng.normal(0, 32, (SIDE, SIDE, 3)), 0, 255)
            path = folder / split / f"class_{label:05d}" / f"{number:06d}.png"
            Image.fromarray(noisy.astype(np.uint8)).save(path)


class Recorder:
    """Records the costs of the parts of a job, summed over the times that a part is done."""

    def __init__(self, before: float) -> None:
        self.before = before
        """Resident memory before the first job, MB."""
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        before = _spent()
        yield
        costs = {cost: after - before[cost] for cost, after in _spent().items()}
        earlier = self.parts.get(name, dict.fromkeys(COSTS, 0.0))
        peak = max(earlier["megabytes"], _status("VmHWM") - self.before)
        self.parts[name] = {**{cost: earlier[cost] + costs[cost] for cost in costs}, "megabytes": peak}


def _spent() -> dict[str, float]:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        "written": sum(usage.ru_oublock for usage in usages) * 512 / 1e6,
    }


def _status(field: str) -> float:
    """Return a field of this process's status in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


def measure(size: Size, folder: Path, before: float) -> dict[str, dict[str, float]]:
    """Run a job and the commands after it, and return the costs of each part."""
    from questpress.pipeline import stages
    from questpress.pipeline.report import run_report

    data, run, other = (folder / name for name in ("data", "run", "other"))
    write_images(data, size)
    recorder = Recorder(before)
    load, write = stages.load_stage, run_report.write

    def load_recorded(name: str) -> Callable[..., Any]:
        def stage(*arguments: Any) -> Any:
            if name == "teacher":  # before it, the images are listed and compared
                reading.__exit__(None, None, None)
            with recorder.part(name):
                return load(name)(*arguments)

        return stage

    def write_recorded(*arguments: Any) -> Any:
        with recorder.part("report after each stage"):
            return write(*arguments)

    stages.load_stage, run_report.write = load_recorded, write_recorded
    reading = recorder.part("read data")
    reading.__enter__()
    try:
        compress(
            "run", *OPTIONS.split(), "--data", data, "--out", run, "--cache", folder / "cache",
            "--set", f"quest.words={size.words}",
        )  # fmt: skip
    finally:
        stages.load_stage, run_report.write = load, write
    shutil.copytree(run, other)
    commands = {
        "compress report": ["report", run],
        "compress validate": ["validate", run, "--out", folder / "validation"],
        "compress compare": ["compare", run, other, "--out", folder / "comparison"],
    }
    for name, arguments in commands.items():
        with recorder.part(name):
            compress(*arguments)
    return recorder.parts


def compress(*arguments: str | Path) -> None:
    """Run a command in this process."""
    from click.testing import CliRunner
    from questpress.pipeline.cli.main import cli

    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exit_code:
        raise SystemExit(f"compress {arguments[0]} ended with {result.exit_code}: {result.output[-2000:]}")


def run_series(sizes: Sequence[Size]) -> Iterator[dict[str, dict[str, float]]]:
    """Yield the costs at each size, after those of a tiny job are spent."""
    before = 0.0
    for size in (TINY, *sizes):
        with tempfile.TemporaryDirectory() as folder:
            costs = measure(size, Path(folder), before)
        if before:
            yield costs
        before = before or _status("VmRSS")


def start_series(name: str, extra: Sequence[str]) -> list[dict[str, dict[str, float]]]:
    """Measure a series in a new process."""
    command = [sys.executable, "-m", "benchmarks.growth", "--measure", name, *extra]
    environment = {**os.environ, "QUESTPRESS_ALLOCATOR": "system"}  # so that freed memory is seen to be free
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass(frozen=True)
class Exponent:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Return b of the least-squares line log(cost) = a + b·log(size), with its 95 % interval."""
    line = linregress(np.log(sizes), np.log(costs))
    margin = float(t.ppf(0.975, len(sizes) - 2) * line.stderr) if len(sizes) > 2 else float("inf")
    return Exponent(float(line.slope), float(line.slope) - margin, float(line.slope) + margin)


def rows(
    name: str, sizes: Sequence[Size], repetitions: Sequence[Sequence[Mapping[str, Mapping[str, float]]]]
) -> Iterator[list[str]]:
    """Yield a row for each part: its time at each size, other costs at the largest, and the exponents."""
    numbers = [getattr(size, name) for size in sizes]
    for part in repetitions[0][0]:
        row, is_noise = [part], True
        for cost, (least, digits) in COSTS.items():
            columns = [[run[i][part][cost] for run in repetitions] for i in range(len(sizes))]
            points = [(n, value) for n, column in zip(numbers, columns, strict=True) for value in column]
            shown = [f"{median(column):,.{digits}f}" for column in columns]
            row += shown if cost == "seconds" else shown[-1:]
            has_exponent = median(columns[-1]) >= least and min(map(min, columns)) > 0
            row.append(str(fit(*zip(*points, strict=True))) if has_exponent else "")
            is_noise = is_noise and not has_exponent
        if not is_noise:
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", default=",".join(SERIES), help="comma-separated names [default: all]")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--largest", type=int, help="leave out sizes above this number")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--measure", choices=SERIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [options.measure] if options.measure else options.series.split(",")
    chosen = {
        name: [s for s in SERIES[name] if getattr(s, name) <= (options.largest or 10**9)] for name in names
    }
    if options.measure:
        for costs in run_series(chosen[options.measure]):
            print(json.dumps(costs), flush=True)
        return
    extra = ["--largest", str(options.largest)] if options.largest else []
    results: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(options.repetitions):
        for name in names:
            print(f"{name}, repetition {number + 1}", file=sys.stderr, flush=True)
            results[name].append(start_series(name, extra))
            if options.out:
                options.out.write_text(json.dumps(results), encoding="utf-8")
    for name, repetitions in results.items():
        sizes = chosen[name]
        fixed = ", ".join(f"{v:,} {k}" for k, v in asdict(sizes[0]).items() if k != name)
        print(f"{name[0].upper()}{name[1:]} ({fixed})\n")
        times = [f"{getattr(size, name):,}: s" for size in sizes]
        last = times[-1].removesuffix("s")
        heads = ["part", *times, "exponent", f"{last}MB", "exponent", f"{last}written, MB", "exponent"]
        print(markdown(heads, rows(name, sizes, repetitions)), flush=True)


if __name__ == "__main__":
    main()
