"""The contract of a task: everything that depends on the kind of labels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from ..data.dataset import Image
from ..evaluation.likelihood import Likelihood
from ..evaluation.results import ClassMeasure
from ..runs.results import Subject
from ..runs.scores import Proportion, Score, TaskName

Thresholds = np.ndarray | None
"""Parameters of decoding, float64 [classes]; None for a task that has none, or for its default."""


def thresholds_of(subject: Subject) -> Thresholds:
    """Return the thresholds that a network was scored at."""
    classes = subject.score.classes if subject.score is not None else []
    known = [one.threshold for one in classes if one.threshold is not None]
    return np.array(known) if known else None


@dataclass(frozen=True)
class Chance:
    """The score of a network that has learned nothing, in percent, and what that is."""

    percent: float
    meaning: str


@dataclass(frozen=True)
class PairedTest:
    """p of the paired test of two files, None without one; True if the loss may be chance."""

    p: float | None
    may_be_chance: bool


class Task(ABC):
    """One kind of labels.

    Arrays: ``logits`` float32 [n,classes] and ``labels`` as ``data.decode.Readable.targets`` returns them.
    """

    name: ClassVar[TaskName]
    metric: ClassVar[str]
    """Name of the score."""
    class_metric: ClassVar[str]
    """Name of a class's score."""
    likelihood: ClassVar[Likelihood]
    """Of its probabilities: calibration and ensembles follow from it."""
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
    def encode(self, labels: Sequence[Sequence[int]], classes: int) -> np.ndarray:
        """Return images' class numbers as an array of labels."""

    @abstractmethod
    def drop_unknown(self, images: Sequence[Image], unknown: set[int]) -> tuple[Image, ...]:
        """Return the images that can be evaluated by a network that lacks some of their classes."""

    @abstractmethod
    def label_loss(self, smoothing: float) -> nn.Module:
        """Return the loss of (logits [B,N], labels), the mean over the batch."""

    @abstractmethod
    def count_correct(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return the number of correct images in a batch; None if the score is not a proportion of images."""

    @abstractmethod
    def percent(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """Return the score alone, in percent."""

    @abstractmethod
    def score(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str] = (),
        thresholds: Thresholds = None,
    ) -> Score:
        """Return the score with its interval and details, n > 0; of each class too if they are named."""

    @abstractmethod
    def chance(self, labels: np.ndarray) -> Chance:
        """Return the score of guessing."""

    @abstractmethod
    def paired_test(self, fp32: np.ndarray, int8: np.ndarray, labels: np.ndarray) -> PairedTest:
        """Test whether the int8 logits are worse than the fp32 ones on the same images."""

    def default_thresholds(self, classes: int) -> Thresholds:
        """Return the thresholds to decode with if none were chosen."""
        return None

    @abstractmethod
    def choose_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> Thresholds:
        """Return the thresholds that suit validation images best."""

    @abstractmethod
    def predict(self, logits: np.ndarray, thresholds: Thresholds = None) -> np.ndarray:
        """Return predictions in the form of labels, [n,…]."""

    @abstractmethod
    def describe(self, labels: np.ndarray, classes: Sequence[str]) -> list[str]:
        """Return each image's labels, or predictions, as text."""

    @abstractmethod
    def confidence(self, logits: np.ndarray, thresholds: Thresholds = None) -> np.ndarray:
        """Return the probability of each prediction, 0 to 1, [n]."""

    @abstractmethod
    def count_classes(
        self, predictions: np.ndarray, labels: np.ndarray, classes: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the number of images that show each class, are predicted to, and both."""

    @abstractmethod
    def confusion(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """Return image counts [true class, predicted class]; None if images have no single class."""

    @abstractmethod
    def manifest_entry(self, score: Score) -> dict[str, Any]:
        """Return ``accuracy`` of a file in ``manifest.json``."""

    def is_correct(
        self, logits: np.ndarray, labels: np.ndarray, thresholds: Thresholds = None
    ) -> np.ndarray:
        """Return whether each image's prediction is exactly its labels, bool [n]."""
        return _equal(self.predict(logits, thresholds), labels)

    def agreement(
        self,
        logits: np.ndarray,
        others: np.ndarray,
        thresholds: Thresholds = None,
        other_thresholds: Thresholds = None,
    ) -> Proportion:
        """Return the proportion of images with the same prediction by two networks."""
        same = _equal(self.predict(logits, thresholds), self.predict(others, other_thresholds))
        return Proportion.from_counts(int(same.sum()), len(same))

    def decode(
        self, logits: np.ndarray, classes: Sequence[str], thresholds: Thresholds = None
    ) -> list[tuple[str, float]]:
        """Return each image's prediction as text, with its probability."""
        predictions = self.describe(self.predict(logits, thresholds), classes)
        return list(zip(predictions, self.confidence(logits, thresholds).tolist(), strict=True))

    def measure_classes(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        thresholds: Thresholds = None,
    ) -> list[ClassMeasure]:
        """Return recall, precision and F1 of each class."""
        counts = self.count_classes(self.predict(logits, thresholds), labels, len(classes))
        return [
            ClassMeasure.from_counts(name, n=n, answered=answered, correct=correct)
            for name, n, answered, correct in zip(classes, *(c.tolist() for c in counts), strict=True)
        ]

    def is_near_chance(self, score: Score, labels: np.ndarray) -> bool:
        """Return True if a score is not clearly better than guessing.

        That is less than 1.5 times chance, or less than halfway from chance to 100 % if this is lower; or an
        interval that reaches chance.
        """
        chance = self.chance(labels).percent
        return score.percent < min(1.5 * chance, (100 + chance) / 2) or score.low <= chance


def _equal(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    same: np.ndarray = (first == second).reshape(len(first), -1).all(1)
    return same
