"""What a comparison of runs found, as data: what `comparison.json` holds, and what `compare(...)` returns.

Accuracies are percentages, latencies milliseconds, sizes bytes, times seconds.
"""

from typing import Literal, Self

from ...export.latency.results import Speedup
from ...export.results import Result
from ..runs.results import Example
from ..runs.scores import Calibration, Proportion, Score, TaskName

VALIDATION_SCHEMA_VERSION = 2

Verdict = Literal["better", "no difference", "worse"]


class ClassMeasure(Result):
    """One class: ``n`` images show it, ``answered`` are predicted to, and ``correct`` is both."""

    label: str
    n: int
    answered: int
    correct: int
    recall: Proportion | None = None
    """``correct`` of ``n``; None if no image shows the class."""
    precision: Proportion | None = None
    """``correct`` of ``answered``; None if the class is never predicted."""
    f1: float | None = None
    """None if the class is neither shown nor predicted."""

    @classmethod
    def from_counts(cls, label: str, *, n: int, answered: int, correct: int) -> Self:
        return cls(
            label=label,
            n=n,
            answered=answered,
            correct=correct,
            recall=Proportion.from_counts(correct, n) if n else None,
            precision=Proportion.from_counts(correct, answered) if answered else None,
            f1=200 * correct / (n + answered) if n + answered else None,
        )


class Confused(Result):
    """``n`` images of ``label`` were taken for ``answer``, a ``share`` of that class in percent."""

    label: str
    answer: str
    n: int
    share: float


class Network(Result):
    """One file and what it made of the images."""

    name: str
    role: Literal["student", "teacher"] = "student"
    source: str
    """The artifact as it was named."""
    file: str
    bytes: int
    sha256: str
    """Of several teachers together: their files' and hashes, with ``+`` between them."""
    precision: str | None = None
    """``int8`` or ``fp32``, as its manifest says."""
    target: str | None = None
    """For which processors an int8 file was made."""
    fused: bool = True
    """False: computed in float between its roundings, since it was made for other processors."""
    image_size: int
    classes: list[str]
    score: Score | None = None
    calibration: Calibration | None = None
    per_class: list[ClassMeasure] = []
    confusion: list[list[int]] | None = None
    """Counts [true class][answer], in the order of ``classes``; None above 100 classes."""
    confused: list[Confused] = []
    """The pairs that are confused most often, 100 at most."""
    mistakes: int = 0
    teacher: str | None = None
    """Name of the network that is its teacher."""
    agreement: Proportion | None = None
    """Of images with the teacher's prediction."""


class Pair(Result):
    """Two files on the same images, by McNemar's exact test; with several labels an image counts as right
    where its labels are the very ones.
    """

    first: str
    second: str
    first_alone: int
    """Images that the first has right and the second wrong."""
    second_alone: int
    points: float
    """The first one's share of right images minus the second one's."""
    p: float
    p_holm: float
    """Corrected for the number of pairs (Holm)."""
    verdict: Verdict
    """What the first is against the second, by ``p_holm`` at 5 %."""


class Validation(Result):
    """Files asked about labelled images."""

    schema_version: int = VALIDATION_SCHEMA_VERSION
    title: str
    command: str
    data: str
    source: str
    role: str
    """``train``, ``val``, ``test``, or ``all``: the images whatever their role."""
    n: int
    images: str
    """A digest of the images' content and labels: equal ones mean the same images."""
    task: TaskName = "classification"
    per_class: dict[str, int]
    """class -> images of it."""
    networks: list[Network]
    """The files asked for, what ships first, then the teachers."""
    pairs: list[Pair] = []
    examples: list[Example] = []
    """Mistakes of the first network, the most confident at the head."""
    skipped: list[tuple[str, str]] = []
    """(name, reason) of each file that was left out."""
    warnings: list[str] = []
    notes: list[str] = []
    environment: dict[str, str] = {}
    folder: str | None = None
    """Where its files were written."""

    @property
    def first(self) -> Network:
        return self.networks[0]


COMPARISON_SCHEMA_VERSION = 2

Kind = Literal["int8", "fp32", "teacher"]


class ComparedFile(Result):
    """One file of a run: what was measured of it on the run's test images and by the run's bench."""

    kind: Kind
    network: str
    bytes: int | None = None
    score: Score | None = None
    """Without its classes."""
    ece: float | None = None
    p50: float | None = None
    """Of one image, at the comparison's thread count."""
    p50_low: float | None = None
    p50_high: float | None = None
    """95 % interval, distribution-free; None where it is not known."""
    speedup: Speedup | None = None
    """Over the run's teacher, timed together with it."""


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
