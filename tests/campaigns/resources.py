"""Memory of a job as its data grows, and resources that jobs in one process leave behind.

    python -m tests.campaigns.resources growth --images 600
    python -m tests.campaigns.resources leaks --jobs 50

``growth`` runs the whole job on 1, 4 and 16 times as many generated images and reads the memory of all its
processes. Mapped files (decoded images, cached teacher outputs) are counted apart from private memory, since
the system can drop them at any time. ``leaks`` runs small jobs in one process and counts memory, open files,
processes, threads and temporary files after each. Linux only, since both read /proc.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.cells import markdown

TIMES = (1, 4, 16)
NETWORKS = {"teacher": "cifar_resnet14", "student": "cifar_resnet8"}


def make_images(root: Path, count: int, side: int) -> Path:
    """Write noisy JPEG images of three classes."""
    for number in range(count):
        label = number % 3
        folder = root / ("blue", "green", "red")[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 120, (side, side, 3))
        pixels[..., 2 - label] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:06d}.jpg")
    return root


def list_processes(root: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield root
    for task in Path(f"/proc/{root}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from list_processes(int(child))


def read_memory(process: int) -> dict[str, int]:
    """Return private and mapped bytes of a process, 0 if it has ended.

    Shared memory is divided among processes, since a forked child shares that of its parent.
    """
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {"private": 0, "mapped": 0}
    sizes = {name: 1024 * int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    return {"private": sizes["Pss_Anon"] + sizes["Pss_Shmem"], "mapped": sizes["Pss_File"]}


def growth(images: int, side: int) -> None:
    rows = []
    for times in TIMES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = make_images(folder / "data", times * images, side)
            command = [
                sys.executable, "-m", "questpress.pipeline", "--teacher", NETWORKS["teacher"],
                "--teacher-weights", "none", "--student", NETWORKS["student"], "--image-size", "32",
                "--batch-size", "64", "--teacher-epochs", "1", "--epochs", "1", "--set", "quest.words=64",
                "--bench-seconds", "0.1", "--data", str(data), "--out", str(folder / "run"),
                "--cache", str(folder / "cache"), "--quiet",
            ]  # fmt: skip
            most, seconds = measure(command)
            stored = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        sizes = [f"{most[kind] / 1e6:,.0f} MB" for kind in ("private", "mapped")]
        rows.append([f"{times * images:,}", *sizes, f"{stored / 1e6:,.1f} MB", f"{seconds:.0f} s"])
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown([f"images of {side} px", "private", "mapped files", "cache on disk", "time"], rows))


def measure(command: list[str]) -> tuple[dict[str, int], float]:
    """Return the peak memory of a command with its descendants, and its time in seconds."""
    most = {"private": 0, "mapped": 0}
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        now = [read_memory(number) for number in list_processes(process.pid)]
        most = {kind: max(most[kind], sum(memory[kind] for memory in now)) for kind in most}
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"the job ended with {process.returncode}")
    return most, time.monotonic() - begun


def leaks(jobs: int) -> None:
    from questpress.pipeline import compress

    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_images(folder / "data", 60, 24)
        (folder / "temporary").mkdir()
        tempfile.tempdir = str(folder / "temporary")
        for number in range(jobs):
            compress(
                **NETWORKS, data=data, teacher_weights="none", image_size=16, batch_size=16,
                teacher_epochs=1, epochs=1, bench_seconds=0.1, calibration_images=16, quiet=True, seed=number,
                out=folder / f"run{number}", cache=folder / f"cache{number}", settings={"quest.words": 8},
            )  # fmt: skip
            gc.collect()
            left = {
                "megabytes": read_memory(os.getpid())["private"] / 1e6,
                "open files": len(list(Path("/proc/self/fd").iterdir())),
                "processes": len(list(list_processes(os.getpid()))),
                "threads": len(list(Path("/proc/self/task").iterdir())),
                "threads of Python": threading.active_count(),
                "temporary files": len(list((folder / "temporary").iterdir())),
            }
            samples.append(left)
            print(json.dumps({"job": number + 1, **left}), file=sys.stderr, flush=True)
    marks = sorted({0, jobs // 5, 2 * jobs // 5, 3 * jobs // 5, 4 * jobs // 5, jobs - 1})
    rows = [[name, *(f"{samples[mark][name]:,.0f}" for mark in marks)] for name in samples[0]]
    print(markdown(["after job", *(str(mark + 1) for mark in marks)], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("growth", "leaks"))
    parser.add_argument("--images", type=int, default=600, help="number of images at 1×")
    parser.add_argument("--side", type=int, default=96, help="side of the images, pixels")
    parser.add_argument("--jobs", type=int, default=50)
    options = parser.parse_args()
    if options.what == "growth":
        growth(options.images, options.side)
    else:
        leaks(options.jobs)


if __name__ == "__main__":
    main()
