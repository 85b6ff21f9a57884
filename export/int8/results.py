"""Results of the int8 search, as `report.json` contains them."""

from __future__ import annotations

from pydantic import ConfigDict

from ..latency.results import Speedup
from ..results import Result


class Verdict(Result):
    """The accuracy of a candidate's file compared with the fp32 file."""

    score: float
    """Percent, higher is better."""
    lost: float
    """Points lost to the fp32 file; negative if it is better."""
    holds: bool
    """True if the loss is within the budget."""
    sqnr: float
    """Signal to quantization noise of the logits, decibels."""
    p: float | None = None
    """McNemar's exact test against the fp32 file; None without a paired test."""


class Candidate(Verdict):
    """One way to quantize a network, and the result."""

    name: str
    calibration: str
    equalized: bool
    bias_corrected: bool
    kept_float: tuple[str, ...]
    """Nodes that stay float for the sake of accuracy."""
    bytes: int
    ships: bool = False
    p50: float | None = None
    """Median milliseconds of one image on one thread; None if it was not measured."""
    speedup: Speedup | None = None
    """Over the fp32 file, measured in the same rounds."""

    @property
    def rank(self) -> tuple[bool, float, int, float]:
        """Sort key; the largest is the best."""
        return self.holds, self.score, -len(self.kept_float), self.sqnr


class FloatNode(Result):
    """A node that runs in float: name and operator as in the file, and the reason."""

    model_config = ConfigDict(frozen=True)

    name: str
    op_type: str
    why: str
