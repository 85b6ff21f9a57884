"""The result of a bench: ``bench.json``, ``bench`` in ``report.json``, and what ``bench(...)`` returns."""

from ...export.results import ColdStart, Conditions, EndToEnd, Flag, Latency, Result, Speedup, Throughput

SCHEMA_VERSION = 1


class TimedFile(Result):
    """A subject of a bench: one file in one runtime."""

    name: str
    key: str | None = None
    """Its role in the run: ``teacher``, ``student``, ``student_int8``; None for any other file."""
    file: str
    """Path as given on the command line, or within the run folder."""
    sha256: str
    bytes: int
    """Size, external weights included."""
    runtime: str
    input: str
    """Type and shape, such as ``float32 [1, 3, 224, 224]``."""
    inputs: str
    """Number and source of the inputs it was timed on."""


class Bench(Result):
    """Latency and related measurements of several files on one machine."""

    schema_version: int = SCHEMA_VERSION
    command: str
    finished: str
    """End time, ISO 8601."""
    seconds: float
    """Minimum time for each subject and thread count."""
    samples: int
    """Minimum number of runs for each subject and thread count."""
    seed: int
    subjects: list[TimedFile]
    latencies: list[Latency]
    speedups: list[Speedup]
    images: str | None = None
    """Number and source of the images of ``end_to_end``."""
    end_to_end: list[EndToEnd] = []
    cold_starts: list[ColdStart] = []
    throughput: list[Throughput] = []
    conditions: list[Conditions]
    flags: list[Flag]
    notes: list[str] = []
    """What was not measured, and why."""
    session: list[str]
    """Options of the ONNX Runtime session."""
    environment: dict[str, str]
    samples_file: str | None = None
    checksum: str | None = None
    """SHA-256 of the other fields as canonical JSON; only in ``bench.json``."""

    def latency(self, subject: str, threads: int) -> Latency | None:
        """Return a subject's latency at a thread count, None if it was not measured."""
        matches = (
            latency for latency in self.latencies if (latency.subject, latency.threads) == (subject, threads)
        )
        return next(matches, None)

    @property
    def threads(self) -> list[int]:
        """Thread counts that were measured."""
        return [conditions.threads for conditions in self.conditions]
