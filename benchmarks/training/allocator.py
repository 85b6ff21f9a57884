"""Training throughput, page faults and peak memory with and without glibc keeping freed memory.

    python -m benchmarks.training.allocator --networks mobilenetv2_100,resnet50 --size 64 --steps 20 --pairs 3

Each measurement is a separate process, in turns with and without (QUESTPRESS_ALLOCATOR=system): random
images and weights, AdamW (fused), one thread, the default precision. The table has medians of processes:
images per second of wall time and of processor time, page faults per step, and the peak of resident memory;
and the ratio of processor time of each pair, system over kept: above 1, keeping memory is faster.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SETTINGS = {"system": "system", "kept": ""}
WARM_UP = 5
"""Steps until the heap has grown to the size of a step."""

HEADS = ("freed memory", "images/s", "images per processor second", "page faults per step", "peak, MiB")


def measure(network: str, size: int, batch: int, steps: int) -> dict[str, float]:
    """Return the throughput of ``steps`` training steps in this process."""
    from questpress.pipeline.runs.process import keep_freed_memory

    keep_freed_memory()
    import torch
    from questpress.models.build import build
    from questpress.pipeline.runs.device import choose_engine, use_threads

    from benchmarks.training.precision import training

    use_threads(1)
    torch.manual_seed(0)
    engine = choose_engine("cpu", "auto", build(network, num_classes=10, image_size=size))
    step = training(network, size, batch, engine)
    for _ in range(WARM_UP):
        step()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        step()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "images/s": steps * batch / seconds,
        "images per processor second": steps * batch / processor,
        "page faults per step": (after.ru_minflt - before.ru_minflt) / steps,
        "peak, MiB": after.ru_maxrss / 1024,
    }


def start(setting: str, *arguments: str) -> dict[str, float]:
    """Measure in a new process."""
    command = [sys.executable, "-m", "benchmarks.training.allocator", "--measure", *arguments]
    environment = {**os.environ, "QUESTPRESS_ALLOCATOR": SETTINGS[setting], "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    result: dict[str, float] = json.loads(output)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="mobilenetv2_100,resnet50")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.networks, options.size, options.batch, options.steps)))
        return
    print("| network |", " | ".join(HEADS), "| ratios |")
    print("|" + "---|" * (2 + len(HEADS)))
    for network in options.networks.split(","):
        arguments = ["--networks", network]
        for name in ("size", "batch", "steps"):
            arguments += [f"--{name}", str(getattr(options, name))]
        results: dict[str, list[Any]] = {setting: [] for setting in SETTINGS}
        for _ in range(options.pairs):
            for setting in SETTINGS:
                results[setting].append(start(setting, *arguments))
                print(network, setting, results[setting][-1], file=sys.stderr, flush=True)
        ratios = [
            f"{kept[HEADS[2]] / system[HEADS[2]]:.3f}"
            for system, kept in zip(results["system"], results["kept"], strict=True)
        ]
        for setting, measured in results.items():
            cells = [f"{statistics.median(result[head] for result in measured):,.0f}" for head in HEADS[1:]]
            gain = ", ".join(ratios) if setting == "kept" else ""
            print(f"| {network} | {setting} | {' | '.join(cells)} | {gain} |", flush=True)


if __name__ == "__main__":
    main()
