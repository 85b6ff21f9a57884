"""Open an ONNX file in ONNX Runtime, once it is known to read no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from .errors import ArtifactError

CPU = "CPUExecutionProvider"
ORT_SUFFIX = ".ort"
"""Suffix of ONNX Runtime's own format, which `onnxruntime.tools.convert_onnx_models_to_ort` writes."""
DISABLED_OPTIMIZERS = ["Pad_Fusion"]
"""It pads with zeros before a max-pool that would ignore padding: BiT's outputs are 3 % off."""


def open_session(
    model: str | Path | bytes,
    threads: int,
    *,
    fuse: bool = True,
    optimized: str | Path | None = None,
    name: str = "a model given as bytes",
    providers: str | Sequence[str] = CPU,
) -> ort.InferenceSession:
    """Open a model file with the options used everywhere: for validation, the bench and on the device.

    Without `fuse`, an int8 model computes in float between quantizing and dequantizing, without the
    processor's integer kernels. `optimized` is a file to write the optimized graph to, `name` that of a model
    given as bytes in errors. `providers` are names of onnxruntime's execution providers in order of
    preference; the CPU runs what they do not support. Raises ArtifactError if onnxruntime cannot load the
    model, or lacks a provider.
    """
    providers, available = [providers] if isinstance(providers, str) else list(providers), _providers()
    for provider in providers:
        if provider not in available:
            raise ArtifactError(
                f"onnxruntime has no provider {provider!r}. Available: {', '.join(available)}"
            )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fuse else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4  # less severe records contain names from the file
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    # Threads spin within a run, where microseconds count, and stop between runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    name = name if isinstance(model, bytes) else str(model)
    # Otherwise bytes that resemble ONNX Runtime's own format are read by another parser.
    format = "ORT" if name.endswith(ORT_SUFFIX) else "ONNX"
    options.add_session_config_entry("session.load_model_format", format)
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=providers,
            disabled_optimizers=DISABLED_OPTIMIZERS,
        )
    except Exception as error:  # onnxruntime's exceptions have no common public class
        reason = " ".join(str(error).split())
        raise ArtifactError(f"onnxruntime cannot load {name}: {reason}") from error
    for provider in providers:  # without its libraries or device, onnxruntime continues without it
        if provider not in session.get_providers():
            raise ArtifactError(f"onnxruntime cannot start {provider}. Check its driver and libraries")
    return session


def _providers() -> list[str]:
    """Return the names of the execution providers of the installed onnxruntime."""
    names: list[str] = ort.get_available_providers()
    return names


# The parts of ONNX's messages that lead to tensors, as {field number: message}
# (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
_TENSOR_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_FIELDS = (13, 14)  # a tensor's external_data and data_location
_VARINT, _EIGHT_BYTES, _LENGTH_DELIMITED, _FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types
_MAX_FIELDS = 10_000_000  # a network of a thousand nodes has about thirty thousand


def refuse_external_data(model: bytes, name: str) -> None:
    """Raise ArtifactError if a model reads weights from other files, or is not an ONNX model.

    An artifact's model is one file, and its author must not choose which files of this machine are read. Only
    the frames of protobuf messages are parsed, before any runtime sees the model.
    """
    content = memoryview(model)
    pending, fields = [("model", 0, len(content))], 0
    try:
        while pending:
            message, position, end = pending.pop()
            children = _TENSOR_FIELDS.get(message, {})
            while position < end:
                key, position = _read_varint(content, position)
                number, wire_type = key >> 3, key & 7
                fields += 1
                if fields > _MAX_FIELDS:
                    raise ValueError(f"more than {_MAX_FIELDS:,} fields")
                value = size = 0
                if wire_type == _VARINT:
                    value, position = _read_varint(content, position)
                elif wire_type == _LENGTH_DELIMITED:
                    size, position = _read_varint(content, position)
                elif wire_type in (_EIGHT_BYTES, _FOUR_BYTES):
                    size = 8 if wire_type == _EIGHT_BYTES else 4
                else:
                    raise ValueError(f"a field of wire type {wire_type}")
                if position + size > end:
                    raise ValueError("a field exceeds its message")
                is_set = value or wire_type == _LENGTH_DELIMITED
                if message == "tensor" and number in _EXTERNAL_FIELDS and is_set:
                    raise ArtifactError(f"{name} stores weights in another file, which is not allowed")
                if wire_type == _LENGTH_DELIMITED and number in children:
                    pending.append((children[number], position, position + size))
                position += size
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{name} is not a valid ONNX file: {error}") from error


def _read_varint(content: memoryview, position: int) -> tuple[int, int]:
    """Return protobuf's variable-length integer at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def open_checked(
    model: bytes, name: str, threads: int, providers: str | Sequence[str]
) -> ort.InferenceSession:
    if not name.endswith(ORT_SUFFIX):  # that format has no weights in other files
        refuse_external_data(model, name)
    return open_session(model, threads, name=name, providers=providers)
