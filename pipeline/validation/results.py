"""What a validation found, as data: what `validation.json` holds, and what `validate(...)` returns.

Accuracies, shares and probabilities of calibration are percentages, those of single answers go from 0 to 1.
"""

from typing import Literal

from ..runs.results import Example
from ..runs.scores import Accuracy, Calibration, MultiLabelScore, Result, Score

VALIDATION_SCHEMA_VERSION = 1

Verdict = Literal["better", "no difference", "worse"]


class ClassMeasure(Result):
    """One class: of its ``n`` images ``correct`` are answered with it, of ``answered`` in all. The intervals
    are Wilson's, 95 %.
    """

    label: str
    n: int
    answered: int
    correct: int
    recall: Accuracy | None = None
    """``correct`` of ``n``; None where there is no image of the class."""
    precision: Accuracy | None = None
    """``correct`` of ``answered``; None where the class is never the answer."""
    f1: float | None = None
    """None where the class is neither shown nor answered."""


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
    accuracy: Accuracy | None = None
    top5: Accuracy | None = None
    """Above ten classes."""
    multi_label: MultiLabelScore | None = None
    """In the place of ``accuracy`` where images have several labels."""
    calibration: Calibration | None = None
    per_class: list[ClassMeasure] = []
    confusion: list[list[int]] | None = None
    """Counts [true class][answer], in the order of ``classes``; None above 100 classes."""
    confused: list[Confused] = []
    """The pairs that are confused most often, 100 at most."""
    mistakes: int = 0
    teacher: str | None = None
    """Name of the network that is its teacher."""
    agreement: Accuracy | None = None
    """How often its answer is the teacher's."""

    @property
    def score(self) -> Score | None:
        return self.accuracy or self.multi_label


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
    """``train``, ``select``, ``test``, or ``all``: the images whatever their role."""
    n: int
    images: str
    """A digest of the images' content and labels: equal ones mean the same images."""
    multi_label: bool = False
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
