"""Latency results, as `bench.json` and `report.json` contain them.

Times are milliseconds of one image at batch size 1, memory is bytes, intervals are 95 %.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, computed_field

from ..results import Result


class Percentile(Result):
    """A percentile and its interval; an end is None if the samples do not bound it."""

    value: float
    low: float | None = None
    high: float | None = None


class Latency(Result):
    """Latency of one subject at one thread count."""

    subject: str
    threads: int
    percentiles: dict[str, Percentile]
    """`p50`, `p90`, `p95`, `p99`, `p99_9`: those with enough samples."""
    mean: float
    n: int
    """Number of samples."""
    settled: bool = True
    """False if the warm-up reached its limit before two windows agreed within 2 %."""
    quantiles: list[float] = []
    """0, 1, … 100 %, for charts."""

    @property
    def p50(self) -> float | None:
        """The median; None if there are too few samples for it."""
        return self.value("p50")

    def value(self, percentile: str) -> float | None:
        """Return a percentile by name; None if there are too few samples for it."""
        return self.percentiles[percentile].value if percentile in self.percentiles else None


class Speedup(Result):
    """How many times faster than `over` a subject is: the ratio of per-round medians."""

    model_config = ConfigDict(extra="ignore")  # `verdict` is in the JSON and is computed when it is read

    subject: str
    over: str
    threads: int
    ratio: float
    low: float
    high: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Literal["faster", "no difference", "slower"]:
        """`no difference` if the interval contains 1."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"


class Flag(Result):
    """A disturbance that makes the latencies at one thread count unreliable; see `noise`."""

    name: str
    threads: int
    sentence: str
    figures: dict[str, float] = {}
    """`value` as measured, and the `limit` that it exceeds."""


class Conditions(Result):
    """How one thread count was measured."""

    threads: int
    rounds: int
    processes: int
    """Number of processes of each subject, which take turns."""
    block_ms: float
    cores: list[int]
    """Cores that all processes were pinned to; empty if the system cannot pin processes."""
    governor: str | None
    sentinel_ms: tuple[float, float, float]
    """p10, p50 and p90 of the sentinel's readings."""
    process_spread: float
    """Standard deviation between processes of one file, percent."""
    process_spread_measured: bool
    """False if it is assumed because each file had one process."""
    unchecked: list[str] = []
    """Flags that cannot be raised because the system does not report the counters."""


class EndToEnd(Result):
    """From an image file to a prediction: medians of the steps, and percentiles of their sum."""

    subject: str
    threads: int
    decode: float
    resize: float
    normalize: float
    run: float
    total: dict[str, Percentile]
    n: int


class ColdStart(Result):
    """Medians over new processes, from their start to the first prediction."""

    subject: str
    threads: int
    processes: int
    import_ms: float
    """Importing the runtime and numpy."""
    session_ms: float
    """Loading the file."""
    session_ms_each: list[float]
    first_run_ms: float
    peak_bytes: int | None
    """Peak memory until the first prediction; None if the system does not report it."""
    runtime_bytes: int | None
    """Peak memory before the file is loaded."""


class Throughput(Result):
    """Images per second at one batch size; `low` and `high` are the slowest and the fastest round."""

    subject: str
    threads: int
    batch: int
    images_per_second: float
    low: float
    high: float
