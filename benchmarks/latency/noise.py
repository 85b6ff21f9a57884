"""How far the bench's flags are from what a quiet machine shows, and how often an A/A pair is told apart.

    python -m benchmarks.latency.noise NETWORK.onnx --times 20 --seconds 2
    python -m benchmarks.latency.noise NETWORK.onnx --times 5 --neighbor

The network takes float32 images; it is timed as two subjects, which are the same file. With --neighbor a
process beside it keeps a core busy, which every bench is to notice.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from questpress.export.latency import statistics
from questpress.export.latency.machine import choose_cores
from questpress.export.latency.runner import BenchResult, Subject, bench
from questpress.pipeline.runs.artifacts import read_input


@contextmanager
def neighbor(asked: bool) -> Iterator[None]:
    """A process that counts, on the core that one thread is pinned to."""
    if not asked:
        yield
        return
    code = "import os\nos.sched_setaffinity(0, {cores})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code.format(cores=set(choose_cores(1)) or {0})])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def once(file: Path, seed: int, seconds: float, processes: int, threads: int) -> BenchResult:
    takes = read_input(file)
    inputs = np.random.default_rng(seed).standard_normal((64, *takes.shape), dtype=np.float32)
    pair = [Subject("A", file, inputs), Subject("A again", file, inputs)]
    return bench(pair, threads=[threads], seconds=seconds, processes=processes, seed=seed)


def told(result: BenchResult) -> dict[str, object]:
    [under] = result.conditions
    threads = under.threads
    ratio = result.speedup("A again", "A", threads)
    low, middle, high = under.sentinel_ms
    return {
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        "verdict": ratio.verdict,
        "spread": under.process_spread / 100,
        "sentinel": (high - low) / middle,
        "drift": max(abs(statistics.compute_drift(samples.medians)) for samples in result.samples),
        "repeat": max(float(np.expm1(np.ptp(samples.process_medians))) for samples in result.samples),
        "flags": {flag.name: flag.figures.get("value") for flag in result.flags},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--neighbor", action="store_true")
    asked = parser.parse_args()
    rows = []
    with neighbor(asked.neighbor):
        for seed in range(asked.times):
            row = told(once(asked.file, seed, asked.seconds, asked.processes, asked.threads))
            rows.append(row)
            print(json.dumps(row), flush=True)
    verdicts = Counter(str(row["verdict"]) for row in rows)
    flags = Counter(name for row in rows for name in row["flags"])  # type: ignore[attr-defined]
    print(f"{len(rows)} benches of an A/A pair: {dict(verdicts)}; flags: {dict(flags) or 'none'}")
    for name in ("spread", "sentinel", "drift", "repeat"):
        values = [float(row[name]) for row in rows]  # type: ignore[arg-type]
        print(f"{name}: median {np.median(values):.4f}, largest {max(values):.4f}")
    pooled = float(np.sqrt(np.mean([float(row["spread"]) ** 2 for row in rows])))  # type: ignore[arg-type]
    print(f"processes of one file, standard deviation over all benches: {pooled:.4f}")
    print(f"load average now {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
