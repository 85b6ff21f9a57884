"""What an .onnx file takes, read from the file before any runtime opens it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from ..export.conversion.untrusted import read_foreign
from ..export.errors import ExportError
from ..export.runtime import LARGEST_SIDE, METADATA_PREFIX
from .errors import UsageError

_KINDS: dict[int, np.dtype] = {
    int(onnx.TensorProto.FLOAT): np.dtype(np.float32),
    int(onnx.TensorProto.UINT8): np.dtype(np.uint8),
}


@dataclass(frozen=True)
class OnnxInput:
    """The one input of a network for images: ``shape`` is that of one image, [3, H, W] or [H, W, 3]."""

    shape: tuple[int, int, int]
    kind: np.dtype
    any_batch: bool
    """Whether it takes batches of any size, and not single images alone."""
    any_size: bool
    """Whether the file leaves the size of its images open."""
    ours: bool
    """Whether the file carries questpress's preprocessing and labels."""
    bytes: int
    """Of the file and of the weights that lie beside it."""

    @property
    def told(self) -> str:
        return f"{self.kind} [1, {', '.join(map(str, self.shape))}]"


def onnx_input(path: Path, image_size: int | None = None) -> OnnxInput:
    """Of a file of a run, whose weights may lie in the one file beside it that is named after it.

    Raises:
        UsageError: it is no ONNX file or one that is not to be trusted, or takes something other than single
            images.
    """
    return _read(path, image_size, beside=True)[1]


def foreign_input(path: Path, image_size: int | None = None) -> tuple[bytes, OnnxInput]:
    """Of a file that somebody else may have made, and its bytes: what was looked at is what is to be run.

    Raises:
        UsageError: as for ``onnx_input``; such a file keeps all of its weights in itself.
    """
    return _read(path, image_size, beside=False)


def _read(path: Path, image_size: int | None, *, beside: bool) -> tuple[bytes, OnnxInput]:
    try:
        content, model = read_foreign(path, beside=beside)
    except ExportError as error:
        raise UsageError(f"{error}.") from error
    return content, _taken(path, model, image_size)


def _taken(path: Path, model: onnx.ModelProto, image_size: int | None) -> OnnxInput:
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [one for one in graph.input if one.name not in weights]
    if len(inputs) != 1:
        named = ", ".join(one.name for one in inputs) or "none"
        raise UsageError(
            f"{path} has not one input but {len(inputs)} ({named}); only single images can be timed."
        )
    kind, shape, any_batch, any_size = _shape(path, inputs[0], image_size)
    data = path.with_name(f"{path.name}.data")
    outside = any(one.data_location == onnx.TensorProto.EXTERNAL for one in graph.initializer)
    return OnnxInput(
        shape=shape,
        kind=kind,
        any_batch=any_batch,
        any_size=any_size,
        ours=any(one.key == f"{METADATA_PREFIX}version" for one in model.metadata_props),
        bytes=path.stat().st_size + (data.stat().st_size if outside else 0),
    )


def _shape(
    path: Path, given: onnx.ValueInfoProto, image_size: int | None
) -> tuple[np.dtype, tuple[int, int, int], bool, bool]:
    tensor = given.type.tensor_type
    kind = _KINDS.get(int(tensor.elem_type))
    sides = [one.dim_value if one.HasField("dim_value") else None for one in tensor.shape.dim]
    if kind is None or len(sides) != 4:
        known = tensor.elem_type in onnx.TensorProto.DataType.values()
        name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if known else "no known type"
        shown = ", ".join("?" if one is None else str(one) for one in sides)
        raise UsageError(
            f"{path} takes {name} [{shown}]; an image is float [1, 3, H, W] or uint8 [1, H, W, 3]."
        )
    batch, *rest = sides
    if batch not in (None, 0, 1):
        raise UsageError(
            f"{path} takes {batch} images at once and no single one; export it with a batch of 1."
        )
    channels = 2 if kind == np.uint8 and rest[0] not in (1, 3) else 0
    rest[channels] = rest[channels] or 3
    any_size = None in rest or 0 in rest
    if any_size:
        if image_size is None:
            raise UsageError(f"{path} leaves the size of its images open; name one with --image-size.")
        rest = [one or image_size for one in rest]
    first, second, third = (int(one or 0) for one in rest)
    if max(first, second, third) > LARGEST_SIDE:
        raise UsageError(
            f"{path} takes images of [{first}, {second}, {third}], and a side has at most {LARGEST_SIDE:,} "
            "pixels."
        )
    return kind, (first, second, third), batch in (None, 0), any_size
