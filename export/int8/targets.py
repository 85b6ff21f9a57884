"""For which processors an int8 file is made, and in which types each of them is fast and right.

- x86: activations uint8, weights int8 of 7 bits. Without VNNI pairs of products are summed in 16 bits, which
  saturate with weights of 8 bits; with 7 they never do, and it costs no time.
- x86-vnni: activations uint8, weights int8. VNNI sums in 32 bits, and u8×s8 is the only pair of types with a
  fast convolution kernel on x86.
- arm64: activations int8, weights int8: what its dot product and its matrix instructions (i8mm) take.

Sources: ONNX Runtime's documentation on quantization (sections on representation, on U8S8 and its saturation,
and on Arm), and `benchmarks/int8/compare.py`. Asymmetric everywhere: only then ReLU and Clip fold into the range of
the tensor before them, and half of a range is not given to numbers that a ReLU never gives.

On x86 a first convolution of 3 × 3 stays float, unless it takes pixels as they are: over three channels the
integer kernel has little to sum, and MobileNets are a few percent faster so; one of 7 × 7, as ResNets have
it, is far slower in float (`benchmarks/int8/stem.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnxruntime.quantization import QuantType

from ..errors import ExportError
from ..runtime import detect_target


@dataclass(frozen=True)
class Target:
    """The types of one family of processors."""

    name: str
    activations: QuantType
    weights: QuantType
    symmetric: bool
    """Whether activations' zero point is 0."""
    reduce_range: bool
    """Whether weights keep to 7 bits."""
    float_stem: bool
    """Whether a small first convolution is faster in float (see `scope.stem`)."""

    @property
    def described(self) -> dict[str, str | bool]:
        """For a recipe: JSON-ready."""
        names = {QuantType.QUInt8: "uint8", QuantType.QInt8: "int8"}
        return {
            "activations": f"{names[self.activations]} {'symmetric' if self.symmetric else 'asymmetric'}",
            "weights": f"{names[self.weights]} symmetric per channel",
            "reduce_range": self.reduce_range,
        }


_U8, _S8 = QuantType.QUInt8, QuantType.QInt8

TARGETS = {
    target.name: target
    for target in (
        Target("x86", _U8, _S8, symmetric=False, reduce_range=True, float_stem=True),
        Target("x86-vnni", _U8, _S8, symmetric=False, reduce_range=False, float_stem=True),
        Target("arm64", _S8, _S8, symmetric=False, reduce_range=False, float_stem=False),
    )
}


def target(name: str) -> Target:
    """Raises ExportError, naming what there is."""
    if name not in TARGETS:
        raise ExportError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name]


def timed_here(names: Iterable[str]) -> dict[str, str | None]:
    """For each target, why a file of it cannot be timed on this machine; None where it can."""
    here = detect_target()
    return {name: None if _runs(name, here) else _why_not(name, here) for name in names}


def right_here(name: str) -> bool:
    """Whether a target's files answer on this machine as on their own. Without VNNI, x86 saturates sums with
    weights of 8 bits, so only its own target's files are right there.
    """
    return detect_target() != "x86" or name == "x86"


def _runs(name: str, here: str) -> bool:
    return name == here or (name, here) == ("x86", "x86-vnni")


def _why_not(name: str, here: str) -> str:
    return f"made for {name}, and this machine is {here}: it cannot be timed here"
