"""The contract of a task: everything that depends on the kind of labels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
from numpy import ndarray
from torch import Tensor

from ...export.runtime import Preprocessing
from ..config import TaskName
from ..data.dataset import Image
from ..evaluation import calibration
from ..evaluation.calibration import Likelihood
from ..evaluation.comparison import mcnemar, paired_interval
from ..runs.scores import Calibration, ClassMeasure, Confusion, Prediction, Proportion, Score

Names = Sequence[str]
LabelLoss = Callable[[Tensor, Tensor], Tensor]
"""The loss of (feature, labels) of a training batch, the mean over its images with labels, 0 without any."""
CHUNK = 1 << 22
"""Logits that are decoded at once, in float64."""
Thresholds = ndarray | None
"""Parameters of decoding, float64 [classes]; None for a task that has none, or for its default."""


def split_rows(logits: ndarray) -> list[slice]:
    """Return the rows of logits [n,...] in parts of at most ``CHUNK`` numbers, or single rows."""
    rows = max(1, CHUNK // max(1, logits[:1].size))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def compute_labeled_loss(loss: LabelLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the first logits, which have labels, in fp32; 0 without labels."""
    labeled = logits[: len(labels)].float()
    return loss(labeled, labels) if len(labels) else labeled.sum()


@dataclass(frozen=True)
class Chance:
    """The score of guessing in percent, and its meaning."""

    percent: float
    meaning: str


@dataclass(frozen=True)
class PairedTest:
    """A test of two files on the same images: its p, and True if the loss may be chance."""

    p: float | None
    may_be_chance: bool


@dataclass(frozen=True)
class Outputs:
    """A network's logits on images, and their labels as its classes."""

    logits: ndarray
    labels: ndarray
    thresholds: Thresholds = None


@dataclass(frozen=True)
class Difference:
    """The first of two networks minus the second in points, and the p of a paired test."""

    points: float
    p: float
    low: float
    high: float
    """95 % interval of ``points``."""
    first_alone: int | None = None
    second_alone: int | None = None
    """Number of images that only this one predicts correctly, if these are tested."""


class Task(ABC):
    """One kind of labels; a subclass overrides what differs.

    ``logits`` are float32 [n,classes], or the form of outputs that the task defines. ``labels`` are as
    ``data.decode.ReadableImages.targets`` returns them.
    """

    name: ClassVar[TaskName]
    metric: ClassVar[str]
    class_metric: ClassVar[str]
    """Names of the score and of a class's score."""
    manifest_key: ClassVar[str]
    """Name of the score in ``manifest_entry``."""
    likelihood: ClassVar[Likelihood | None]
    """Model of the probabilities, from which calibration and ensembles follow; None if there is none."""
    loss_read: ClassVar[str] = "logits"
    """Feature of the network that the loss on labels is computed from."""
    default_balance: ClassVar[Literal["auto", "off"]]
    """``--balance`` without the option."""
    unsupported: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Options that do not apply to the task, with the reason."""
    needs_label_loss: ClassVar[str | None] = None
    """Why the weight of the loss on labels cannot be 0; None if it can."""
    has_thresholds: ClassVar[bool] = False
    """True if predictions depend on thresholds, which are chosen on validation images."""
    has_boxes: ClassVar[bool] = False
    """True if labels are the boxes of objects."""
    accepts: ClassVar[tuple[TaskName, ...]] = ()
    """Other tasks of data sets whose labels a network of this task can be evaluated on."""
    labels_note: ClassVar[str] = ""
    """Continues "10 classes"."""
    prediction_note: ClassVar[str] = ""
    """A sentence on what counts as a correct prediction and what its probability means."""
    picture_note: ClassVar[str] = ""
    """A sentence on what ``draw`` shows."""
    errors_order: ClassVar[str] = "the most confident first"
    """Order of wrong predictions by ``severity``."""
    counted: ClassVar[str] = "images"
    """Unit of ``measure_classes``."""
    test_name: ClassVar[str] = "McNemar’s exact test"
    """Test of ``compare``."""
    example_side: ClassVar[int] = 128
    """Pixels of an example's longer side as shown."""

    # Model card.

    pipeline_tag: ClassVar[str] = "image-classification"
    """Task on the Hugging Face Hub."""
    model_kind: ClassVar[str] = "Image classifier"
    usage: ClassVar[str] = """\
from predict import Classifier

classifier = Classifier.load(".")
for label, probability in classifier.predict(["photo.jpg"])[0].top:
    print(label, probability)"""
    """Python program that uses the artifact from its folder."""
    camera_usage: ClassVar[str] = """\
import cv2
from predict import Classifier

classifier = Classifier.load(".")
_, frame = cv2.VideoCapture(0).read()
[prediction] = classifier.predict(frame[:, :, ::-1])
print(prediction.label, prediction.probability)"""
    """Python program that uses the artifact with a camera."""

    @abstractmethod
    def label_loss(self, smoothing: float) -> LabelLoss:
        """Return the loss on labels in training."""

    @abstractmethod
    def guessing_loss(self, classes: int) -> float:
        """Return the label loss of equal probabilities; infinite if it is not a sign of a failed training."""

    def main_labels(self, labels: Tensor) -> Tensor:
        """Return the labels of a training batch for methods: those of mixed views in the form of others."""
        return labels

    def count_correct(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return the number of correct images in a batch; None if the score is not a proportion of images."""
        return None

    # Labels and predictions.

    @abstractmethod
    def encode(
        self, images: Sequence[Image], numbers: Sequence[int], classes: int, preprocessing: Preprocessing
    ) -> ndarray:
        """Return images' labels as an array, for a network with other class numbers.

        Args:
            numbers: the network's number of each class of the images; −1 if it has no such class.
            classes: number of classes of the network.
            preprocessing: that of the network.
        """

    def drop_unknown(self, images: Sequence[Image], unknown: set[int]) -> tuple[Image, ...]:
        """Return the images that a network without some of their classes can be evaluated on."""
        return tuple(images)

    def default_thresholds(self, classes: int) -> Thresholds:
        """Return the thresholds to decode with if none were chosen."""
        return None

    def choose_thresholds(self, logits: ndarray, labels: ndarray) -> Thresholds:
        """Return the thresholds that suit validation images best."""
        return None

    @abstractmethod
    def predict(self, logits: ndarray, thresholds: Thresholds = None) -> ndarray:
        """Return predictions in the form of labels."""

    @abstractmethod
    def confidence(self, logits: ndarray, thresholds: Thresholds = None) -> ndarray:
        """Return the probability of each prediction, 0 to 1, [n]."""

    @abstractmethod
    def describe(self, labels: ndarray, classes: Names) -> list[str]:
        """Return each image's labels, or predictions, as text."""

    def decode(
        self, logits: ndarray, classes: Names, thresholds: Thresholds = None
    ) -> list[tuple[str, float]]:
        """Return each image's prediction as text, with its probability."""
        labels = self.describe(self.predict(logits, thresholds), classes)
        return list(zip(labels, self.confidence(logits, thresholds).tolist(), strict=True))

    def reorder(self, logits: ndarray, classes: Sequence[int]) -> ndarray:
        """Return logits whose class number i is class ``classes[i]``."""
        return logits[:, classes]

    def ensemble(self, logits: Sequence[ndarray]) -> ndarray:
        """Return logits whose probabilities are the mean of several networks' probabilities."""
        assert self.likelihood is not None
        return self.likelihood.ensemble(logits)

    def draw(self, pixels: ndarray, labels: ndarray, logits: ndarray, classes: Names) -> ndarray:
        """Return an example image, uint8 [H,W,3], with what its label and prediction locate in it."""
        return pixels

    def judge(self, outputs: Outputs, classes: Names) -> list[Prediction]:
        """Return each image's prediction as text, its probability, and how wrong it is."""
        judged: list[Prediction] = []
        for part in split_rows(outputs.logits):
            logits, labels = outputs.logits[part], outputs.labels[part]
            decoded = self.decode(logits, classes, outputs.thresholds)
            severity = self.severity(logits, labels, outputs.thresholds).tolist()
            judged += [Prediction(*row, wrong) for row, wrong in zip(decoded, severity, strict=True)]
        return judged

    # Scores.

    def measure_calibration(
        self, logits: ndarray, labels: ndarray, temperature: float | None = None
    ) -> Calibration | None:
        """Measure the calibration of logits, see ``calibration.measure``; None without a likelihood."""
        if self.likelihood is None:
            return None
        return calibration.measure(logits, labels, self.likelihood, temperature)

    def percent(self, logits: ndarray, labels: ndarray) -> float:
        """Return the score alone, in percent."""
        return self.score(logits, labels).percent

    @abstractmethod
    def score(
        self, logits: ndarray, labels: ndarray, classes: Names = (), thresholds: Thresholds = None
    ) -> Score:
        """Return the score with its interval and details, n > 0; of each class too if they are named."""

    @abstractmethod
    def manifest_entry(self, score: Score) -> dict[str, Any]:
        """Return a score as ``accuracy`` of a file in ``manifest.json``."""

    @abstractmethod
    def count_classes(
        self, logits: ndarray, labels: ndarray, classes: int, thresholds: Thresholds = None
    ) -> tuple[ndarray, ...]:
        """Return the number of images that show each class, that are predicted to, and both."""

    def measure_classes(
        self, logits: ndarray, labels: ndarray, classes: Names, thresholds: Thresholds = None
    ) -> list[ClassMeasure]:
        """Return recall, precision and F1 of each class."""
        counts = self.count_classes(logits, labels, len(classes), thresholds)
        rows = zip(classes, *(count.tolist() for count in counts), strict=True)
        return [ClassMeasure.from_counts(*row) for row in rows]

    def confusion(self, logits: ndarray, labels: ndarray) -> Confusion | None:
        """Return the confusion matrix without its zeros; None if images have no single class."""
        return None

    @abstractmethod
    def chance(self, labels: ndarray) -> Chance:
        """Return the score of guessing."""

    def is_near_chance(self, score: Score, labels: ndarray) -> bool:
        """Return True if a score is not clearly better than guessing.

        That is less than 1.5 times chance, or less than halfway from chance to 100 % if this is lower; or an
        interval that reaches chance.
        """
        chance = self.chance(labels).percent
        return score.percent < min(1.5 * chance, (100 + chance) / 2) or score.low <= chance

    # Comparison of networks.

    def is_correct(self, logits: ndarray, labels: ndarray, thresholds: Thresholds = None) -> ndarray:
        """Return whether each image's prediction is exactly its labels, bool [n]."""
        return np.asarray((self.predict(logits, thresholds) == labels).reshape(len(labels), -1).all(1))

    def severity(self, logits: ndarray, labels: ndarray, thresholds: Thresholds = None) -> ndarray:
        """Return how wrong each prediction is, float [n]; 0 if it is correct."""
        confidence = np.maximum(self.confidence(logits, thresholds), np.finfo(np.float64).tiny)
        return np.where(self.is_correct(logits, labels, thresholds), 0.0, confidence)

    def is_same(self, first: Outputs, second: Outputs) -> ndarray:
        """Return whether two networks with the same classes have the same prediction, bool [n]."""
        return self.is_correct(first.logits, self.predict(second.logits, second.thresholds), first.thresholds)

    def agreement(self, first: Outputs, second: Outputs) -> Proportion:
        """Return the proportion of images with the same prediction by two networks."""
        same = self.is_same(first, second)
        return Proportion.from_counts(int(same.sum()), len(same))

    def compare(self, first: Outputs, second: Outputs) -> Difference:
        """Compare two networks on the same images by McNemar's exact test of correct predictions."""
        a, b = (self.is_correct(o.logits, o.labels, o.thresholds) for o in (first, second))
        only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
        points = 100 * (only_first - only_second) / len(a)
        low, high = paired_interval(only_first, only_second, len(a))
        return Difference(points, mcnemar(only_first, only_second), low, high, only_first, only_second)

    def fidelity(self, fp32: ndarray, int8: ndarray) -> float:
        """Return the signal-to-quantization-noise ratio of int8 logits in decibels; inf without noise."""
        noise = float(np.square(int8.astype(np.float64) - fp32).sum())
        power = float(np.square(fp32, dtype=np.float64).sum())
        return 10 * float(np.log10(power / noise)) if noise and power else float("inf")

    def paired_test(self, fp32: ndarray, int8: ndarray, labels: ndarray) -> PairedTest:
        """Test whether the int8 logits are worse than the fp32 ones; a task without a test has no p."""
        return PairedTest(None, may_be_chance=False)
