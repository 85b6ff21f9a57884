"""Results that are reported as JSON: the base class, and those that belong to no subpackage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """A part of `report.json` or `bench.json`; unknown keys are refused."""

    # A number that is not finite is the string "NaN" or "Infinity" in JSON.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", use_attribute_docstrings=True)


class Parity(Result):
    """Largest difference between the logits of an exported file and of its PyTorch network."""

    max_abs: float
    max_rel: float
    """Relative to the spread (largest minus smallest) of the network's logits."""
    n: int
    """Number of images."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes at which the file was run."""
