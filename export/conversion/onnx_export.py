"""A trained network as one ONNX file."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript import optimizer
from torch import nn

from .. import runtime
from ..errors import ExportError
from ..files import flush, write_bytes
from .pixel_input import INPUT, take_pixels

log = logging.getLogger(__name__)


LEAST_OPSET = 18
"""torch's exporter writes no older one, whatever it is asked for."""


@cache
def greatest_opset() -> int:
    """The newest opset that the installed onnx knows and the installed onnxruntime runs."""
    newest: int = onnx.defs.onnx_opset_version()
    return next(opset for opset in range(newest, LEAST_OPSET - 1, -1) if _runs(opset))


def check_opset(opset: int) -> None:
    """Raise ExportError where no file of this opset can be written and run here."""
    if not LEAST_OPSET <= opset <= greatest_opset():
        raise ExportError(
            f"opset {opset} cannot be written and run here: choose one from {LEAST_OPSET} to "
            f"{greatest_opset()} (onnxruntime {version('onnxruntime')}, onnx {version('onnx')})"
        )


def _runs(opset: int) -> bool:
    """Whether onnxruntime loads a model of this opset: it says so nowhere but in its answer."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "one node",
        [value("x", onnx.TensorProto.FLOAT, [1])],
        [value("y", onnx.TensorProto.FLOAT, [1])],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    ir_version = onnx.helper.find_min_ir_version_for(imports)
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    try:
        runtime.session(model.SerializeToString(), 1)
    except runtime.ArtifactError as refusal:
        log.debug("opset %d: %s", opset, refusal)
        return False
    return True


_CONSTANT = ("Constant", "")


def constant_reshapes(model: onnx_ir.Model) -> int:
    """Give such reshapes the target [-1, …], and return how many there were; the graph computes the same.

    PyTorch 2.11's exporter writes ``x.flatten(1)`` as Shape, Slice or Concat, and Reshape, where later ones
    write one Reshape. What counts the elements keeps a graph from being calibrated, equalised and trained as
    a chain of float operators, and costs two more kernels a run.
    """
    graph = model.graph
    found = 0
    for node in [node for node in graph if node.op_type == "Reshape" and node.domain == ""]:
        target, output = node.inputs[1], node.outputs[0]
        if target is None or _known(target) or output.shape is None or not output.shape:
            continue
        batch, *rest = output.shape.dims
        if isinstance(batch, int) or not all(isinstance(size, int) and size > 0 for size in rest):
            continue
        name = f"{output.name}_target"
        constant = onnx_ir.tensor(np.array([-1, *rest], np.int64), name=name)
        value = onnx_ir.Value(
            name=name,
            const_value=constant,
            shape=onnx_ir.Shape([len(output.shape)]),
            type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
        )
        graph.register_initializer(value)
        node.replace_input_with(1, value)
        found += 1
    return found


def _known(value: onnx_ir.Value) -> bool:
    producer = value.producer()
    return value.const_value is not None or (
        producer is not None and (producer.op_type, producer.domain) == _CONSTANT
    )


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
    write_bytes(path, content)
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


@dataclass(frozen=True)
class Parity:
    """How far the file's logits are from the network's: the largest difference over all images and batch
    sizes.

    `max_rel` is that difference over the spread (largest minus smallest) of the network's logits.
    """

    max_abs: float
    max_rel: float
    n: int
    batch_sizes: tuple[int, ...]


def check_parity(
    network: nn.Module,
    onnx_path: str | Path,
    images: torch.Tensor,
    *,
    pixels: np.ndarray | None = None,
    batch_sizes: Sequence[int] = (1, 5),
    tolerance: float = 1e-4,
) -> Parity:
    """Compare the file in onnxruntime with the network in torch on `images`, float32 [N, 3, S, S],
    preprocessed; of a file that takes pixels, `pixels` are the same images, uint8 [N, S, S, 3].

    Passes where the largest difference is within `tolerance`, absolute or relative to the logits' spread; an
    image must get the same answer at every batch size, too. Raises ExportError, saying by how much, and where
    logits aren't finite. The network computes in float32 on the CPU, as a copy.
    """
    if not len(images):
        raise ExportError("there are no images to compare the exported file with the network on")
    network = getattr(network, "_orig_mod", network)
    twin = copy.deepcopy(network).cpu().float().eval()
    images = images.detach().cpu().float()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = torch.cat([twin(chunk) for chunk in images.split(max(batch_sizes))]).numpy()
    # External weights are found beside the file, so it is opened by its path.
    session = runtime.session(Path(onnx_path), runtime.default_threads())
    if (session.get_inputs()[0].type == "tensor(uint8)") != (pixels is not None):
        raise ExportError(f"{onnx_path} takes pixels, and is compared on them, or neither")
    fed = images.numpy() if pixels is None else pixels
    answers = [
        np.concatenate([session.run(None, {INPUT: chunk})[0] for chunk in _chunks(fed, size)])
        for size in batch_sizes
    ]
    if any(answer.shape != expected.shape for answer in answers):
        raise ExportError(
            f"{onnx_path} gives logits of shape {answers[0].shape}, the network {expected.shape}"
        )
    if not all(np.isfinite(logits).all() for logits in (expected, *answers)):
        raise ExportError(f"the logits of the network or of {onnx_path} are not all finite numbers")
    spread = float(expected.max() - expected.min())
    max_abs = max(float(np.abs(answer - expected).max()) for answer in answers)
    between = max(float(np.abs(answer - answers[0]).max()) for answer in answers)

    def relative(difference: float) -> float:
        return difference / spread if spread > 0 else (0.0 if difference == 0 else float("inf"))

    parity = Parity(max_abs, relative(max_abs), len(images), tuple(batch_sizes))
    if min(parity.max_abs, parity.max_rel) > tolerance:
        raise ExportError(
            f"{onnx_path} does not compute what the network does: on {parity.n} images its logits differ by "
            f"up to {parity.max_abs:.2g} ({parity.max_rel:.2g} of their spread), {tolerance:g} is allowed"
        )
    if min(between, relative(between)) > tolerance:
        raise ExportError(
            f"{onnx_path} answers differently at batch sizes {', '.join(map(str, batch_sizes))}: by up to "
            f"{between:.2g}, {tolerance:g} is allowed"
        )
    return parity


def _chunks(images: np.ndarray, size: int) -> list[np.ndarray]:
    return [images[start : start + size] for start in range(0, len(images), size)]


TOLERANCE = 1e-4
"""Largest difference of the folded logits times T from the network's own, by the largest of these."""


class Tempered(nn.Module):
    """A network whose logits are divided by T after its last layer."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.factor = 1 / temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        return logits * self.factor


def fold_temperature(
    network: nn.Module, temperature: float, images: torch.Tensor
) -> tuple[nn.Module, Literal["last layer", "after the logits"]]:
    """A copy of ``network`` whose logits are divided by ``temperature``, and where that happens.

    Weight and bias of the classifier (timm's ``get_classifier``, a Linear or Conv2d) are divided, which costs
    nothing at inference. Where the logits are not that layer's plain output (two heads, a norm after it, tied
    or standardised weights), which ``images``, float32 [N,3,S,S], preprocessed, tell, the division becomes
    one more operation after the network.

    Raises ValueError where the temperature is not a positive number.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"a temperature is a positive number, not {temperature}")
    twin = copy.deepcopy(network).cpu().float().eval()
    get = getattr(twin, "get_classifier", None)
    classifier = get() if callable(get) else None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if isinstance(classifier, nn.Linear | nn.Conv2d):
            expected = twin(images)
            classifier.weight /= temperature
            if classifier.bias is not None:
                classifier.bias /= temperature
            off = (twin(images) * temperature - expected).abs().max()
            if off <= TOLERANCE * expected.abs().max():
                return twin, "last layer"
    return Tempered(copy.deepcopy(network).cpu().float().eval(), temperature), "after the logits"
