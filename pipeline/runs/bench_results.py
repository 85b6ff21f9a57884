"""What `compress bench` found: `bench.json`, the `bench` of `report.json`, and what `bench(...)` returns.

Latencies are milliseconds of one image at batch 1, memory and sizes are bytes, intervals are 95 %.
"""

from typing import Literal

from .scores import Result

SCHEMA_VERSION = 1


class TimedFile(Result):
    """A subject: one file in one runtime."""

    name: str
    key: str | None = None
    """What it is in its run: ``teacher``, ``student``, ``student_int8``; None of any other file."""
    file: str
    """Its path as it was given, or within its run folder."""
    sha256: str
    bytes: int
    """With weights that lie beside the graph."""
    runtime: str
    input: str
    """As in ``float32 [1, 3, 224, 224]``."""
    inputs: str
    """What it was given: how many, and whence."""


class Percentile(Result):
    """``low`` and ``high`` are None where the samples do not bound it."""

    value: float
    low: float | None
    high: float | None


class TimedLatency(Result):
    subject: str
    threads: int
    percentiles: dict[str, Percentile]
    """``p50``, ``p90``, ``p95``, ``p99``, ``p99_9``: those that enough runs carry."""
    mean: float
    n: int
    settled: bool
    """Whether warm-up ended with two windows within 2 %."""
    quantiles: list[float]
    """0, 1, … 100 %, for drawing; the raw samples are in the ``.npz`` file."""

    @property
    def p50(self) -> float | None:
        found = self.percentiles.get("p50")
        return None if found is None else found.value


class TimedSpeedup(Result):
    subject: str
    over: str
    threads: int
    ratio: float
    low: float
    high: float
    verdict: Literal["faster", "no difference", "slower"]


class Whole(Result):
    """From an image file to an answer; medians of the steps and of the whole."""

    subject: str
    threads: int
    decode: float
    resize: float
    normalise: float
    run: float
    total: dict[str, Percentile]
    n: int


class Start(Result):
    """Of fresh processes, medians: see ``export/latency/extras.py``."""

    subject: str
    threads: int
    processes: int
    import_ms: float
    session_ms: float
    session_ms_each: list[float]
    first_run_ms: float
    peak_bytes: int | None
    runtime_bytes: int | None
    """The most memory before the file was opened: what the runtime alone takes."""


class Rate(Result):
    """Images a second at a batch; ``low`` and ``high`` are the slowest and the fastest round."""

    subject: str
    threads: int
    batch: int
    images_per_second: float
    low: float
    high: float


class Early(Result):
    """MLPerf's early-stopping estimates: upper bounds of the percentiles with 99 % confidence."""

    subject: str
    threads: int
    n: int
    p90: float | None
    p99: float | None


class NoiseFlag(Result):
    """See ``export/latency/noise.py``."""

    name: str
    threads: int
    sentence: str
    figures: dict[str, float] = {}


class Conditions(Result):
    """How one thread count was measured."""

    threads: int
    rounds: int
    processes: int
    """Of each file, taking turns."""
    block_ms: float
    cores: list[int]
    """Those everything was pinned to; none where the system pins no process."""
    governor: str | None
    sentinel_ms: tuple[float, float, float]
    """The fixed computation's p10, p50 and p90 over the rounds."""
    process_spread: float
    """Standard deviation between processes of one file, percent."""
    process_spread_measured: bool
    """Whether it was found here, or is what is assumed where one process ran each file."""
    unchecked: list[str] = []
    """Flags that could not have been raised, since the system gives no figures."""


class Bench(Result):
    schema_version: int = SCHEMA_VERSION
    command: str
    finished: str
    """When, ISO 8601."""
    seconds: float
    """At least so many for each subject and thread count."""
    samples: int
    """And at least so many runs."""
    seed: int
    subjects: list[TimedFile]
    latencies: list[TimedLatency]
    speedups: list[TimedSpeedup]
    images: str | None = None
    """What the rows from image file to answer were measured on."""
    end_to_end: list[Whole] = []
    cold_starts: list[Start] = []
    throughput: list[Rate] = []
    mlperf: list[Early] = []
    conditions: list[Conditions]
    flags: list[NoiseFlag]
    notes: list[str] = []
    """What could not be measured, and why."""
    session: list[str]
    """The runtime's options."""
    environment: dict[str, str]
    samples_file: str | None = None
    checksum: str | None = None
    """Of ``bench.json``: SHA-256 of all the rest as canonical JSON."""

    def latency(self, subject: str, threads: int) -> TimedLatency | None:
        found = (one for one in self.latencies if (one.subject, one.threads) == (subject, threads))
        return next(found, None)

    @property
    def threads(self) -> list[int]:
        return [one.threads for one in self.conditions]
