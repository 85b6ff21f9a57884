"""How good and how fast a network is: accuracy, scores of several labels, calibration, speed-ups; parts of
the report as data.
"""

from math import sqrt
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    # A loss that is not finite is the text "NaN" or "Infinity" in JSON, which reads back as the number.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", use_attribute_docstrings=True)


class Accuracy(Result):
    """Top-1 accuracy in percent on ``n`` images with its 95 % Wilson interval."""

    top1: float
    n: int
    low: float
    high: float
    correct: int
    balanced: float | None = None
    """Mean of the per-class accuracies, where the classes are uneven."""
    top5: float | None = None

    @property
    def percent(self) -> float:
        return self.top1

    @property
    def told(self) -> str:
        return f"{self.top1:.2f} %"

    @classmethod
    def of(
        cls, correct: int, n: int, *, balanced: float | None = None, top5: float | None = None
    ) -> "Accuracy":
        """Wilson's score interval (Wilson 1927) at 95 % for ``correct`` of ``n`` (n > 0)."""
        z = 1.959963984540054
        p = correct / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        # At the ends the interval reaches 0 and 1 exactly, which rounding misses.
        low, high = centre - half if correct else 0.0, centre + half if correct < n else 1.0
        return cls(
            top1=100 * p,
            n=n,
            low=100 * low,
            high=100 * high,
            correct=correct,
            balanced=balanced,
            top5=top5,
        )


class Speedup(Result):
    """How many times faster than ``over``: ratio of medians with a 95 % paired bootstrap interval."""

    over: str
    threads: int
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["faster", "no difference", "slower"]:
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"


class ClassScore(Result):
    """One class of a multi-label set on the test images, of which ``n`` show it; percent."""

    label: str
    n: int
    average_precision: float | None
    """None where no image shows the class."""
    f1: float | None
    """At ``threshold``; None where the class is neither shown nor answered."""
    threshold: float


class MultiLabelScore(Result):
    """Mean average precision in percent on ``n`` images that may have several labels, with its 95 % bootstrap
    interval over images; see ``multi_label.py``.
    """

    map: float
    n: int
    low: float
    high: float
    micro_f1: float
    """Of all answers together, at each class's threshold."""
    macro_f1: float
    """The mean over the classes."""
    classes: list[ClassScore] = []

    @property
    def percent(self) -> float:
        return self.map

    @property
    def told(self) -> str:
        return f"mAP {self.map:.2f} %"


Score = Accuracy | MultiLabelScore


class ReliabilityBin(Result):
    """Answers whose confidence lies in (low, high], all in percent; what an empty bin lacks is None."""

    low: float
    high: float
    n: int
    confidence: float | None = None
    accuracy: float | None = None


class Calibration(Result):
    """How honest a network's probabilities are on ``n`` test images; see ``docs/calibration.md``.

    Confidence, accuracy, their gap and the ECE are percentages, entropy and NLL are nats. With several labels
    an image, each class of each image counts as an answer of its own, and confidence is its probability.
    """

    ece: float
    """Expected calibration error: Σ over the bins of their share times |accuracy − mean confidence|."""
    ece_low: float
    ece_high: float
    """95 % interval; ``ece_low`` is 0 where an honest network would often show as large an ECE."""
    confidence: float
    """What the network says it is right, on average."""
    accuracy: float
    """How often it is."""
    gap_low: float
    gap_high: float
    """95 % interval of ``confidence`` minus ``accuracy``: above 0, over-confident."""
    entropy: float
    nll: float
    n: int
    multilabel: bool = False
    bins: list[ReliabilityBin]
    temperature: float | None = None
    """What the file's logits were divided by at export."""
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


class ClassResult(Result):
    label: str
    n: int
    correct: int
