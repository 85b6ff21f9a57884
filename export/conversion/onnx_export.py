"""A trained network as one ONNX file."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir
import torch
from onnxscript import optimizer
from torch import nn

from .. import runtime
from ..errors import ExportError
from ..files import flush, write_whole
from ..opset import check_opset
from ..reshapes import constant_reshapes
from ..uint8_front import INPUT
from .pixel_input import take_pixels

log = logging.getLogger(__name__)

OPSET = 18
OUTPUT, BATCH = "logits", "batch"
SINGLE_FILE = 1_900_000_000
"""Bytes of weights that lie in the graph's own file: protobuf holds 2 GB. More go into a file beside it."""


@dataclass(frozen=True)
class OnnxFile:
    """A written ONNX file: its size in bytes (with external weights, where there are any) and what it needs.

    `sha256` is that of the .onnx file itself; `ir_version` decides the oldest runtime that reads it.
    """

    path: Path
    bytes: int
    sha256: str
    opset: int
    ir_version: int


def export_onnx(
    network: nn.Module,
    path: str | Path,
    image_size: int,
    *,
    metadata: Mapping[str, str],
    opset: int = OPSET,
    output: str = OUTPUT,
    pixels: runtime.Preprocessing | None = None,
) -> OnnxFile:
    """Write `network` as ONNX: input 'input' float32 [batch, 3, S, S], output 'logits' [batch, classes], or
    another name for what it gives. With `pixels` the input is uint8 [batch, S, S, 3], which the file
    normalises itself, as that preprocessing says.

    The graph is that of evaluation in float32 on the CPU, with a dynamic batch. Source paths, stack traces
    and all other traces of the machine are removed, `metadata` is written as the model's own, and the same
    network gives the same bytes. `network` is left as it was. Raises ExportError, also for an `opset` that
    `check_opset` refuses; the file is written whole or not at all.
    """
    check_opset(opset)
    path = Path(path)
    model = _traced(network, image_size, opset, output)
    if model.opset_imports[""] != opset:
        raise ExportError(
            f"{type(network).__name__} cannot be written in opset {opset}: the exporter wrote opset "
            f"{model.opset_imports['']}; ask for that one, or for none"
        )
    _fold_computed_weights(model)
    if constant_reshapes(model):
        optimizer.remove_unused_nodes(model)
    _strip(model)
    model.metadata_props.update(sorted(metadata.items()))
    model.producer_name, model.producer_version = "questpress", None
    model.ir_version = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    )
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    large = size > SINGLE_FILE
    if large and pixels is None:
        return _write_with_external_data(model, path)
    proto = onnx_ir.to_proto(model)
    if pixels is not None:
        take_pixels(proto, pixels.mean, pixels.std)
    if large:
        return _write_with_external_data(onnx_ir.from_proto(proto), path)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the checker's and shape inference's exceptions share no base class
        raise ExportError(f"the exported graph is not valid ONNX: {_sentence(error)}") from error
    path.with_name(path.name + ".data").unlink(missing_ok=True)
    return write_onnx(proto, path)


def write_onnx(proto: onnx.ModelProto, path: Path) -> OnnxFile:
    """Write a model whole or not at all, the same bytes for the same model."""
    content = proto.SerializeToString(deterministic=True)
    write_whole(path, content)
    return OnnxFile(
        path, len(content), hashlib.sha256(content).hexdigest(), opset_of(proto), proto.ir_version
    )


def with_metadata(file: OnnxFile, metadata: Mapping[str, str]) -> OnnxFile:
    """Write a file anew with these entries in the place of those of the same name; its weights stay."""
    proto = onnx.load(file.path, load_external_data=False)
    entries = {entry.key: entry.value for entry in proto.metadata_props} | dict(metadata)
    before = file.path.stat().st_size
    onnx.helper.set_model_props(proto, dict(sorted(entries.items())))
    written = write_onnx(proto, file.path)
    return replace(written, bytes=file.bytes - before + written.bytes)


def describe(path: Path) -> OnnxFile:
    """What is known of a written file whose weights are in it."""
    content = path.read_bytes()
    proto = onnx.load_model_from_string(content)
    return OnnxFile(
        path, len(content), hashlib.sha256(content).hexdigest(), opset_of(proto), proto.ir_version
    )


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operator set that a model is written in."""
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def _traced(network: nn.Module, image_size: int, opset: int, output: str) -> onnx_ir.Model:
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper
    try:
        # A copy, so that flags, device, dtype and memory format of the caller's network stay what they were.
        twin = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
        twin = twin.to(memory_format=torch.contiguous_format)
        # A batch of 1 would be taken for a constant.
        example = torch.zeros(2, 3, image_size, image_size, device="cpu", dtype=torch.float32)
        with _quiet(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            program = torch.onnx.export(
                twin,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the network's code and torch.export raise
        log.debug("the exporter failed", exc_info=True)
        raise ExportError(
            f"{type(network).__name__} at {image_size} px cannot be exported to ONNX: {_sentence(error)}"
        ) from error
    if program is None:
        raise ExportError(f"{type(network).__name__} at {image_size} px cannot be exported to ONNX")
    model: onnx_ir.Model = program.model
    inputs, outputs = model.graph.inputs, model.graph.outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise ExportError(
            f"{type(network).__name__} has {len(inputs)} inputs and {len(outputs)} outputs; "
            "a classifier takes images and gives logits"
        )
    taken, given = inputs[0].shape, outputs[0].shape
    if given is None or len(given) != 2:
        raise ExportError(f"{type(network).__name__} gives an output of shape {given}, not [batch, classes]")
    if taken is None or isinstance(taken[0], int):
        raise ExportError(f"{type(network).__name__} takes one batch size only: its code fixes it")
    outputs[0].shape = onnx_ir.Shape([taken[0], given[1]])
    return model


def _fold_computed_weights(model: onnx_ir.Model) -> None:
    """Compute once what standardised weights (BiT, NFNet) would cost every run, and hide from the quantizer.

    The exporter folds small constants only.
    """
    weighted = [node for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "Gemm")]
    weights = [node.inputs[1] for node in weighted]
    if any(weight is not None and weight.const_value is None for weight in weights):
        no_limit = 1 << 62
        optimizer.fold_constants(
            model, onnx_shape_inference=False, input_size_limit=no_limit, output_size_limit=no_limit
        )
        optimizer.optimize(model, onnx_shape_inference=False)


def _strip(model: onnx_ir.Model) -> None:
    """Remove what the exporter notes of source files, stack traces and module names."""
    model.doc_string = None
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            values += node.outputs
        for value in values:
            value.doc_string = None
            value.metadata_props.clear()
    for function in model.functions.values():
        function.doc_string = None
        function.metadata_props.clear()
        for node in function.all_nodes():
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                value.doc_string = None
                value.metadata_props.clear()


def _write_with_external_data(model: onnx_ir.Model, path: Path) -> OnnxFile:
    """Weights and graph, each whole or not at all; the graph, which names the weights' file, takes its place
    last.
    """
    data = path.with_name(path.name + ".data")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        onnx_ir.save(model, part / path.name, external_data=data.name)
        onnx.checker.check_model(str(part / path.name))
        graph, size = (part / path.name).read_bytes(), (part / data.name).stat().st_size
        for file in (data, path):
            flush(part / file.name)
            (part / file.name).replace(file)
        flush(path.parent)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX: {_sentence(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return OnnxFile(
        path,
        len(graph) + size,
        hashlib.sha256(graph).hexdigest(),
        model.opset_imports[""],
        model.ir_version,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Send the exporter's warnings and logging to our own log, away from the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    for remark in remarks:
        log.debug("exporter: %s", remark.message)


def _sentence(error: BaseException) -> str:
    """The first line of the innermost error: the exporter wraps one failure into pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
