"""An ONNX file that somebody else has made, looked at and bounded before a runtime sees it.

A runtime is a large parser in C++ that trusts the file's author: external data has led out of the model's
folder by name, symbolic link and hard link (CVE-2024-27318, CVE-2024-5187 and those after them), and shapes
have promised more than there was.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..errors import ExportError
from ..runtime import MAX_FILE_BYTES

MOST_NODES = 200_000
"""Of all graphs together, a function's as often as it is called."""

DEEPEST = 8
"""Graphs inside the attributes of nodes inside graphs."""

Graph = onnx.GraphProto | onnx.FunctionProto

Called = tuple[str, str, str]
"""An operator's domain, its name and its overload, or those of a function of the file's own."""


def graphs(*roots: Graph) -> Iterator[tuple[Graph, int]]:
    """Every graph in these with its depth; not by recursion, which a deep one would exhaust."""
    waiting = [(root, 0) for root in roots]
    while waiting:
        graph, depth = waiting.pop()
        yield graph, depth
        waiting += [(inner, depth + 1) for inner in _inside(attributes(graph))]


def attributes(graph: Graph) -> Iterator[onnx.AttributeProto]:
    """Those of its nodes, and those that a function has where a call names none."""
    if isinstance(graph, onnx.FunctionProto):
        yield from graph.attribute_proto
    for node in graph.node:
        yield from node.attribute


def _inside(given: Iterable[onnx.AttributeProto]) -> Iterator[onnx.GraphProto]:
    for attribute in given:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def refuse_many(model: onnx.ModelProto, name: str) -> None:
    """
    Raises:
        ExportError: the graphs lie too deep in each other, or have too many nodes.
    """
    nodes = 0
    for graph, depth in graphs(model.graph, *model.functions):
        if depth > DEEPEST:
            raise ExportError(f"{name} has graphs nested more than {DEEPEST} deep")
        nodes += max(1, len(graph.node))
        if nodes > MOST_NODES:
            raise ExportError(f"{name} has more than {MOST_NODES:,} nodes")


def refuse_endless_calls(model: onnx.ModelProto, name: str) -> None:
    """A runtime writes out every call of the file's own functions: ten of them that each call the next one
    ten times are ten thousand million nodes.

    Raises:
        ExportError: there are too many nodes then, or functions call themselves.
    """
    calls = {(one.domain, one.name, one.overload): _named(one) for one in model.functions}
    if len(calls) < len(model.functions):
        raise ExportError(f"{name} has two functions of one name")
    own = {one: [other for other in named if other in calls] for one, named in calls.items()}
    callers: dict[Called, list[Called]] = {one: [] for one in calls}
    for one, others in own.items():
        for other in others:
            callers[other].append(one)
    unknown = {one: len(others) for one, others in own.items()}
    able = [one for one, left in unknown.items() if not left]
    sizes: dict[Called, int] = {}
    while able:
        one = able.pop()
        sizes[one] = _written_out(calls[one], sizes)
        for caller in callers[one]:
            unknown[caller] -= 1
            if not unknown[caller]:
                able.append(caller)
    circle = next((one for one in calls if one not in sizes), None)
    if circle is not None:
        raise ExportError(f"{name} has functions that call themselves ({short(circle[1])})")
    if _written_out(_named(model.graph), sizes) > MOST_NODES:
        raise ExportError(f"{name} has more than {MOST_NODES:,} nodes, with those of its functions")


def _named(graph: Graph) -> Counter[Called]:
    """The operators of a graph and of those inside it, and how often each is named."""
    return Counter(
        (node.domain, node.op_type, node.overload) for one, _ in graphs(graph) for node in one.node
    )


def _written_out(named: Counter[Called], sizes: dict[Called, int]) -> int:
    return min(sum(times * sizes.get(one, 1) for one, times in named.items()), MOST_NODES + 1)


def refuse_circles(graph: Graph, name: str, outer: tuple[set[str], ...] = ()) -> None:
    """ONNX wants nodes in an order in which each finds what it needs: in its own graph, or in one around it.

    Raises:
        ExportError: one does not.
    """
    if isinstance(graph, onnx.GraphProto):
        known = {one.name for one in (*graph.input, *graph.initializer)} | {""}
        known |= {one.values.name for one in graph.sparse_initializer}
    else:
        known = {*graph.input, ""}
    for node in graph.node:
        for one in node.input:
            if one not in known and not any(one in around for around in outer):
                raise ExportError(
                    f"{name} has a node {short(node.op_type)} that needs {short(one)}, which nothing before "
                    "it makes: the graph goes in a circle, or is out of order"
                )
        for inner in _inside(node.attribute):  # no deeper than refuse_many allows
            refuse_circles(inner, name, (*outer, known))
        known |= set(node.output)


def short(text: str) -> str:
    """A name from the file, in quotes: as long as a sentence may hold."""
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


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
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
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
