"""Time and memory of QuEST's step and of k-means at 1, 2, 4 and 8 times the images and words.

    python -m tests.campaigns.growth --out growth.json

Each case runs in a separate process, so that its peak memory can be read. Memory is what the case adds after
a tiny case (on a GPU: torch's peak). An exponent is the slope of a line through the logarithms: 1 is
proportional growth, less means that a part is fixed.

- step: one online training step, cifar_resnet56 → cifar_resnet20 at 32 pixels
- loss: QuEST's loss alone, forward and backward, on features at 8×8 positions
- k-means: the vocabulary from features at 8×8 positions
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import markdown

TIMES = (1, 2, 4, 8)

BASE = {"step": (32, 512), "loss": (32, 512), "k-means": (1000, 256)}
"""Images and words at 1×. While one grows, the other is at 4×."""

TINY = (8, 8)

CHANNELS, SIDE, ITERATIONS = 64, 8, 2


def loss(images: int, words: int, device: str) -> Callable[[], None]:
    """QuEST's loss on random features."""
    import torch
    from questpress.pipeline.methods.base import Batch, Setup, Shapes
    from questpress.pipeline.methods.quest.quest import Parameters, Quest

    random = torch.Generator().manual_seed(0)
    teacher = torch.randn(images, CHANNELS, SIDE, SIDE, generator=random).to(device)
    student = torch.randn(images, CHANNELS, SIDE, SIDE, generator=random).to(device).requires_grad_()
    shapes = Shapes(maps={"map": (CHANNELS, SIDE, SIDE)}, vector=None, logits=10)
    prepared = {"0.map.words": torch.randn(words, CHANNELS, generator=random), "0.map.mu": torch.tensor(9.0)}
    method = Quest(Parameters.model_validate({}), Setup(shapes, [shapes], prepared)).to(device)
    labels = torch.zeros(images, dtype=torch.int64, device=device)

    def work() -> None:
        parts = method(Batch({"map": student}, [{"map": teacher}], labels, 0))
        torch.stack(list(parts.values())).sum().backward()

    return work


def step(images: int, words: int, device: str) -> Callable[[], None]:
    """An online training step."""
    import torch

    from benchmarks.training.ours import Setting
    from benchmarks.training.ours import step as of_ours
    from benchmarks.training.pictures import made_up

    pictures = made_up(max(images, words // SIDE**2 + 1), 10, 32).train
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            teacher="cifar_resnet56", student="cifar_resnet20", size=32, batch=images, images=pictures,
            classes=10, words=words, top=words, positions=SIDE**2, device=device,
            threads=torch.get_num_threads(), precision="auto", compile="off", workers=0,
            scratch=Path(scratch),
        )  # fmt: skip
        return of_ours(setting, "quest")


def kmeans(images: int, words: int, device: str) -> Callable[[], None]:
    """The vocabulary of random features, in memory, in few iterations."""
    import torch
    from questpress.pipeline.methods.quest.vocabulary import FeatureMatrix

    random = torch.Generator().manual_seed(0)

    def work() -> None:
        held = FeatureMatrix(images * SIDE**2, CHANNELS, None)
        maps = (
            torch.rand(min(250, images - first), CHANNELS, SIDE, SIDE, generator=random).to(device)
            for first in range(0, images, 250)
        )
        assert held.fill(maps, (SIDE, SIDE), held.count())
        held.kmeans(words, ITERATIONS, 0)

    return work


KINDS: dict[str, Callable[[int, int, str], Callable[[], None]]] = {
    "step": step,
    "loss": loss,
    "k-means": kmeans,
}


def case(kind: str, images: int, words: int, device: str, threads: int, seconds: float) -> dict[str, float]:
    """Return the median time of a run, measured for some seconds, and the memory that it adds, MB."""
    import torch
    from questpress.pipeline.runs.device import use_threads

    use_threads(threads)
    cuda = device.startswith("cuda")
    KINDS[kind](*TINY, device)()  # what torch and faiss load and keep at first use
    work = KINDS[kind](images, words, device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = 0.0 if cuda else _resident()
    work()
    spent: list[float] = []
    while sum(spent) < seconds or len(spent) < 3:
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else _peak()
    return {"seconds": float(np.median(spent)), "megabytes": peak - before}


def _resident() -> float:
    """Reset the peak and return the memory in use, MB; the peak so far if that is not supported."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> float:
    """Return the peak memory of the process, MB."""
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return b of the least-squares line log(cost) = a + b·log(size)."""
    slope, _ = np.polyfit(np.log(sizes), np.log(np.maximum(costs, 1e-9)), 1)
    return float(slope)


def series(kind: str, grows: str, run: Callable[[str, int, int], dict[str, float]]) -> dict[str, Any]:
    """Measure a kind of work while its images or its words grow."""
    images, words = BASE[kind]
    sizes = [(images * n, 4 * words) if grows == "images" else (4 * images, words * n) for n in TIMES]
    cases = [{"images": i, "words": w, **run(kind, i, w)} for i, w in sizes]
    return {
        "kind": kind,
        "grows": grows,
        "cases": cases,
        "exponents": {
            cost: exponent([entry[grows] for entry in cases], [entry[cost] for entry in cases])
            for cost in ("seconds", "megabytes")
        },
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for entry in results:
        fixed = "words" if entry["grows"] == "images" else "images"
        first, *_ = entry["cases"]
        what = f"{entry['kind']}: {first[entry['grows']]:,} {entry['grows']} at 1×, {first[fixed]:,} {fixed}"
        for cost, scale, unit in (("seconds", 1000, "ms"), ("megabytes", 1, "MB")):
            values = [f"{scale * case[cost]:,.0f}" for case in entry["cases"]]
            rows.append([what, unit, *values, f"{entry['exponents'][cost]:.2f}"])
    return markdown(["work", "", *(f"{n}×" for n in TIMES), "exponent"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default=",".join(BASE), help="comma-separated names [default: all]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: the cores allowed")
    parser.add_argument("--seconds", type=float, default=2, help="measured time of each case")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--case", nargs=3, metavar=("KIND", "IMAGES", "WORDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    from questpress.export.latency.machine import environment
    from questpress.export.runtime import allowed_cores

    threads = options.threads or allowed_cores()
    if options.case:
        kind, images, words = options.case
        print(json.dumps(case(kind, int(images), int(words), options.device, threads, options.seconds)))
        return

    def run(kind: str, images: int, words: int) -> dict[str, float]:
        command = [
            sys.executable, "-m", "tests.campaigns.growth", "--case", kind, str(images), str(words),
            "--device", options.device, "--threads", str(threads), "--seconds", str(options.seconds),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind}, {images:,} images, {words:,} words: {measured}", file=sys.stderr, flush=True)
        return measured

    results = [series(kind, grows, run) for kind in options.kinds.split(",") for grows in ("images", "words")]
    machine = environment()
    print(f"{machine.cpu}, {machine.cores} cores, {options.device}, {threads} threads\n\n{table(results)}")
    if options.out:
        from questpress.pipeline.runs.files import write_json

        write_json(
            options.out,
            {"environment": asdict(machine), "device": options.device, "threads": threads, "series": results},
        )


if __name__ == "__main__":
    main()
