"""What stands between pixels, uint8 [batch, S, S, 3], and a network that takes float planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType

INPUT, PLANES, PIXELS = "input", "uint8_planes", "pixels"
"""Names of a file's input, uint8 [batch, S, S, 3], of its planes, uint8 [batch, 3 or 4, S, S], and of what
its core takes, float32 [batch, 3 or 4, S, S].
"""

SCALE = np.float32(1 / 255)
_Z, _MASK = "uint8_zero_point", "uint8_mask"
_FACTOR, _SHIFT = "uint8_factor", "uint8_shift"


@dataclass(frozen=True)
class Folded:
    """The normalisation is in the core's first weights; the core takes (u − zero_point)/255.

    `mask` is the pixel value of a fourth channel, where there is one.
    """

    zero_point: int
    mask: int | None

    told = "normalisation folded into the first convolution"

    @property
    def channels(self) -> int:
        return 3 if self.mask is None else 4

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] to what the core takes, float32 [B, 3 or 4, S, S]."""
        planes = pixels.transpose(0, 3, 1, 2)
        if self.mask is not None:
            planes = np.pad(planes, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=self.mask)
        return np.ascontiguousarray((planes.astype(np.float32) - self.zero_point) * SCALE)

    def overrides(self, *, signed: bool = False) -> dict[str, list[dict[str, Any]]]:
        """ONNX Runtime's `TensorQuantOverrides` for the core's input: pixels are quantized already."""
        kind, dtype = (QuantType.QInt8, np.int8) if signed else (QuantType.QUInt8, np.uint8)
        zero_point = np.array(self.zero_point - (128 if signed else 0), dtype=dtype)
        return {PIXELS: [{"quant_type": kind, "scale": np.array(SCALE), "zero_point": zero_point}]}

    def nodes(self, height: int, width: int) -> tuple[list[NodeProto], list[TensorProto]]:
        """From the file's input to the core's, and their constants."""
        nodes = _Nodes()
        step = nodes.constant("uint8_step", SCALE)
        zero_point = nodes.constant(_Z, np.uint8(self.zero_point))
        if self.mask is None:
            nodes.add("Transpose", [INPUT], PLANES, perm=[0, 3, 1, 2])
        else:
            # ONNX Runtime would move a transpose behind the padding, where it goes pixel by pixel and takes
            # five times as long; it moves none across this reshaping.
            flat = nodes.constant("uint8_flat_shape", np.array([0, -1, 3]))
            pads = nodes.constant("uint8_pads", np.array([0, 0, 0, 0, 1, 0]))
            shape = nodes.constant("uint8_shape", np.array([0, 4, height, width]))
            nodes.add("Reshape", [INPUT, flat], "uint8_flat")
            nodes.add("Transpose", ["uint8_flat"], "uint8_colours", perm=[0, 2, 1])
            mask = nodes.constant(_MASK, np.uint8(self.mask))
            nodes.add("Pad", ["uint8_colours", pads, mask], "uint8_masked")
            nodes.add("Reshape", ["uint8_masked", shape], PLANES)
        nodes.add("DequantizeLinear", [PLANES, step, zero_point], PIXELS)
        return nodes.nodes, nodes.constants


@dataclass(frozen=True)
class Outside:
    """The core is as it was; float nodes in front of it compute u · factor + shift of each channel."""

    factor: tuple[float, ...]
    shift: tuple[float, ...]
    told = "normalisation in float, before the network"
    channels = 3

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float]) -> Outside:
        return cls(tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True)))

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] to what the core takes, float32 [B, 3, S, S]."""
        planes = pixels.transpose(0, 3, 1, 2).astype(np.float32)
        factor, shift = (np.array(v, dtype=np.float32)[:, None, None] for v in (self.factor, self.shift))
        return np.ascontiguousarray(planes * factor + shift)

    def overrides(self, *, signed: bool = False) -> dict[str, list[dict[str, Any]]]:
        """None: the core's input is quantized as any other tensor."""
        return {}

    def nodes(self, height: int, width: int) -> tuple[list[NodeProto], list[TensorProto]]:
        """From the file's input to the core's, and their constants."""
        nodes = _Nodes()
        factor = nodes.constant(_FACTOR, np.array(self.factor, dtype=np.float32))
        zero_point = nodes.constant(_Z, np.zeros(3, dtype=np.uint8))
        shift = nodes.constant(_SHIFT, np.array(self.shift, dtype=np.float32)[:, None, None])
        nodes.add("Transpose", [INPUT], PLANES, perm=[0, 3, 1, 2])
        nodes.add("DequantizeLinear", [PLANES, factor, zero_point], "uint8_scaled", axis=1)
        nodes.add("Add", ["uint8_scaled", shift], PIXELS)
        return nodes.nodes, nodes.constants


Front = Folded | Outside


def read_front(constants: Sequence[TensorProto]) -> Front | None:
    """The front that a file with these constants has; None where it has none."""
    values = {t.name: numpy_helper.to_array(t) for t in constants if t.name.startswith("uint8_")}
    if {_FACTOR, _SHIFT} <= values.keys():
        return Outside(tuple(values[_FACTOR].ravel().tolist()), tuple(values[_SHIFT].ravel().tolist()))
    if _Z in values:
        return Folded(int(values[_Z]), int(values[_MASK]) if _MASK in values else None)
    return None


class _Nodes:
    """Nodes named as what they give, and constants."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, takes: list[str], gives: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, takes, [gives], name=gives, **attributes))
