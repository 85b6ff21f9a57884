"""The report as data: what `report.json` holds, and what `compress(...)` returns.

Fields without a value yet are ``None`` or empty: the report is written after each stage.
Accuracies are percentages, latencies milliseconds, sizes bytes, times seconds.
"""

from typing import Any

import numpy as np

from ...export.results import (
    Candidate,
    ColdStart,
    Conditions,
    EndToEnd,
    Flag,
    FloatNode,
    Latency,
    Parity,
    Result,
    Speedup,
    Throughput,
)
from ..config import TaskName
from .scores import Calibration, Proportion, Score, Temperature

BENCH_SCHEMA_VERSION = 1


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


class Int8Search(Result):
    """The search for one target."""

    target: str
    file: str | None
    """What ships, a path inside the run folder; None where nothing held the budget."""
    max_drop: float
    role: str
    """On which images accuracy was measured: ``val``, or ``train`` where there are none of these."""
    n: int
    fp32_score: float
    p50_fp32: float | None = None
    tried: list[Candidate]
    worst: list[tuple[str, float]] = []
    """Where float islands were tried: the roundings that cost most, with the signal-to-noise ratio of the
    logits when each is alone, decibels."""
    float_parts: list[FloatNode] = []
    test_score: Score | None = None
    """Of the file that ships, on the test images."""
    not_timed: str | None = None
    """Why it cannot be timed on this machine."""
    slow: str | None = None
    """Where int8 is not faster than fp32: why, and which students would be."""


class Recovery(Result):
    """Quantization-aware training; its file is one of the candidates of the int8 search."""

    epochs: int
    fake_val: float | None
    """Of the fake-quantized network in torch, on val; percent."""
    fake_test: float | None
    file: str
    """The float graph with the weights it learned."""


class ShownWord(Result):
    """A word as the pieces of images that are nearest to it."""

    rank: int
    """Its place among all words, the most used first, from 1."""
    share: float
    """Percent of the features whose nearest word it is."""
    patches: list[str]
    """The nearest first, each of another image; base64 of a PNG."""


class Words(Result):
    """QuEST's vocabulary of one teacher."""

    teacher: str
    words: int
    requested: int
    features: int
    features_used: int
    perplexity: float
    mu: float
    level: str = "map"
    note: str | None = None
    top: int | None = None
    """m, the words of p_T that a store keeps at each position."""
    lost_mass: float | None = None
    """The share of p_T that it loses with the others, on average."""
    usage: list[tuple[int, int]] = []
    """(rank, features whose nearest word it is) at some of the ranks, the most used word first."""
    dead: int | None = None
    """Words that are no feature's nearest."""
    shown: list[ShownWord] = []
    """Some, spread over the ranks; of the first vocabulary alone."""
    patch: int | None = None
    """Side of the patches in pixels of the teacher's input."""
    seen: int | None = None
    """Images that patches were looked for in."""


SCHEMA_VERSION = 2


class Subject(Result):
    """One network as a file: what is known of it."""

    name: str
    """timm's name, e.g. ``mobilenetv2_100``."""
    weights: str
    """Where its weights started: ``pretrained``, ``scratch`` or the name and hash of a file."""
    parameters: int | None = None
    gmacs: float | None = None
    score: Score | None = None
    """On the test images."""
    val_score: Score | None = None
    """Of the weights in torch on the val images, before export."""
    agreement: Proportion | None = None
    """Of test images with the teacher's prediction, which ``correct`` counts."""
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
    """For a teacher: ``kept``, ``replaced`` or ``none``."""
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
    per_class: dict[str, dict[str, int]]
    """role -> class -> number of images."""
    skipped: list[tuple[str, str]] = []
    """(name, reason) of each image that could not be read."""
    duplicates: list[list[str]] = []
    """Groups of identical images across given folders or classes, by name."""
    fingerprint: str
    task: TaskName = "classification"


class Round(Result):
    """One of the students of ``--rounds``; see ``pipeline/config/stages.py``."""

    round: int
    teacher: str
    """Whom it learned from: the teacher's name, or the round before."""
    seed: int
    score: Score | None = None
    """Of its weights in torch, fp32, on the test images."""
    val_score: Score | None = None
    file: str
    """Its weights, a path inside the run folder."""


class Reconstruction(Result):
    """FEED: how far the student's translated map is from a teacher's, in a training's last epoch."""

    stage: str
    teacher: str
    error: float
    """L1 between the maps scaled to length 1, over √n: 0 is the same direction, about 1.1 a random one."""
    first: float
    """The same in the first epoch."""


class Hashes(Result):
    """The hashes of one teacher's vector; see ``pipeline/methods/mimic.py``."""

    teacher: str
    hashes: int
    std: float
    bias: str


class BalancedWeight(Result):
    """What ``--balance auto`` found and did; see ``pipeline/methods/gradient_balance.py``."""

    method: str
    pull: float
    """Gradient of the method's weighted loss over that of the cross-entropy, on the student's last map."""
    least: float
    most: float
    """Between which pulls the method was seen to do good."""
    factor: float
    """What the weight was multiplied by; 1 where the pull lies between them."""


class TeacherCacheUse(Result):
    """The cached teacher outputs that the student learned from."""

    views: int
    """Fixed views of each image."""
    complete: bool
    """Whether these are all the different views there are."""
    bytes_per_view: int
    lost_mass: float | None = None
    """QuEST: the share of p_T that they lose, on average; the largest of the views'."""
    computed: int
    """Views whose outputs were computed by this run; all others were cached."""


class Epoch(Result):
    """One line of `metrics.jsonl`."""

    stage: str
    epoch: int
    epochs: int
    images_per_second: float
    learning_rate: float
    losses: dict[str, float]
    """Means over the epoch of each weighted loss, and ``loss``, their sum."""
    watched: dict[str, float] = {}
    """What the methods watch: QuEST's perplexity, mean max p_T, word accuracy, gamma."""
    train_accuracy: float | None = None
    """None if the score is not a proportion of images."""
    val_accuracy: float | None = None
    """The task's score, percent."""
    seconds: float | None = None
    """Of training, without the val role's evaluation."""
    shares: dict[str, float] = {}
    """Share of the steps' time in each phase: ``data``, ``teacher``, ``student``; together 1."""
    peak_memory_bytes: int | None = None
    """A GPU's tensors at most since this training began here; on a CPU, the process since its start."""
    mfu: float | None = None
    """Share, 0 to 1, of the device's peak that the networks' own arithmetic takes; see ``mfu.py``."""


class Example(Result):
    """A test image with the predictions of the teacher and the exported student."""

    name: str
    label: str
    teacher: str | None = None
    """None if no teacher has a head."""
    teacher_probability: float | None = None
    student: str
    student_probability: float
    png: str
    """The image as the student sees it, base64 of a PNG."""


class StageTime(Result):
    stage: str
    seconds: float
    summary: str
    """The line the terminal showed."""


class Report(Result):
    """Everything a run knows; `report.html` and `report.md` show the same."""

    schema_version: int = SCHEMA_VERSION
    title: str
    command: str
    method: str
    """As named on the command line, e.g. ``quest`` or ``none``."""
    method_parameters: dict[str, Any] = {}
    method_source: str | None = None
    """The papers of the methods."""
    recipe: str | None = None
    image_size: int
    """Side of the student's input in pixels."""
    teacher_image_size: int | None = None
    data: DataSummary | None = None
    teachers: list[Subject] = []
    teacher: Subject | None = None
    """The one teacher, or the ensemble of several."""
    student: Subject | None = None
    student_int8: Subject | None = None
    words: list[Words] = []
    reconstruction: list[Reconstruction] = []
    rounds: list[Round] = []
    hashes: list[Hashes] = []
    balance: list[BalancedWeight] = []
    teacher_cache: TeacherCacheUse | None = None
    temperature: Temperature | None = None
    int8: list[Int8Search] = []
    """The search for each target; the first one's file is ``student_int8``."""
    recovery: Recovery | None = None
    bench: Bench | None = None
    """How latency was measured, and all that was; None of runs that are older."""
    epochs: list[Epoch] = []
    examples: list[Example] = []
    confusion: list[list[int]] | None = None
    """Rows: true class; columns: class predicted by the exported file; test images."""
    warnings: list[str] = []
    stages: list[StageTime] = []
    environment: dict[str, str] = {}
    config: dict[str, Any] = {}
    """Every option, resolved."""
    artifact: str | None = None
    """Path of the folder that ships, inside the run folder."""
    checksum: str | None = None
    """SHA-256 of all the rest as canonical JSON; None of older versions."""
