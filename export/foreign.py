"""An ONNX file that somebody else has made, looked at and bounded before a runtime sees it.

A runtime is a large parser in C++ that trusts the file's author: external data has led out of the model's
folder by name, symbolic link and hard link (CVE-2024-27318, CVE-2024-5187 and those after them), and shapes
have promised more than there was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from .errors import ExportError

LARGEST = 2**31 - 1
"""Bytes of a file; protobuf holds no more."""

MOST_NODES = 200_000
DEEPEST = 8
"""Graphs inside the attributes of nodes inside graphs."""

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
"""Whose operators ONNX Runtime brings along; any others come from a library that would have to be loaded."""

MOST_NUMBERS = 2**33
"""In one tensor, whether the file holds them or only promises them."""


def read_foreign(path: Path) -> tuple[bytes, onnx.ModelProto]:
    """A file's bytes, and the model in them: what is looked at is what is to be run.

    Raises:
        ExportError: the file is no ONNX file, or one that is not to be trusted; the sentence says why.
    """
    try:
        if not path.is_file():
            raise ExportError(f"{path} is no file")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST:
        raise ExportError(f"{path} is larger than 2 GB, which no ONNX file is")
    try:
        model = onnx.ModelProto.FromString(content)
    except (DecodeError, ValueError) as error:
        raise ExportError(f"{path} is no ONNX file") from error
    refuse_hostile(model, str(path))
    return content, model


def refuse_hostile(model: onnx.ModelProto, name: str) -> None:
    """
    Raises:
        ExportError: the model wants data from outside itself or operators from elsewhere, promises more than
            it holds, goes in circles, or is larger or deeper than any network.
    """
    if not model.graph.node or not model.graph.output:
        raise ExportError(f"{name} holds no network")
    strange = sorted({one.domain for one in model.opset_import} - DOMAINS)
    if strange:
        raise ExportError(f"{name} needs operators of {', '.join(strange)!r}, which are not ONNX's own")
    nodes = 0
    for graph, depth in _graphs(model):
        if depth > DEEPEST:
            raise ExportError(f"{name} has graphs nested more than {DEEPEST} deep")
        nodes += len(graph.node)
        if nodes > MOST_NODES:
            raise ExportError(f"{name} has more than {MOST_NODES:,} nodes")
        for node in graph.node:
            if node.domain not in DOMAINS and not _own(model, node):
                raise ExportError(
                    f"{name} needs the operator {node.op_type} of {node.domain!r}, not ONNX's own"
                )
        for tensor in _tensors(graph):
            _refuse_tensor(tensor, name)
        for given in (*graph.input, *graph.output, *graph.value_info):
            dims = [one.dim_value for one in given.type.tensor_type.shape.dim if one.HasField("dim_value")]
            _refuse_dims(dims, f"{name} has a value {given.name!r}")
    _refuse_circles(model.graph, name)


def _own(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether a node calls a function that the file itself defines."""
    return any((one.domain, one.name) == (node.domain, node.op_type) for one in model.functions)


def _graphs(model: onnx.ModelProto) -> Iterator[tuple[onnx.GraphProto | onnx.FunctionProto, int]]:
    """Every graph and function with its depth; not by recursion, which a deep one would exhaust."""
    waiting: list[tuple[onnx.GraphProto | onnx.FunctionProto, int]] = [(model.graph, 0)]
    waiting += [(function, 0) for function in model.functions]
    while waiting:
        graph, depth = waiting.pop()
        yield graph, depth
        for node in graph.node:
            for attribute in node.attribute:
                inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                waiting += [(one, depth + 1) for one in inner]


def _tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    sparse: list[onnx.SparseTensorProto] = []
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
        sparse += graph.sparse_initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            sparse += attribute.sparse_tensors
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
    for one in sparse:
        yield one.values
        yield one.indices


def _refuse_tensor(tensor: onnx.TensorProto, name: str) -> None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise ExportError(
            f"{name} keeps data in another file ({tensor.name}); save it as one: "
            "onnx.save(onnx.load(path), path)"
        )
    _refuse_dims(list(tensor.dims), f"{name} has a tensor {tensor.name!r}")
    if tensor.HasField("raw_data"):
        expected = _bytes(tensor, name)
        if len(tensor.raw_data) != expected:
            raise ExportError(
                f"{name} has a tensor {tensor.name!r} of {list(tensor.dims)} with {len(tensor.raw_data):,} "
                f"bytes, not {expected:,}"
            )


def _bytes(tensor: onnx.TensorProto, name: str) -> int:
    """How many bytes a tensor of this size and type takes."""
    try:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        width = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError) as error:
        raise ExportError(f"{name} has a tensor {tensor.name!r} of no known type") from error
    # Numbers of a few bits lie packed, where numpy gives each a byte.
    packed = next(
        (bits for bits in (2, 4) if kind.endswith(f"INT{bits}") or kind.startswith(f"FLOAT{bits}")), None
    )
    return -(-math.prod(tensor.dims) * (packed or width) // 8)


def _refuse_dims(dims: list[int], told: str) -> None:
    if any(one < 0 for one in dims) or math.prod(dims) > MOST_NUMBERS:
        raise ExportError(f"{told} of an impossible size {dims}")


def _refuse_circles(graph: onnx.GraphProto, name: str) -> None:
    """ONNX wants nodes in an order in which each finds what it needs."""
    known = {one.name for one in (*graph.input, *graph.initializer)} | {""}
    known |= {one.values.name for one in graph.sparse_initializer}
    for node in graph.node:
        missing = [one for one in node.input if one not in known]
        if missing:
            raise ExportError(
                f"{name} has a node {node.op_type} that needs {missing[0]!r}, which nothing before it makes: "
                "the graph goes in a circle, or is out of order"
            )
        known |= set(node.output)
