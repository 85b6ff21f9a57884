"""Results that are reported as JSON: the base class, and those that belong to no subpackage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

MAX_NUMBER = 1e100
"""Larger ones would overflow in charts."""


class Result(BaseModel):
    """A part of `report.json` or `bench.json`; unknown keys are refused."""

    # A number that is not finite is the string "NaN" or "Infinity" in JSON.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", use_attribute_docstrings=True)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        """Refuse numbers that no run measures: records may be written by others."""
        for name, value in vars(self).items():
            is_count = isinstance(value, int) and not 0 <= value < 1 << 63
            if is_count or (isinstance(value, float) and MAX_NUMBER < abs(value) < math.inf):
                raise ValueError(f"{name} is out of range, got {str(value)[:20]}")
        return self

    draw: ClassVar[Callable[[Any], tuple[str, str] | None]] = lambda _: None
    """Returns a short table as text and as HTML, or None for a part of a result; set by `pipeline`."""

    def __repr__(self) -> str:
        drawn = Result.draw(self)
        return super().__repr__() if drawn is None else drawn[0]

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str | None:
        """Return the table for a notebook."""
        drawn = Result.draw(self)
        return None if drawn is None else drawn[1]


class Parity(Result):
    """Largest difference between the logits of an exported file and of its PyTorch network."""

    max_abs: float
    max_rel: float
    """Relative to the spread (largest minus smallest) of the network's logits."""
    n: int
    """Number of images."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes at which the file was run."""


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
    """`p50`, `p90`, `p95`, `p99`, `p99_9`: those with enough samples; none without `Conditions.wall_time`."""
    mean: float | None
    """None if `Conditions.wall_time` is False."""
    processor_ms: float | None = None
    """p1 of the processor time of a run, the sum of all threads; None if it was not measured."""
    n: int
    """Number of samples."""
    settled: bool = True
    """False if the warm-up reached its limit before two windows agreed within 2 %."""
    quantiles: list[float] = []
    """0, 1, … 100 %, for charts; empty if `Conditions.wall_time` is False."""

    @property
    def p50(self) -> float | None:
        """The median; None if there are too few samples for it."""
        return self.value("p50")

    def value(self, percentile: str) -> float | None:
        """Return a percentile by name; None if there are too few samples for it."""
        return self.percentiles[percentile].value if percentile in self.percentiles else None


class Speedup(Result):
    """How many times faster than `over` a subject is: the ratio of their reported medians."""

    model_config = ConfigDict(extra="ignore")  # `verdict` is in the JSON and is computed when it is read

    subject: str
    over: str
    threads: int
    ratio: float = Field(gt=0)
    low: float
    high: float
    clock: Literal["wall", "processor"] = "wall"
    """`processor`: the ratio of the processor times of a run, because other processes used the cores."""

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
    wall_time: bool = True
    """False if other processes used so much of the cores that latencies in wall time are not reported."""
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


class Device(Result):
    """A device on which `predict.py --bench` ran."""

    processor: str = Field(min_length=1, max_length=200)
    """The board if it does not name its processor."""
    machine: str = Field(max_length=50)
    flags: list[str]
    """Instruction sets for int8."""
    cores: int
    memory_bytes: int | None
    system: str = Field(max_length=200)


class DeviceTiming(Result):
    """Times of one file of the artifact at one thread count, milliseconds."""

    name: str
    sha256: str
    bytes: int
    precision: str
    target: str | None
    threads: int
    n: int
    """Number of samples."""
    latency_ms: dict[Literal["p50", "p90"], Percentile]
    processor_ms: float
    """Mean processor time of a run, the sum of all threads."""
    load_ms: float
    """Opening the file and its first run."""
    end_to_end_ms: dict[Literal["p50", "p90"], Percentile]
    """From an image file to a prediction."""


class DeviceFlag(Result):
    """A disturbance of one file's times."""

    name: str
    file: str
    threads: int
    sentence: str


class DeviceBench(Result):
    """The content of `bench.DEVICE.json`, which `predict.py --bench` writes."""

    bench_version: Literal[1]
    device: Device
    versions: dict[str, str]
    provider: str
    seconds: float
    images: str
    results: list[DeviceTiming]
    flags: list[DeviceFlag]


class Verdict(Result):
    """The accuracy of a candidate's file compared with the fp32 file."""

    score: float
    """Percent, higher is better."""
    lost: float
    """Points lost to the fp32 file; negative if it is better."""
    holds: bool
    """True if the loss is within the budget."""
    sqnr: float
    """Signal to quantization noise of the logits, decibels."""
    p: float | None = None
    """McNemar's exact test against the fp32 file; None without a paired test."""


class Candidate(Verdict):
    """One way to quantize a network, and the result."""

    name: str
    calibration: str
    equalized: bool
    bias_corrected: bool
    kept_float: tuple[str, ...]
    """Nodes that stay float for the sake of accuracy."""
    bytes: int
    ships: bool = False
    p50: float | None = None
    """Median milliseconds of one image on one thread; None if it was not measured."""
    speedup: Speedup | None = None
    """Over the fp32 file, measured in the same rounds."""

    @property
    def rank(self) -> tuple[bool, float, int, float]:
        """Sort key; the largest is the best."""
        return self.holds, self.score, -len(self.kept_float), self.sqnr


class FloatNode(Result):
    """A node that runs in float: name and operator as in the file, and the reason."""

    model_config = ConfigDict(frozen=True)

    name: str
    op_type: str
    why: str
