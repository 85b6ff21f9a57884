"""Coverage of the bench's intervals by A/A comparisons, and the ratio of two files next to other processes.

    python -m benchmarks.latency.noise NETWORK.onnx --times 20 --seconds 2
    python -m benchmarks.latency.noise NETWORK.onnx --times 5 --neighbors 1
    python -m benchmarks.latency.noise FP32.onnx INT8.onnx --times 3 --neighbors 4

The networks take float32 images. One file is timed as two subjects, so the true ratio is 1, and the fraction
of intervals that contain 1 is printed with its own 95 % interval. Of two files the ratio is printed.
--neighbors N starts N busy loops on the core under test.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from questpress.export.latency import noise
from questpress.export.latency.machine import choose_cores
from questpress.export.latency.runner import BenchResult, Subject, bench
from questpress.pipeline.runs.artifacts import read_input
from questpress.pipeline.runs.scores import Proportion


@contextmanager
def neighbor() -> Iterator[None]:
    """Keep the core busy that one thread is pinned to."""
    code = f"import os\nos.sched_setaffinity(0, {set(choose_cores(1)) or {0}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(files: Sequence[Path], seed: int, seconds: float, processes: int, threads: int) -> BenchResult:
    rng = np.random.default_rng(seed)
    subjects = [
        Subject(name, file, rng.standard_normal((64, *read_input(file).shape), dtype=np.float32))
        for name, file in zip("AB", files, strict=True)
    ]
    return bench(subjects, threads=[threads], seconds=seconds, processes=processes, seed=seed)


def summarize(result: BenchResult) -> dict[str, Any]:
    [under] = result.conditions
    ratio = result.speedup("B", "A", under.threads)
    low, middle, high = under.sentinel_ms
    return {
        "ratio": ratio and ratio.model_dump(include={"ratio", "low", "high", "clock", "verdict"}),
        "spread": under.process_spread / 100,
        "sentinel": (high - low) / middle,
        "drift": max(abs(noise.compute_drift(samples.medians)) for samples in result.samples),
        "repeat": max(float(np.expm1(np.ptp(samples.process_logs))) for samples in result.samples),
        "flags": {flag.name: flag.figures.get("value") for flag in result.flags},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="one file, or two to compare")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--neighbors", type=int, default=0)
    args = parser.parse_args()
    files = (args.files * 2)[:2]
    rows = []
    with ExitStack() as stack:
        for _ in range(args.neighbors):
            stack.enter_context(neighbor())
        for seed in range(args.times):
            row = summarize(measure(files, seed, args.seconds, args.processes, args.threads))
            rows.append(row)
            print(json.dumps(row), flush=True)
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    clocks = dict(Counter(ratio["clock"] for ratio in ratios))
    flags = dict(Counter(name for row in rows for name in row["flags"]))
    print(f"{len(rows)} benches; ratios by clock: {clocks}, not reported: {len(rows) - len(ratios)}")
    print(f"flags: {flags or 'none'}")
    if ratios and len(args.files) == 1:
        held = Proportion.from_counts(sum(r["low"] <= 1 <= r["high"] for r in ratios), len(ratios))
        width = np.median([r["high"] / r["low"] - 1 for r in ratios])
        print(f"coverage of 1: {held.percent:.0f} % ({held.low:.0f}–{held.high:.0f} %) of {held.n}")
        print(f"median width of an interval: {100 * width:.1f} %")
    elif ratios:
        values = [r["ratio"] for r in ratios]
        print(f"ratio: median {np.median(values):.3f}, {min(values):.3f} to {max(values):.3f}")
    for name in ("spread", "sentinel", "drift", "repeat"):
        values = [float(row[name]) for row in rows]
        print(f"{name}: median {np.median(values):.4f}, largest {max(values):.4f}")
    print(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
