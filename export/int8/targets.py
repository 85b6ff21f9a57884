"""Processor families that int8 files are made for, and the types in which each is fast and exact.

- x86: activations uint8, weights int8 of 7 bits. Without VNNI pairs of products are summed in 16 bits, which
  saturate with weights of 8 bits; with 7 they never do, and it costs no time.
- x86-vnni: activations uint8, weights int8. VNNI sums in 32 bits, and u8×s8 is the only pair of types with a
  fast convolution kernel on x86.
- arm64: activations int8, weights int8: what its dot product and its matrix instructions (i8mm) take.

Sources: ONNX Runtime's documentation on quantization (sections on representation, on U8S8 and its saturation,
and on Arm), and `benchmarks/int8/compare.py`. Asymmetric everywhere: only then ReLU and Clip fold into the
range of the tensor before them, and no half of a range is wasted on numbers that a ReLU never returns.

On x86 a first convolution of 3 × 3 stays float unless the input is uint8: over three channels the integer
kernel has little to sum, and float makes MobileNets a few percent faster. One of 7 × 7, as in ResNets, is far
slower in float (`benchmarks/int8/rewriting.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnxruntime.quantization import QuantType

from ..errors import ExportError
from ..runtime import detect_target


@dataclass(frozen=True)
class Target:
    """The types for one family of processors; weights are int8."""

    name: str
    activations: QuantType
    reduce_range: bool
    """True if weights use 7 bits only."""
    float_stem: bool
    """True if a small first convolution is faster in float (see `Prepared.stem`)."""

    @property
    def described(self) -> dict[str, str | bool]:
        """Description for a recipe, JSON-ready."""
        return {
            "activations": f"{'uint8' if self.activations == QuantType.QUInt8 else 'int8'} asymmetric",
            "weights": "int8 symmetric per channel",
            "reduce_range": self.reduce_range,
        }


TARGETS = {
    target.name: target
    for target in (
        Target("x86", QuantType.QUInt8, reduce_range=True, float_stem=True),
        Target("x86-vnni", QuantType.QUInt8, reduce_range=False, float_stem=True),
        Target("arm64", QuantType.QInt8, reduce_range=False, float_stem=False),
    )
}


def find_target(name: str) -> Target:
    """Return a target by name. Raises ExportError, listing all targets, if it does not exist."""
    if name not in TARGETS:
        raise ExportError(f"Unknown target {name!r}. Choose from {', '.join(TARGETS)}.")
    return TARGETS[name]


def explain_untimed(names: Iterable[str]) -> dict[str, str | None]:
    """Return for each target why its file cannot be timed on this machine; None if it can."""
    here = detect_target()
    return {
        name: None
        if name == here or (name, here) == ("x86", "x86-vnni")
        else f"made for {name}, this machine is {here}"
        for name in names
    }


def is_exact_here(name: str) -> bool:
    """Return True if a target's files compute the same on this machine as on their own.

    Without VNNI, x86 saturates sums with weights of 8 bits, so only files for x86 itself are exact there.
    """
    return detect_target() != "x86" or name == "x86"
