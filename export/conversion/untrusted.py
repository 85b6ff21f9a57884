"""Read and check untrusted ONNX files before ONNX Runtime loads them.

ONNX Runtime's parser trusts the author of a file: external data has left the model's folder by file names,
symbolic links and hard links (CVE-2024-27318, CVE-2024-5187 and later ones), and shapes have declared more
data than the file holds.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..errors import ExportError
from ..runtime import MAX_FILE_BYTES

MAX_NODES = 200_000
"""Nodes of all graphs together, with functions expanded at each call."""

MAX_DEPTH = 8
"""Levels of graphs in attributes of nodes."""

MAX_ELEMENTS = 2**33
"""Elements of one tensor, stored or declared."""

MAX_SPARSE_ELEMENTS = 2**26
"""Elements of one sparse tensor, which ONNX Runtime expands with all its zeros."""

MAX_DIMENSIONS = 32

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
"""Domains of ONNX Runtime's own operators; operators of others require loading a library."""

FILE_OPERATORS = frozenset({"EPContext"})
"""Operators of these domains that name a file for ONNX Runtime to open."""

Graph = onnx.GraphProto | onnx.FunctionProto

Operator = tuple[str, str, str]
"""Domain, name and overload of an operator or of a function in the file."""


def read_untrusted(path: Path, *, external_data: bool = False) -> tuple[bytes, onnx.ModelProto]:
    """Return the content of a file and the checked model in it; load these bytes, not the file again.

    With `external_data`, weights may be in the file ``NAME.onnx.data`` next to it, as `export_onnx` writes
    those of more than 2 GB. Raises ExportError.
    """
    try:
        if not path.is_file():
            raise ExportError(f"{path} is not a file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise ExportError(f"{path} is larger than 2 GB, the limit of ONNX files")
            content = file.read()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    data_name = None
    data = path.with_name(f"{path.name}.data")
    if external_data and data.is_file():
        if data.is_symlink() or data.stat().st_nlink > 1:
            raise ExportError(f"{data} is a link to another file. Replace it with the file itself")
        data_name = data.name
    return content, parse_untrusted(content, str(path), data_name)


def parse_untrusted(content: bytes, name: str, data_name: str | None = None) -> onnx.ModelProto:
    """Return the model in the content of a file; only the file `data_name` may hold external data.

    Raises ExportError, which names the model `name`, if it is not an ONNX file, needs data or operators from
    elsewhere, declares more data than it holds, has cycles, or exceeds the limits above.
    """
    try:
        model = onnx.ModelProto.FromString(content)
    except (DecodeError, ValueError) as error:
        raise ExportError(f"{name} is not an ONNX file") from error
    if not model.graph.node or not model.graph.output:
        raise ExportError(f"{name} contains no network")
    if model.training_info:
        raise ExportError(f"{name} contains training graphs. Export it for inference")
    opsets = [*model.opset_import, *(opset for f in model.functions for opset in f.opset_import)]
    own_domains = {function.domain for function in model.functions}
    unsupported = sorted({opset.domain for opset in opsets} - DOMAINS - own_domains)
    if unsupported:
        domains = ", ".join(map(_quote, unsupported[:3]))
        raise ExportError(f"{name} requires operators of {domains}, which are not part of ONNX Runtime")
    nodes = 0
    for graph, depth in walk_graphs(model.graph, *model.functions):
        if depth > MAX_DEPTH:
            raise ExportError(f"{name} has graphs nested more than {MAX_DEPTH} deep")
        nodes += max(1, len(graph.node))
        if nodes > MAX_NODES:
            raise ExportError(f"{name} has more than {MAX_NODES:,} nodes")
    functions = {(function.domain, function.name) for function in model.functions}
    for graph, _ in walk_graphs(model.graph, *model.functions):
        _check_graph(graph, functions, name, data_name)
    _check_calls(model, name)
    for root in (model.graph, *model.functions):
        _check_order(root, name)
    return model


def walk_graphs(*roots: Graph) -> Iterator[tuple[Graph, int]]:
    """Yield all graphs in `roots` with their depth, without recursion, which deep graphs would exhaust."""
    waiting = [(root, 0) for root in roots]
    while waiting:
        graph, depth = waiting.pop()
        yield graph, depth
        waiting += [(inner, depth + 1) for inner in _subgraphs(_attributes(graph))]


def walk_tensors(graph: Graph) -> Iterator[onnx.TensorProto]:
    """Yield the tensors of a graph, including the parts of sparse ones, but not those of subgraphs."""
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
    for attribute in _attributes(graph):
        yield from attribute.tensors
        if attribute.HasField("t"):
            yield attribute.t
    for sparse in _sparse_tensors(graph):
        yield sparse.values
        yield sparse.indices


def _sparse_tensors(graph: Graph) -> Iterator[onnx.SparseTensorProto]:
    if isinstance(graph, onnx.GraphProto):
        yield from graph.sparse_initializer
    for attribute in _attributes(graph):
        yield from attribute.sparse_tensors
        if attribute.HasField("sparse_tensor"):
            yield attribute.sparse_tensor


def _attributes(graph: Graph) -> Iterator[onnx.AttributeProto]:
    """Yield the attributes of all nodes, and a function's defaults."""
    if isinstance(graph, onnx.FunctionProto):
        yield from graph.attribute_proto
    for node in graph.node:
        yield from node.attribute


def _subgraphs(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.GraphProto]:
    for attribute in attributes:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _check_graph(graph: Graph, functions: set[tuple[str, str]], name: str, data_name: str | None) -> None:
    """Check the operators, tensors and shapes of one graph, without its subgraphs."""
    for node in graph.node:
        is_builtin = node.domain in DOMAINS and node.op_type not in FILE_OPERATORS
        if not is_builtin and (node.domain, node.op_type) not in functions:
            raise ExportError(
                f"{name} requires the operator {_quote(node.op_type)} of {_quote(node.domain)}, which is not "
                "part of ONNX Runtime or opens files"
            )
    for tensor in walk_tensors(graph):
        _check_tensor(tensor, name, data_name)
    for sparse in _sparse_tensors(graph):
        _check_dims(list(sparse.dims), f"{name} has a sparse tensor", MAX_SPARSE_ELEMENTS)
    ends = (*graph.input, *graph.output) if isinstance(graph, onnx.GraphProto) else ()
    for value in (*ends, *graph.value_info):
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
        _check_dims(dims, f"{name} has a value {_quote(value.name)}", MAX_ELEMENTS)


def _check_calls(model: onnx.ModelProto, name: str) -> None:
    """Check the number of nodes with functions expanded, as ONNX Runtime expands them.

    Ten functions that each call the next one ten times are ten billion nodes.
    """
    calls = {(f.domain, f.name, f.overload): _count_operators(f) for f in model.functions}
    if len(calls) < len(model.functions):
        raise ExportError(f"{name} has two functions of the same name")
    callees = {
        function: [callee for callee in operators if callee in calls] for function, operators in calls.items()
    }
    sizes: dict[Operator, int] = {}
    try:
        for function in TopologicalSorter(callees).static_order():
            sizes[function] = _expanded_size(calls[function], sizes)
    except CycleError as error:
        raise ExportError(
            f"{name} has functions that call themselves ({_quote(error.args[1][0][1])})"
        ) from error
    if _expanded_size(_count_operators(model.graph), sizes) > MAX_NODES:
        raise ExportError(f"{name} has more than {MAX_NODES:,} nodes, including those of its functions")


def _count_operators(graph: Graph) -> Counter[Operator]:
    """Count the operators of a graph and its subgraphs."""
    nodes = (node for inner, _ in walk_graphs(graph) for node in inner.node)
    return Counter((node.domain, node.op_type, node.overload) for node in nodes)


def _expanded_size(operators: Counter[Operator], sizes: dict[Operator, int]) -> int:
    return min(sum(n * sizes.get(operator, 1) for operator, n in operators.items()), MAX_NODES + 1)


def _check_order(graph: Graph, name: str, outer: tuple[set[str], ...] = ()) -> None:
    """Check that nodes only read values that precede them, in their own graph or in an outer one."""
    if isinstance(graph, onnx.GraphProto):
        values = {value.name for value in (*graph.input, *graph.initializer)} | {""}
        values |= {sparse.values.name for sparse in graph.sparse_initializer}
    else:
        values = {*graph.input, ""}
    for node in graph.node:
        for read in node.input:
            if read not in values and not any(read in others for others in outer):
                raise ExportError(
                    f"{name} has a node {_quote(node.op_type)} whose input {_quote(read)} no earlier node "
                    "computes: the graph has a cycle or is not sorted"
                )
        for inner in _subgraphs(node.attribute):  # at most MAX_DEPTH levels
            _check_order(inner, name, (*outer, values))
        values |= set(node.output)


def _quote(text: str) -> str:
    """Return a name from the file in quotes, shortened for messages."""
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _check_tensor(tensor: onnx.TensorProto, name: str, data_name: str | None) -> None:
    subject = f"{name} has a tensor {_quote(tensor.name)}"
    _check_dims(list(tensor.dims), subject, MAX_ELEMENTS)
    locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        if data_name is not None and locations == [data_name]:
            return
        location = f" {_quote(locations[0])}" if locations else ""
        raise ExportError(
            f"{name} refers to data in another file{location} (tensor {_quote(tensor.name)}). "
            "Save it as one file: onnx.save(onnx.load(path), path)"
        )
    subject += f" of {list(tensor.dims)}"
    try:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        width = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError) as error:
        raise ExportError(f"{name} has a tensor {_quote(tensor.name)} of unknown type") from error
    # Types of 2 and 4 bits are packed into bytes; numpy uses a byte for each element.
    packed_bits = next((n for n in (2, 4) if kind.endswith(f"INT{n}") or kind.startswith(f"FLOAT{n}")), None)
    elements = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        expected = -(-elements * (packed_bits or width) // 8)
        if len(tensor.raw_data) != expected:
            raise ExportError(f"{subject} with {len(tensor.raw_data):,} bytes, not {expected:,}")
        return
    stored = max(len(getattr(tensor, field)) for field in _DATA_FIELDS)
    # Complex numbers take two entries.
    stored = stored // 2 if kind.startswith("COMPLEX") else stored * (8 // (packed_bits or 8))
    if stored < elements:
        raise ExportError(f"{subject} with {stored:,} elements, not {elements:,}")


_DATA_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def _check_dims(dims: list[int], subject: str, limit: int) -> None:
    # The product alone does not suffice: a zero hides the other factors, and a million of them take long.
    if len(dims) > MAX_DIMENSIONS or any(not 0 <= n <= limit for n in dims) or math.prod(dims) > limit:
        shown = f"{dims[:MAX_DIMENSIONS]}{' …' if len(dims) > MAX_DIMENSIONS else ''}"
        raise ExportError(f"{subject} of an impossible size {shown}")
