"""Content of ``validation.json`` and ``comparison.json``, as ``validate`` and ``compare`` return it.

Scores are percentages, latencies milliseconds, sizes bytes, times seconds.
"""

from typing import Literal

from ...export.results import Result, Speedup
from ...export.runtime import Size
from ..config import TaskName
from ..runs.results import Example
from ..runs.scores import Calibration, ClassMeasure, Confusion, Proportion, Score

Verdict = Literal["better", "no difference", "worse"]
Kind = Literal["int8", "fp32", "teacher"]


class Confused(Result):
    """``n`` images of ``label``, ``percent`` of that class, are predicted to be ``predicted``."""

    label: str
    predicted: str
    n: int
    percent: float


class Network(Result):
    """One file and its results on the images."""

    name: str
    role: Literal["student", "teacher"] = "student"
    source: str
    """Path of the artifact as given."""
    file: str
    bytes: int
    sha256: str
    """For an ensemble, ``file`` and ``sha256`` are those of its files joined by ``+``."""
    precision: str | None = None
    """``int8`` or ``fp32``, from its manifest."""
    target: str | None = None
    """Processors that an int8 file is made for."""
    fused: bool = True
    """False if a file for other processors was computed in float between its roundings."""
    image_size: Size
    classes: list[str]
    score: Score | None = None
    calibration: Calibration | None = None
    per_class: list[ClassMeasure] = []
    """Classes that no image shows and that are never predicted are left out."""
    confusion: Confusion | None = None
    """(index of the true class, of the predicted class, number of images), without zeros; None if images
    have no single class."""
    mistakes: int = 0
    teacher: str | None = None
    """Name of its teacher in ``networks``."""
    agreement: Proportion | None = None
    """Proportion of images with the teacher's prediction."""


class Pair(Result):
    """Paired test of two files on the same images; by McNemar's exact test, or of AP by the bootstrap."""

    first: str
    second: str
    first_alone: int | None = None
    """Number of images that only the first classifies correctly; None for the bootstrap."""
    second_alone: int | None = None
    points: float
    """Percentage of correct images, or AP, of the first minus that of the second."""
    p: float
    p_holm: float
    """Holm's correction for the number of pairs."""
    verdict: Verdict
    """The first compared with the second, by ``p_holm`` at 5 %."""


class Validation(Result):
    """Results of files on labeled images."""

    schema_version: int = 3
    title: str
    command: str
    data: str
    source: str
    split: str
    """``train``, ``val``, ``test`` or ``all``."""
    n: int
    images: str
    """Hash of the images' content and labels."""
    task: TaskName = "classification"
    per_class: dict[str, int]
    """Number of images by class."""
    networks: list[Network]
    """Students, the default file first, then teachers."""
    pairs: list[Pair] = []
    examples: list[Example] = []
    """Mistakes of the first network, the worst first."""
    skipped: list[tuple[str, str]] = []
    """(name, reason) of each file that was skipped."""
    warnings: list[str] = []
    notes: list[str] = []
    environment: dict[str, str] = {}
    folder: str | None = None
    """Path of the written files."""

    @property
    def first(self) -> Network:
        return self.networks[0]


class ComparedFile(Result):
    """One file of a run, as measured by the run on its test images and in its bench."""

    kind: Kind
    network: str
    bytes: int | None = None
    score: Score | None = None
    """Without its classes."""
    ece: float | None = None
    p50: float | None = None
    """Median latency of one image at the comparison's number of threads."""
    p50_low: float | None = None
    p50_high: float | None = None
    """95 % interval, distribution-free."""
    speedup: Speedup | None = None
    """Over the run's teacher, timed in the same bench."""


class ComparedRun(Result):
    """One run."""

    name: str
    """The shortest unique end of its path."""
    source: str
    """Path of the run folder or of its report.json, as given."""
    method: str
    unlabeled: int = 0
    """Number of images without labels that the student learned from."""
    teacher: str
    student: str
    image_size: Size
    parameters: int | None = None
    int8: ComparedFile | None = None
    fp32: ComparedFile | None = None
    teacher_file: ComparedFile | None = None
    val_score: Score | None = None
    """Of the trained student in PyTorch, without its classes."""
    training_seconds: float | None = None
    """Time of the prepare and student stages."""
    seed: int | None = None
    data: str | None = None
    fingerprint: str | None = None
    machine: str | None = None
    """Processor, cores and ONNX Runtime version."""
    missing: list[str] = []
    """Results that an unfinished run lacks."""

    @property
    def ships(self) -> ComparedFile | None:
        """The int8 file if there is one, else the fp32 file."""
        return self.int8 or self.fp32


class AccuracyDifference(Result):
    """The shipped file of a run compared with the best one of its group."""

    run: str
    best: str
    points: float
    """Score minus the best score."""
    low: float | None = None
    high: float | None = None
    """Newcombe's 95 % interval of ``points`` if the images may differ."""
    p: float | None = None
    """Of McNemar's exact test if ``paired``, else of the chi-squared test; None for mAP and AP."""
    p_holm: float | None = None
    """Holm's correction for the number of tests in the group."""
    paired: bool
    within_noise: bool


class LatencyDifference(Result):
    """The shipped file of a run compared with the fastest one on the same machine."""

    run: str
    fastest: str
    ratio: float
    """Latency divided by the fastest one's."""
    verdict: Literal["no difference", "slower", "unknown"]
    """Slower if the medians' intervals do not overlap; unknown if one is missing."""


class Machine(Result):
    """Runs of one group timed on one machine, the fastest first."""

    machine: str
    runs: list[str]
    latencies: list[LatencyDifference] = []
    frontier: list[str] = []
    """Pareto-optimal files in score and latency as ``run kind``, the fastest first."""


class Group(Result):
    """Runs on the same data, the best score first."""

    data: str | None
    fingerprint: str | None
    n: int | None = None
    """Number of test images."""
    runs: list[str]
    best: str | None = None
    accuracies: list[AccuracyDifference] = []
    machines: list[Machine] = []


class UntrainedLatency(Result):
    """Median latency of a student with random weights, of one image on one thread, in milliseconds."""

    candidate: str
    """Name of its run folder without the method."""
    fp32: float
    int8: float
    setup: str = ""
    """What the latency depends on: the network, its input, and the machine."""

    @property
    def best(self) -> float:
        return min(self.fp32, self.int8)


class Trial(Result):
    """A short training of a candidate in a sweep's successive halving."""

    run: str
    epochs: int
    val_score: Score
    """Without its classes."""
    kept: bool
    """True if the candidate is trained further."""


class Winner(Result):
    """The student of a sweep that ships."""

    run: str
    reason: Literal["most accurate", "faster", "fastest"]
    """Faster: not significantly less accurate than the most accurate one. Fastest: of ``min_accuracy``."""
    difference: AccuracyDifference | None = None
    """To the most accurate run within the budget, unless it is this one."""
    split: Literal["val", "test"] = "val"
    """The images by which it was chosen: those of test if the runs have too few val images."""
    n: int
    """Number of these images."""
    timed: Kind
    """The file whose latency counted: the faster one, or fp32 if int8 is made for another processor."""


class Search(Result):
    """How a sweep chose among its candidates."""

    max_latency: float | None = None
    """The budget in milliseconds."""
    min_accuracy: float | None = None
    """Least accuracy, mAP or AP in percent of the student that ships."""
    latencies: list[UntrainedLatency] = []
    """Empty without a budget."""
    over: list[str] = []
    """Candidates over the budget, which were not trained."""
    trials: list[Trial] = []
    """In the order in which they were compared."""
    failed: dict[str, str] = {}
    """Error message by name of a run that failed."""
    winner: Winner | None = None
    """None if no file was measured within the budget, or none has the least accuracy."""


class Comparison(Result):
    """Runs compared by their reports."""

    schema_version: int = 2
    title: str
    command: str
    threads: int | None = None
    """Number of threads at which latencies are compared; None if no run was timed."""
    runs: list[ComparedRun]
    groups: list[Group]
    warnings: list[str] = []
    notes: list[str] = []
    search: Search | None = None
    """Of a sweep."""
    folder: str | None = None

    def run(self, name: str) -> ComparedRun:
        return next(run for run in self.runs if run.name == name)
