"""What the search for int8 found, for the report."""

from .runs.scores import Result, Score, Speedup


class TriedInt8(Result):
    """One candidate: how it was made, and what its file gave."""

    name: str
    calibration: str
    equalised: bool
    bias_corrected: bool
    kept_float: list[str]
    """Nodes that stay float for accuracy's sake."""
    score: float
    """Top-1, or mAP where images have several labels; percent."""
    lost: float
    """Points lost to the fp32 file; negative where it is better."""
    p: float | None = None
    """McNemar's exact test against the fp32 file; None where images have several labels."""
    sqnr: float
    """Of its logits against the fp32 file's, decibels."""
    holds: bool
    """Whether the loss is within the budget."""
    ships: bool
    bytes: int
    p50: float | None = None
    """Median milliseconds of one image on one thread; None where it was not timed."""
    speedup: Speedup | None = None
    """Over the fp32 file, timed in the same rounds."""


class FloatPart(Result):
    """A node of the optimised graph that still computes in float."""

    name: str
    op_type: str
    why: str


class Int8Search(Result):
    """The search for one target."""

    target: str
    file: str | None
    """What ships, a path inside the run folder; None where nothing held the budget."""
    max_drop: float
    role: str
    """On which images accuracy was measured: ``select``, or ``train`` where there are none of these."""
    n: int
    fp32_score: float
    p50_fp32: float | None = None
    tried: list[TriedInt8]
    worst: list[tuple[str, float]] = []
    """Where float islands were tried: the roundings that cost most, with the signal-to-noise ratio of the
    logits when each is alone, decibels."""
    float_parts: list[FloatPart] = []
    accuracy: Score | None = None
    """Of the file that ships, on the test role."""
    not_timed: str | None = None
    """Why it cannot be timed on this machine."""
    slow: str | None = None
    """Where int8 is not faster than fp32: why, and which students would be."""


class Recovery(Result):
    """Quantization-aware training; what its file gives is told by the search, whose candidate it is."""

    epochs: int
    fake_select: float | None
    """Of the fake-quantized network in torch, on select; percent."""
    fake_test: float | None
    file: str
    """The float graph with the weights it learned."""
