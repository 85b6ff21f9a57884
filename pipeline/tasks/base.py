"""The contract of a task: everything that depends on the kind of labels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from numpy import ndarray
from torch import Tensor, nn

from ..config import TaskName
from ..data.dataset import Image
from ..evaluation.calibration import Likelihood
from ..runs.scores import ClassMeasure, Confusion, Proportion, Score

Names = Sequence[str]
CHUNK = 4096
"""Images that are decoded at once, in float64."""
Thresholds = ndarray | None
"""Parameters of decoding, float64 [classes]; None for a task that has none, or for its default."""


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


class Task(ABC):
    """One kind of labels; a subclass overrides what differs.

    ``logits`` are float32 [n,classes], ``labels`` as ``data.decode.ReadableImages.targets`` returns them.
    """

    name: ClassVar[TaskName]
    metric: ClassVar[str]
    class_metric: ClassVar[str]
    """Names of the score and of a class's score."""
    likelihood: ClassVar[Likelihood]
    """Model of the probabilities; calibration and ensembles follow from it."""
    default_balance: ClassVar[Literal["auto", "off"]]
    """``--balance`` without the option."""
    has_thresholds: ClassVar[bool] = False
    """True if predictions depend on thresholds, which are chosen on validation images."""
    accepts: ClassVar[frozenset[TaskName]]
    """Tasks of data sets whose labels a network of this task can be evaluated on."""
    labels_note: ClassVar[str] = ""
    """Continues "10 classes"."""
    prediction_note: ClassVar[str] = ""
    """A sentence on what counts as a correct prediction and what its probability means."""

    @abstractmethod
    def label_loss(self, smoothing: float) -> nn.Module:
        """Return the loss of (logits [B,N], labels), the mean over the batch."""

    @abstractmethod
    def guessing_loss(self, classes: int) -> float:
        """Return the label loss of equal probabilities."""

    def count_correct(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return the number of correct images in a batch; None if the score is not a proportion of images."""
        return None

    # Labels and predictions.

    @abstractmethod
    def encode(self, labels: Sequence[Sequence[int]], classes: int) -> ndarray:
        """Return images' class numbers as an array of labels."""

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
        decoded: list[tuple[str, float]] = []
        for start in range(0, len(logits), CHUNK):
            part = logits[start : start + CHUNK]
            labels = self.describe(self.predict(part, thresholds), classes)
            decoded += zip(labels, self.confidence(part, thresholds).tolist(), strict=True)
        return decoded

    # Scores.

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
    def count_classes(self, predictions: ndarray, labels: ndarray, classes: int) -> tuple[ndarray, ...]:
        """Return the number of images that show each class, that are predicted to, and both."""

    def measure_classes(
        self, logits: ndarray, labels: ndarray, classes: Names, thresholds: Thresholds = None
    ) -> list[ClassMeasure]:
        """Return recall, precision and F1 of each class."""
        counts = self.count_classes(self.predict(logits, thresholds), labels, len(classes))
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
        return (self.predict(logits, thresholds) == labels).reshape(len(labels), -1).all(1)

    def agreement(
        self,
        logits: ndarray,
        others: ndarray,
        thresholds: Thresholds = None,
        other_thresholds: Thresholds = None,
    ) -> Proportion:
        """Return the proportion of images with the same prediction by two networks."""
        same = self.is_correct(logits, self.predict(others, other_thresholds), thresholds)
        return Proportion.from_counts(int(same.sum()), len(same))

    def paired_test(self, fp32: ndarray, int8: ndarray, labels: ndarray) -> PairedTest:
        """Test whether the int8 logits are worse than the fp32 ones; a task without a test has no p."""
        return PairedTest(None, may_be_chance=False)
