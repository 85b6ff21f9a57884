"""The report as data: what `report.json` holds, and what `compress(...)` returns.

Fields without a value yet are ``None`` or empty: the report is written after each stage.
Accuracies are percentages, latencies milliseconds, sizes bytes, times seconds.
"""

from typing import Any

import numpy as np
from pydantic import PositiveInt

from ...export.results import (
    Candidate,
    ColdStart,
    Conditions,
    DeviceBench,
    EndToEnd,
    Flag,
    FloatNode,
    Latency,
    Parity,
    Result,
    Speedup,
    Throughput,
)
from ...export.runtime import Size
from ..config import TaskName
from .scores import Calibration, Confusion, Proportion, Score, Temperature

SCHEMA_VERSION = 3
BENCH_SCHEMA_VERSION = 1

SHIPPING_ORDER = ("student_int8", "student")
"""Networks of a report: the first one that exists ships."""


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

    schema_version: int = BENCH_SCHEMA_VERSION
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
        key = (subject, threads)
        return next((row for row in self.latencies if (row.subject, row.threads) == key), None)

    @property
    def threads(self) -> list[int]:
        return [conditions.threads for conditions in self.conditions]

    @property
    def disturbed_threads(self) -> list[int]:
        """Thread counts at which wall time is not reported."""
        return [conditions.threads for conditions in self.conditions if not conditions.wall_time]


class Int8Search(Result):
    """The int8 search for one target."""

    target: str
    file: str | None
    """Path of the shipped file inside the run folder; None if no candidate is within the budget."""
    max_drop: float
    role: str
    """Split that accuracy was measured on: ``val``, or ``train`` if there are no val images."""
    n: int
    fp32_score: float
    p50_fp32: float | None = None
    tried: list[Candidate]
    worst: list[tuple[str, float]] = []
    """The roundings that cost most, with the signal-to-noise ratio of the logits in decibels if only that
    tensor is quantized; empty unless float nodes were tried."""
    float_parts: list[FloatNode] = []
    test_score: Score | None = None
    """Score of the shipped file on the test images."""
    not_timed: str | None = None
    """Reason why the file cannot be timed on this machine."""
    slow: str | None = None
    """If int8 is not faster than fp32: the reason, and students that would be."""


class Recovery(Result):
    """Quantization-aware training; its file is one of the candidates of the int8 search."""

    epochs: int
    fake_val: float | None
    """Score of the fake-quantized network in PyTorch on val, percent."""
    fake_test: float | None
    file: str
    """The float graph with the trained weights."""


class ShownWord(Result):
    """A visual word as the image patches nearest to it."""

    rank: int
    """Rank among all words by use, from 1."""
    share: float
    """Percentage of the features whose nearest word it is."""
    patches: list[str]
    """PNGs in base64, nearest first, each from a different image."""


class Words(Result):
    """QuEST's vocabulary for one teacher."""

    teacher: str
    words: int
    requested: int
    features: PositiveInt
    features_used: PositiveInt
    perplexity: float
    mu: float
    level: str = "map"
    note: str | None = None
    top: int | None = None
    """m, the number of words of p_T that are cached per position."""
    lost_mass: float | None = None
    """Mean fraction of p_T that is lost with the other words."""
    usage: list[tuple[int, int]] = []
    """(rank, number of features) at some ranks, the most used word first."""
    dead: int | None = None
    """Number of words that are nearest to no feature."""
    shown: list[ShownWord] = []
    """Some words, spread over the ranks; only for the first vocabulary."""
    patch: int | None = None
    """Side of the patches in pixels of the teacher's input."""
    seen: int | None = None
    """Number of images that were searched for patches."""


class Subject(Result):
    """A network of the run: its score, size and latency."""

    name: str
    """timm's name, e.g. ``mobilenetv2_100``."""
    weights: str
    """Initial weights: ``pretrained``, ``scratch`` or the name and hash of a file."""
    parameters: int | None = None
    gmacs: float | None = None
    score: Score | None = None
    """Score on the test images."""
    val_score: Score | None = None
    """Score of the weights in PyTorch on the val images, before export."""
    agreement: Proportion | None = None
    """Proportion of test images with the same prediction as the teacher."""
    calibration: Calibration | None = None
    bytes: int | None = None
    latency_ms: dict[str, Latency] = {}
    """By thread count, as text."""
    speedups: list[Speedup] = []
    parity: Parity | None = None
    file: str | None = None
    """Path inside the run folder."""
    sha256: str | None = None
    license: str | None = None
    head: str | None = None
    """For a teacher: ``kept``, ``tuned`` (rows of a larger head), ``replaced`` or ``none``."""
    opset: int | None = None
    ir_version: int | None = None
    quantization: dict[str, Any] | None = None

    @property
    def thresholds(self) -> np.ndarray | None:
        """Thresholds of the classes that the score is measured at, float64 [classes]; None if it has none."""
        classes = self.score.classes if self.score is not None else []
        thresholds = [scored.threshold for scored in classes if scored.threshold is not None]
        return np.array(thresholds) if thresholds else None


class DataSummary(Result):
    name: str
    classes: list[str]
    train: int
    val: int
    test: int
    unlabeled: int = 0
    """Number of images without labels that the student learned from."""
    left_out: dict[str, int] = {}
    """Number of images without labels that were left out as copies, by what they are copies of."""
    per_class: dict[str, dict[str, int]]
    """Split -> class -> number of images."""
    skipped: list[tuple[str, str]] = []
    """(name, reason) of each file or folder that is skipped."""
    ignored: dict[str, int] = {}
    """Number of ignored files by suffix, or another description."""
    notes: list[str] = []
    """What was not used, or is read in an unusual way."""
    duplicates: list[list[str]] = []
    """Groups of identical images across given folders or classes, or in test, by name."""
    near_copies: list[list[str]] = []
    """Groups of near copies in several splits, by name; the first 1,000."""
    near_copies_in_test: int = 0
    """Number of test images with a near copy in another split."""
    fingerprint: str
    task: TaskName = "classification"
    shown: float | None = None
    """Percentage of the median training image that the student's input shows."""


class Round(Result):
    """One of the students of ``--rounds``; see ``pipeline/config/stages.py``."""

    round: int
    teacher: str
    """The teacher's name, or the previous round."""
    seed: int
    score: Score | None = None
    """Score of the fp32 weights in PyTorch on the test images."""
    val_score: Score | None = None
    file: str
    """Path of the weights inside the run folder."""


class Baseline(Result):
    """The student trained without the teacher, against the distilled one: both fp32 in PyTorch, on test."""

    score: Score
    val_score: Score | None = None
    student: Score
    """Score of the distilled student."""
    points: float
    """Score of the distilled student minus that of the baseline."""
    low: float | None = None
    high: float | None = None
    """Paired 95 % interval of ``points``; None if the task has none."""
    p: float | None = None
    """Of the paired test."""
    file: str
    """Path of the weights inside the run folder."""


class Reconstruction(Result):
    """FEED: distance between the translated map of the student and a teacher's, in the last epoch."""

    stage: str
    teacher: str
    error: float
    """L1 between the maps scaled to length 1, over √n: 0 is the same direction, about 1.1 a random one."""
    first: float
    """The distance in the first epoch."""


class Hashes(Result):
    """The hashes of one teacher's vector; see ``pipeline/methods/mimic/``."""

    teacher: str
    hashes: int
    std: float
    bias: str


class BalancedWeight(Result):
    """A weight adjusted by ``--balance auto``; see ``pipeline/methods/gradient_balance.py``."""

    method: str
    ratio: float
    """Gradient norm of the method's weighted loss over that of the cross-entropy, on the last map."""
    low: float
    high: float
    """Range of gradient ratios in which the method is known to work."""
    factor: float
    """Factor of the weight; 1 if the ratio is within the range."""


class TeacherCacheUse(Result):
    """The cached teacher outputs that the student learned from."""

    views: int
    """Number of fixed views of each image."""
    complete: bool
    """True if these are all distinct views."""
    bytes_per_view: int
    lost_mass: float | None = None
    """QuEST: mean fraction of p_T that is lost; the largest over the views."""
    computed: int
    """Number of views computed by this run; the others were cached."""


class Epoch(Result):
    """One line of `metrics.jsonl`."""

    stage: str
    epoch: int
    epochs: int
    images_per_second: float
    learning_rate: float
    losses: dict[str, float]
    """Mean of each weighted loss over the epoch, and ``loss``, their sum."""
    metrics: dict[str, float] = {}
    """Metrics of the methods, such as QuEST's perplexity, mean largest p_T, word accuracy and γ."""
    train_accuracy: float | None = None
    """None if the score is not a proportion of images."""
    val_accuracy: float | None = None
    """The task's score, percent."""
    seconds: float | None = None
    """Training time without the evaluation on val."""
    time_fractions: dict[str, float] = {}
    """Fraction of the steps' time in each phase: ``data``, ``teacher``, ``student``; the sum is 1."""
    peak_memory_bytes: int | None = None
    """Peak of a GPU's tensors since the training started; on a CPU, of the process since its start."""
    mfu: float | None = None
    """Model FLOPs utilization, 0 to 1; see ``training/metrics.py``."""


class Example(Result):
    """A test image with the predictions of the teacher and the exported student."""

    name: str
    label: str
    teacher: str | None = None
    """None if no teacher has a head."""
    teacher_probability: float | None = None
    teacher_correct: bool | None = None
    student: str
    student_probability: float
    student_correct: bool
    png: str
    """The image as the student sees it, base64 of a PNG."""


class StageTime(Result):
    stage: str
    seconds: float
    summary: str
    """Summary line in the terminal."""


class Report(Result):
    """The content of `report.json`, which `report.html` and `report.md` show."""

    schema_version: int = SCHEMA_VERSION
    title: str
    command: str
    method: str
    """As on the command line, e.g. ``quest`` or ``none``."""
    method_parameters: dict[str, Any] = {}
    method_source: str | None = None
    """The papers of the methods."""
    recipe: str | None = None
    image_size: Size
    """Of the student's input, in pixels: the side of a square, or height and width."""
    teacher_image_size: Size | None = None
    data: DataSummary | None = None
    teachers: list[Subject] = []
    teacher: Subject | None = None
    """The teacher, or the ensemble of several."""
    student: Subject | None = None
    student_int8: Subject | None = None
    words: list[Words] = []
    reconstruction: list[Reconstruction] = []
    rounds: list[Round] = []
    baseline: Baseline | None = None
    hashes: list[Hashes] = []
    balance: list[BalancedWeight] = []
    teacher_cache: TeacherCacheUse | None = None
    temperature: Temperature | None = None
    int8: list[Int8Search] = []
    """The search for each target; the first one's file is ``student_int8``."""
    recovery: Recovery | None = None
    bench: Bench | None = None
    """The complete bench; None before the bench stage."""
    devices: list[DeviceBench] = []
    """Benches of the artifact on devices, added by ``compress bench RUN --add``."""
    epochs: list[Epoch] = []
    examples: list[Example] = []
    confusion: Confusion | None = None
    """(index of the true class, of the class predicted by the exported file, number of test images), without
    zeros."""
    warnings: list[str] = []
    stages: list[StageTime] = []
    environment: dict[str, str] = {}
    config: dict[str, Any] = {}
    """Every option, resolved."""
    artifact: str | None = None
    """Path of the folder that ships, inside the run folder."""
    checksum: str | None = None
    """SHA-256 of the other fields as canonical JSON."""
