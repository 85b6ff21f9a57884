"""Resources that jobs in one process leave behind.

    python -m tests.campaigns.resources --jobs 50

Runs small jobs in one process and counts memory, open files, processes, threads and temporary files after
each. Linux only, since it reads /proc.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.cells import markdown

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


def read_private_megabytes() -> float:
    """Return this process's private memory, without mapped files, which the system can drop."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: 1024 * int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    return (sizes["Pss_Anon"] + sizes["Pss_Shmem"]) / 1e6


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
                "megabytes": read_private_megabytes(),
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
    parser.add_argument("--jobs", type=int, default=50)
    options = parser.parse_args()
    leaks(options.jobs)


if __name__ == "__main__":
    main()
