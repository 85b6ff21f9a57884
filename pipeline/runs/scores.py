"""How accurate, well calibrated and fast a network is: parts of the report as data."""

from math import sqrt
from typing import Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ...export.results import Result


class Proportion(Result, allow_inf_nan=False):
    """``correct`` of ``n`` in percent, with its 95 % Wilson interval."""

    percent: float
    low: float
    high: float
    n: int
    correct: int

    @classmethod
    def from_counts(cls, correct: int, n: int) -> Self:
        """Compute Wilson's score interval (Wilson 1927) at 95 % for ``correct`` of ``n`` > 0."""
        z = 1.959963984540054
        p = correct / n
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        # Rounding would miss the ends, where the interval reaches 0 and 1 exactly.
        low, high = center - half if correct else 0.0, center + half if correct < n else 1.0
        return cls(percent=100 * p, low=100 * low, high=100 * high, n=n, correct=correct)


class Prediction(NamedTuple):
    """The predicted label of an image as text, its probability, and how wrong it is: 0 if it is correct."""

    label: str
    probability: float
    severity: float

    @property
    def is_correct(self) -> bool:
        return self.severity == 0


Confusion = list[tuple[NonNegativeInt, NonNegativeInt, PositiveInt]]
"""(true class, predicted class, number of images) for each pair of classes with images, in their order."""


class Measure(Result, allow_inf_nan=False):
    """A further metric in percent, with its 95 % interval if one was computed."""

    percent: float
    low: float | None = None
    high: float | None = None


class ClassScore(Result, allow_inf_nan=False):
    """The score of one class, which ``n`` of the test images show; percent."""

    label: str
    n: int
    percent: float | None
    """Accuracy, or average precision; None if no image shows the class."""
    f1: float | None = None
    """At ``threshold``; None if the class is neither shown nor predicted."""
    threshold: float | None = None
    """The probability from which the class is predicted, for multi-label data."""


class Score(Result, allow_inf_nan=False):
    """A network's score in percent on ``n`` images, with its 95 % interval."""

    metric: str
    """``accuracy`` (Wilson interval), ``mAP`` or ``AP`` (bootstrap interval over images)."""
    percent: float
    low: float
    high: float
    n: int
    correct: int | None = None
    """Number of correct images, if the score is a proportion of images."""
    details: dict[str, Measure] = {}
    """Further metrics by name, such as balanced accuracy, micro F1 or AP50."""
    classes: list[ClassScore] = []
    precision: dict[str, list[float]] = {}
    """Precision in percent at a recall of 0, 1 … 100 %, by what counts as a detection."""

    @model_validator(mode="after")
    def _check_correct(self) -> Self:
        if self.correct is not None and self.correct > self.n:
            raise ValueError(f"{self.correct} of {self.n} images cannot be correct")
        return self

    @property
    def text(self) -> str:
        return f"{self.metric} {self.percent:.2f} %"


class ReliabilityBin(Result, allow_inf_nan=False):
    """Predictions with a confidence in (low, high], in percent; None in an empty bin."""

    low: float
    high: float
    n: int
    confidence: float | None = None
    accuracy: float | None = Field(None, ge=0, le=100)

    @model_validator(mode="after")
    def _check_means(self) -> Self:
        if self.n and (self.confidence is None or self.accuracy is None):
            raise ValueError("confidence and accuracy are missing")
        return self


class Calibration(Result):
    """Calibration of a network's probabilities on ``n`` test images; see ``docs/calibration.md``.

    Confidence, accuracy, their gap and the ECE are percentages, entropy and NLL are nats. In multi-label data
    each class of each image is a prediction, and confidence is its probability.
    """

    ece: float
    """Expected calibration error: Σ over the bins of their fraction times |accuracy − mean confidence|."""
    ece_low: float
    ece_high: float
    """95 % interval; ``ece_low`` is 0 if a calibrated network would often have as large an ECE."""
    confidence: float
    """Mean confidence."""
    accuracy: float
    """Accuracy of the predictions."""
    gap_low: float
    gap_high: float
    """95 % interval of ``confidence`` minus ``accuracy``: above 0, over-confident."""
    entropy: float
    nll: float
    n: int
    bins: list[ReliabilityBin]
    temperature: float | None = None
    """Divisor of the logits in the exported file."""
    before: "Calibration | None" = None
    """The same file without that division."""


class Temperature(Result):
    """What ``--calibrate`` fitted on ``n`` val images and folded into the exported files."""

    value: float
    low: float | None = None
    high: float | None = None
    """95 % interval; None where the fit has none."""
    n: int
    nll_before: float
    nll_after: float
    """Nats, on these images: at 1 and at ``value``."""
    folded: Literal["last layer", "after the logits"] = "last layer"
    note: str | None = None


class ClassMeasure(Result):
    """One class: ``n`` images show it, ``predicted`` are predicted to show it, and ``correct`` is both."""

    label: str
    n: int
    predicted: int
    correct: int
    recall: Proportion | None = None
    """``correct`` of ``n``; None if no image shows the class."""
    precision: Proportion | None = None
    """``correct`` of ``predicted``; None if the class is never predicted."""
    f1: float | None = None
    """None if the class is neither shown nor predicted."""

    @classmethod
    def from_counts(cls, label: str, n: int, predicted: int, correct: int) -> Self:
        return cls(
            label=label,
            n=n,
            predicted=predicted,
            correct=correct,
            recall=Proportion.from_counts(correct, n) if n else None,
            precision=Proportion.from_counts(correct, predicted) if predicted else None,
            f1=200 * correct / (n + predicted) if n + predicted else None,
        )
