"""What an .onnx file takes, read from the file before any runtime opens it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..export.errors import ExportError
from ..export.foreign import read_foreign
from ..export.runtime import METADATA_PREFIX
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
    ours: bool
    """Whether the file carries questpress's preprocessing and labels."""
    bytes: int
    """Of the file and of the weights that lie beside it."""

    @property
    def told(self) -> str:
        return f"{self.kind} [1, {', '.join(map(str, self.shape))}]"


def onnx_input(path: Path, image_size: int | None = None) -> OnnxInput:
    """Of a file of a run, whose weights may lie beside it.

    Raises:
        UsageError: it is no ONNX file, keeps weights where they should not be, or takes something other than
            single images.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (DecodeError, ValueError) as error:
        raise UsageError(f"{path} is no ONNX file; name one that ends in .onnx, or a folder.") from error
    return _taken(path, model, image_size)


def foreign_input(path: Path, image_size: int | None = None) -> tuple[bytes, OnnxInput]:
    """Of a file that somebody else may have made, and its bytes: what was looked at is what is to be run.

    Raises:
        UsageError: as for ``onnx_input``, or it is not to be trusted.
    """
    try:
        content, model = read_foreign(path)
    except ExportError as error:
        raise UsageError(f"{error}.") from error
    return content, _taken(path, model, image_size)


def _taken(path: Path, model: onnx.ModelProto, image_size: int | None) -> OnnxInput:
    graph = model.graph
    if not graph.node or not graph.output:
        raise UsageError(f"{path} is no ONNX file, or an empty one; name one that holds a network.")
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [one for one in graph.input if one.name not in weights]
    if len(inputs) != 1:
        named = ", ".join(one.name for one in inputs) or "none"
        raise UsageError(
            f"{path} has not one input but {len(inputs)} ({named}); only single images can be timed."
        )
    kind, shape, any_batch = _shape(path, inputs[0], image_size)
    beside = _beside(path, graph)
    return OnnxInput(
        shape=shape,
        kind=kind,
        any_batch=any_batch,
        ours=any(one.key == f"{METADATA_PREFIX}version" for one in model.metadata_props),
        bytes=path.stat().st_size + sum(file.stat().st_size for file in beside),
    )


def _shape(
    path: Path, given: onnx.ValueInfoProto, image_size: int | None
) -> tuple[np.dtype, tuple[int, int, int], bool]:
    tensor = given.type.tensor_type
    kind = _KINDS.get(int(tensor.elem_type))
    sides = [one.dim_value if one.HasField("dim_value") else None for one in tensor.shape.dim]
    if kind is None or len(sides) != 4:
        name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
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
    if None in rest or 0 in rest:
        if image_size is None:
            raise UsageError(f"{path} leaves the size of its images open; name one with --image-size.")
        rest = [one or image_size for one in rest]
    first, second, third = (int(one or 0) for one in rest)
    return kind, (first, second, third), batch in (None, 0)


def _beside(path: Path, graph: onnx.GraphProto) -> list[Path]:
    """The files with weights that do not lie in the graph.

    Raises:
        UsageError: one of them is missing or not in the graph's own folder.
    """
    places = {
        entry.value
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for place in places:
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise UsageError(f"{path} wants weights from outside its folder ({place}); that is refused.")
        if not (path.parent / place).is_file():
            raise UsageError(f"{path} keeps its weights in {place}, which is not there; copy it beside it.")
    return [path.parent / place for place in sorted(places)]
