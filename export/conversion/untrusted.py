"""An ONNX file that somebody else has made, looked at and bounded before a runtime sees it.

A runtime is a large parser in C++ that trusts the file's author: external data has led out of the model's
folder by name, symbolic link and hard link (CVE-2024-27318, CVE-2024-5187 and those after them), and shapes
have promised more than there was.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..errors import ExportError
from ..foreign_graphs import (
    Graph,
    attributes,
    graphs,
    refuse_circles,
    refuse_endless_calls,
    refuse_many,
    short,
)
from ..runtime import LARGEST_FILE

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
"""Whose operators ONNX Runtime brings along; any others come from a library that would have to be loaded."""

READS_FILES = frozenset({"EPContext"})
"""Operators of these domains that name a file for a runtime to open."""

MOST_NUMBERS = 2**33
"""In one tensor, whether the file holds them or only promises them."""

MOST_SIDES = 32
"""Of one tensor."""

MOST_SPARSE = 2**26
"""In one sparse tensor, which a runtime writes out with all its zeros."""


def read_foreign(path: Path, *, beside: bool = False) -> tuple[bytes, onnx.ModelProto]:
    """A file's bytes, and the model in them: what is looked at is what is to be run.

    Args:
        beside: whether its weights may lie in the one file beside it that is named after it, as those of our
            own networks of more than 2 GB do.

    Raises:
        ExportError: the file is no ONNX file, or one that is not to be trusted; the sentence says why.
    """
    try:
        if not path.is_file():
            raise ExportError(f"{path} is no file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > LARGEST_FILE:
                raise ExportError(f"{path} is larger than 2 GB, which no ONNX file is")
            content = file.read()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    return content, parsed(content, str(path), _beside(path) if beside else None)


def parsed(content: bytes, name: str, beside: str | None = None) -> onnx.ModelProto:
    """The model in a file's bytes; see ``refuse_hostile``.

    Raises:
        ExportError: it is no ONNX file, or one that is not to be trusted.
    """
    try:
        model = onnx.ModelProto.FromString(content)
    except (DecodeError, ValueError) as error:
        raise ExportError(f"{name} is no ONNX file") from error
    refuse_hostile(model, name, beside)
    return model


def _beside(path: Path) -> str | None:
    """The name of the file that may hold a network's weights. A link may lead anywhere, and so may a second
    name of a file from elsewhere.
    """
    data = path.with_name(f"{path.name}.data")
    if not data.is_file():
        return None
    if data.is_symlink() or data.stat().st_nlink > 1:
        raise ExportError(f"{data} is a link to another file, which is refused; put the file itself there")
    return data.name


def refuse_hostile(model: onnx.ModelProto, name: str, beside: str | None = None) -> None:
    """
    Args:
        name: what the model is called in the sentence.
        beside: the one other file that it may take data from.

    Raises:
        ExportError: the model wants data from outside itself or operators from elsewhere, promises more than
            it holds, goes in circles, or is larger or deeper than any network.
    """
    if not model.graph.node or not model.graph.output:
        raise ExportError(f"{name} holds no network")
    if model.training_info:
        raise ExportError(f"{name} holds graphs to train with, which are refused; export it for inference")
    opsets = [*model.opset_import, *(one for function in model.functions for one in function.opset_import)]
    own = {function.domain for function in model.functions}
    strange = sorted({one.domain for one in opsets} - DOMAINS - own)
    if strange:
        told = ", ".join(short(one) for one in strange[:3])
        raise ExportError(f"{name} needs operators of {told}, which are not ONNX's own")
    refuse_many(model, name)
    functions = {(one.domain, one.name) for one in model.functions}
    for graph, _ in graphs(model.graph, *model.functions):
        for node in graph.node:
            known = node.domain in DOMAINS and node.op_type not in READS_FILES
            if not known and (node.domain, node.op_type) not in functions:
                raise ExportError(
                    f"{name} needs the operator {short(node.op_type)} of {short(node.domain)}, not ONNX's "
                    "own or one that opens files"
                )
        for tensor in _tensors(graph):
            _refuse_tensor(tensor, name, beside)
        for sparse in _sparse(graph):
            _refuse_dims(list(sparse.dims), f"{name} has a sparse tensor", MOST_SPARSE)
        ends = (*graph.input, *graph.output) if isinstance(graph, onnx.GraphProto) else ()
        for given in (*ends, *graph.value_info):
            dims = [one.dim_value for one in given.type.tensor_type.shape.dim if one.HasField("dim_value")]
            _refuse_dims(dims, f"{name} has a value {short(given.name)}", MOST_NUMBERS)
    refuse_endless_calls(model, name)
    refuse_circles(model.graph, name)
    for function in model.functions:
        refuse_circles(function, name)


def _tensors(graph: Graph) -> Iterator[onnx.TensorProto]:
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
    for attribute in attributes(graph):
        yield from attribute.tensors
        if attribute.HasField("t"):
            yield attribute.t
    for one in _sparse(graph):
        yield one.values
        yield one.indices


def _sparse(graph: Graph) -> Iterator[onnx.SparseTensorProto]:
    if isinstance(graph, onnx.GraphProto):
        yield from graph.sparse_initializer
    for attribute in attributes(graph):
        yield from attribute.sparse_tensors
        if attribute.HasField("sparse_tensor"):
            yield attribute.sparse_tensor


def _refuse_tensor(tensor: onnx.TensorProto, name: str, beside: str | None) -> None:
    told = f"{name} has a tensor {short(tensor.name)}"
    _refuse_dims(list(tensor.dims), told, MOST_NUMBERS)
    places = [one.value for one in tensor.external_data if one.key == "location"]
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        if beside is not None and places == [beside]:
            return
        where = f" {short(places[0])}" if places else ""
        raise ExportError(
            f"{name} keeps data in another file{where} (the tensor {short(tensor.name)}), which is refused; "
            "save it as one: onnx.save(onnx.load(path), path)"
        )
    told += f" of {list(tensor.dims)}"
    bits = _bits(tensor, name)
    if tensor.HasField("raw_data"):
        expected = -(-math.prod(tensor.dims) * bits // 8)
        if len(tensor.raw_data) != expected:
            raise ExportError(f"{told} with {len(tensor.raw_data):,} bytes, not {expected:,}")
        return
    held, needed = _held(tensor), math.prod(tensor.dims)
    if held < needed:
        raise ExportError(f"{told} with {held:,} numbers, not {needed:,}")


_LISTS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def _held(tensor: onnx.TensorProto) -> int:
    """How many numbers a tensor's lists hold at most: those of a few bits lie packed, complex ones in two."""
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    packed = 8 // bits if (bits := _few_bits(kind)) else 1
    whole = max(len(getattr(tensor, one)) for one in _LISTS)
    return whole // 2 if kind.startswith("COMPLEX") else whole * packed


def _few_bits(kind: str) -> int | None:
    return next(
        (bits for bits in (2, 4) if kind.endswith(f"INT{bits}") or kind.startswith(f"FLOAT{bits}")), None
    )


def _bits(tensor: onnx.TensorProto, name: str) -> int:
    """How many bits one number of a tensor takes."""
    try:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        width = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError) as error:
        raise ExportError(f"{name} has a tensor {short(tensor.name)} of no known type") from error
    # Numbers of a few bits lie packed, where numpy gives each a byte.
    return _few_bits(kind) or width


def _refuse_dims(dims: list[int], told: str, most: int) -> None:
    # Not the product alone, which a zero hides the rest of, and which takes long of a million sides.
    if len(dims) > MOST_SIDES or any(not 0 <= one <= most for one in dims) or math.prod(dims) > most:
        shown = f"{dims[:MOST_SIDES]}{' …' if len(dims) > MOST_SIDES else ''}"
        raise ExportError(f"{told} of an impossible size {shown}")
