"""What a comparison of runs found, as data: what `comparison.json` holds, and what `compare(...)` returns.

Accuracies are percentages, latencies milliseconds, sizes bytes, times seconds.
"""

from typing import Literal

from ..runs.scores import Accuracy, MultiLabelScore, Result, Score, Speedup

COMPARISON_SCHEMA_VERSION = 1

Kind = Literal["int8", "fp32", "teacher"]


class ComparedFile(Result):
    """One file of a run: what was measured of it on the run's test images and by the run's bench."""

    kind: Kind
    network: str
    bytes: int | None = None
    accuracy: Accuracy | None = None
    multi_label: MultiLabelScore | None = None
    ece: float | None = None
    p50: float | None = None
    """Of one image, at the comparison's thread count."""
    p50_low: float | None = None
    p50_high: float | None = None
    """95 % interval, distribution-free; None where it is not known."""
    speedup: Speedup | None = None
    """Over the run's teacher, timed together with it."""

    @property
    def score(self) -> Score | None:
        return self.accuracy or self.multi_label


class ComparedRun(Result):
    """One run."""

    name: str
    """The shortest end of its path that no other run's has."""
    source: str
    """Its folder, or the report.json that was named."""
    method: str
    teacher: str
    student: str
    image_size: int
    parameters: int | None = None
    int8: ComparedFile | None = None
    fp32: ComparedFile | None = None
    of_teacher: ComparedFile | None = None
    training_seconds: float | None = None
    """Of the student, with what was prepared for it; without the teacher."""
    seed: int | None = None
    data: str | None = None
    fingerprint: str | None = None
    machine: str | None = None
    """Processor, cores, and ONNX Runtime's version: what latencies depend on."""
    missing: list[str] = []
    """What a finished run would have and this one has not."""

    @property
    def ships(self) -> ComparedFile | None:
        """The int8 file; the fp32 one where there is no other."""
        return self.int8 or self.fp32


class AccuracyDifference(Result):
    """A run's file that ships against the most accurate one of its group."""

    run: str
    best: str
    points: float
    """This one's minus the best one's."""
    low: float | None = None
    high: float | None = None
    """95 % interval of ``points`` (Newcombe), where the images are not known to be the same."""
    p: float | None = None
    """McNemar's exact test where ``paired``, else the chi-squared test; None where images have several
    labels.
    """
    p_holm: float | None = None
    """Corrected for the group's number of tests (Holm)."""
    paired: bool
    within_noise: bool


class LatencyDifference(Result):
    """A run's file that ships against the fastest one on the same machine."""

    run: str
    fastest: str
    ratio: float
    """How many times as long this one takes."""
    verdict: Literal["no difference", "slower", "not known"]
    """By whether the medians' intervals overlap; ``not known`` where one has none."""


class Machine(Result):
    """Runs of one group that were timed on one machine, the fastest first."""

    machine: str
    runs: list[str]
    latencies: list[LatencyDifference] = []
    frontier: list[str] = []
    """Files that no other beats in accuracy and latency, the fastest first: ``run kind``."""


class Group(Result):
    """Runs of the same data, the most accurate first."""

    data: str | None
    fingerprint: str | None
    n: int | None = None
    """Test images."""
    runs: list[str]
    best: str | None = None
    accuracies: list[AccuracyDifference] = []
    machines: list[Machine] = []


class Comparison(Result):
    """Runs against each other."""

    schema_version: int = COMPARISON_SCHEMA_VERSION
    title: str
    command: str
    threads: int | None = None
    """At which latencies are compared; None where none was timed."""
    runs: list[ComparedRun]
    groups: list[Group]
    warnings: list[str] = []
    notes: list[str] = []
    folder: str | None = None

    def run(self, name: str) -> ComparedRun:
        return next(one for one in self.runs if one.name == name)
