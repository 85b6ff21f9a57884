"""Memory, time and file sizes of a job with many classes of two images each.

    python -m benchmarks.many_classes FOLDER --classes 5000

writes FOLDER/data, which must be new, with an image of 8 × 8 pixels in train/ and in test/ for each class,
runs compress run, report, validate and compare on it, and prints tables in Markdown.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

NETWORKS = (
    "--teacher cifar_resnet20 --teacher-weights none --student cifar_resnet8 --student-weights none "
    "--image-size 32 --epochs 1 --teacher-epochs 1 --val-fraction 0 --bench-seconds 0.1"
)
FILES = ("run.json", "report.json", "report.html", "report.md", "classes.csv", "confusion.csv")


def write_images(folder: Path, classes: int) -> None:
    """Write a random pattern for each class, and the same one with noise as its test image."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        pattern = rng.integers(0, 256, (8, 8))
        for split in ("train", "test"):
            path = folder / split / f"class_{label:05d}" / "0.png"
            path.parent.mkdir(parents=True)
            noisy = np.clip(pattern + rng.normal(0, 8, pattern.shape), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(path)


def measure(*arguments: str | Path) -> tuple[float, float]:
    """Run compress and return its peak memory in MB, and its time in seconds."""
    command = [sys.executable, "-m", "questpress.pipeline", *map(str, arguments)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return usage.ru_maxrss * 1024 / 1e6, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=5000)
    given = parser.parse_args()
    data, run = given.folder / "data", given.folder / "run"
    write_images(data, given.classes)
    compared = (given.folder / "comparison", given.folder / "validation")
    commands: dict[str, list[str | Path]] = {
        "run": [*NETWORKS.split(), "--data", data, "--out", run, "--cache", given.folder / "cache"],
        "report": [run],
        "validate": [run, "--out", compared[1]],
        "compare": [run, "--out", compared[0]],
    }
    print(f"{given.classes:,} classes\n\n| command | peak memory | time |\n|---|---:|---:|")
    for name, arguments in commands.items():
        memory, seconds = measure(name, *arguments)
        print(f"| {name} | {memory:,.0f} MB | {seconds:.0f} s |", flush=True)
    print("\n| file | size |\n|---|---:|")
    files = [run / name for name in FILES] + [run / "artifact" / "manifest.json"]
    files += [compared[1] / "validation.json", compared[0] / "comparison.json"]
    for file in files:
        print(f"| {file.relative_to(given.folder)} | {file.stat().st_size / 1e6:.2f} MB |")


if __name__ == "__main__":
    main()
