"""An invented bench, and a report with it."""

import numpy as np
from questpress.export.latency.statistics import Samples, summarize
from questpress.export.results import (
    ColdStart,
    Conditions,
    EndToEnd,
    Flag,
    Latency,
    Percentile,
    Throughput,
)
from questpress.pipeline.runs.results import Bench, Report, TimedFile

from tests.support import reports

NAMES = {"teacher": 12.43, "student": 1.31, "student_int8": 0.684}
STEAL = Flag(
    name="steal",
    threads=2,
    sentence="The host gave 5 % of this virtual machine's cores to others.",
    figures={"value": 0.05, "limit": 0.01},
)


def timed(name: str, threads: int, median: float, n: int = 700) -> Latency:
    """Return latencies that vary by about 10 %, with a long tail."""
    rng = np.random.default_rng([len(name), threads])
    runs = median * (0.97 + rng.gamma(1.5, 0.03, n))
    return summarize(Samples(name, threads, np.array_split(runs, 20)))


def bench(**more: object) -> Bench:
    latencies = [timed(name, n, median / n) for n in (1, 2) for name, median in NAMES.items()]
    invented = Bench(
        command="compress bench runs/shop", finished="2026-11-21T12:00:00+0000", seconds=10, samples=662,
        seed=0,
        subjects=[
            TimedFile(
                name=name, key=name, file=f"artifact/{name}.onnx", sha256="41ae" * 16, bytes=2_548_907,
                runtime="onnxruntime", input="float32 [1, 3, 96, 96]", inputs="64 images of the run's data",
            )
            for name in NAMES
        ],
        latencies=latencies,
        speedups=[
            reports.speedup("teacher", 1, 18.2, 17.9, 18.5),
            reports.speedup("student", 1, 0.8, 0.75, 0.84),
            reports.speedup("student", 2, 1.0, 0.98, 1.03),
        ],
        images="64 images of the run's data",
        end_to_end=[
            EndToEnd(
                subject="student_int8", threads=2, decode=6.1, resize=1.9, normalize=0.2, run=0.34, n=300,
                total={
                    "p50": Percentile(value=8.61, low=8.55, high=8.7),
                    "p90": Percentile(value=9.2, low=9.1, high=None),
                },
            ),
        ],
        cold_starts=[
            ColdStart(
                subject="student_int8", threads=2, processes=5, import_ms=140, session_ms=41,
                session_ms_each=[41.0] * 5, first_run_ms=3.2, peak_bytes=66_000_000, runtime_bytes=54_000_000,
            ),
        ],
        throughput=[
            Throughput(
                subject="student_int8", threads=2, batch=batch, images_per_second=1450 + batch, low=1400,
                high=1500,
            )
            for batch in (1, 8)
        ],
        conditions=[
            Conditions(
                threads=n, rounds=100, processes=3, block_ms=100, cores=list(range(n)),
                governor="performance", sentinel_ms=(1.19, 1.2, 1.22), process_spread=0.41,
                process_spread_measured=True, unchecked=["throttled"],
            )
            for n in (1, 2)
        ],
        flags=[], session=["CPUExecutionProvider"], environment={"cpu": "AMD EPYC", "onnxruntime": "1.31.1"},
        samples_file="bench.npz",
    )  # fmt: skip
    return invented.model_copy(update=more)


def with_bench(**more: object) -> Report:
    return reports.full().model_copy(update={"bench": bench(**more)})


NEIGHBOR = Flag(
    name="neighbor",
    threads=1,
    sentence="Other processes used 62 % of the cores under test.",
    figures={"value": 0.62, "limit": 0.05},
)


def disturbed() -> Report:
    """Return a report whose bench was disturbed at both thread counts."""
    quiet = bench()
    latencies = [
        latency.model_copy(
            update={"percentiles": {}, "mean": None, "quantiles": [], "processor_ms": NAMES[latency.subject]}
        )
        for latency in quiet.latencies
    ]
    over_fp32 = {"ratio": 1.92, "low": 1.88, "high": 1.95}
    speedups = [
        speedup.model_copy(update={"clock": "processor", **changes})
        for speedup, changes in zip(quiet.speedups, ({}, over_fp32), strict=False)
    ]
    conditions = [under.model_copy(update={"wall_time": False}) for under in quiet.conditions]
    report = with_bench(latencies=latencies, speedups=speedups, conditions=conditions, flags=[NEIGHBOR])
    subjects = {
        key: getattr(report, key).model_copy(
            update={
                "latency_ms": {str(x.threads): x for x in latencies if x.subject == key},
                "speedups": [x for x in speedups if x.subject == key],
            }
        )
        for key in NAMES
    }
    return report.model_copy(update={**subjects, "teachers": [subjects["teacher"]]})
