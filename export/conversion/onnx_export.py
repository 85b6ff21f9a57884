"""Export a trained network to one ONNX file and check that the file computes the same."""

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
from typing import Any, Literal

import numpy as np
import onnx.parser
import onnx_ir
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript import optimizer
from onnxscript.rewriter.rules.common import materialize_reshape_shape_rule
from torch import nn

from .. import runtime
from ..errors import ExportError
from ..files import flush, write_bytes
from ..results import Parity
from .pixel_input import INPUT, take_pixels
from .rewrite import RULES

log = logging.getLogger(__name__)

MIN_OPSET = 18
"""torch's exporter writes no older opset."""


@cache
def max_opset() -> int:
    """Return the newest opset that the installed onnx defines and the installed onnxruntime runs."""
    newest: int = onnx.defs.onnx_opset_version()
    return next(opset for opset in range(newest, MIN_OPSET - 1, -1) if _runs(opset))


def check_opset(opset: int) -> None:
    """Raise ExportError if this opset cannot be written and run with the installed packages."""
    if not MIN_OPSET <= opset <= max_opset():
        raise ExportError(
            f"Opset {opset} is not supported by onnx {version('onnx')} and onnxruntime "
            f"{version('onnxruntime')}. Choose one from {MIN_OPSET} to {max_opset()}."
        )


def _runs(opset: int) -> bool:
    """Return True if onnxruntime runs int8 models of this opset; it has no function that lists them."""
    ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model = onnx.parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["": {opset}]>'
        "probe (float[1] x, float scale) => (float[1] y)"
        "{ q = QuantizeLinear (x, scale) d = DequantizeLinear (q, scale) y = Relu (d) }"
    )
    try:
        runtime.open_session(model.SerializeToString(), 1)
    except runtime.ArtifactError as error:
        log.debug("opset %d: %s", opset, error)
        return False
    return True


OPSET, OUTPUT, BATCH = 18, "logits", "batch"
MAX_EMBEDDED_BYTES = 1_900_000_000
"""More weights than this go into a second file, as a protobuf message cannot exceed 2 GB."""


@dataclass(frozen=True)
class OnnxFile:
    """A written ONNX file.

    `bytes` includes external weights, `sha256` is the checksum of the .onnx file itself, and `ir_version`
    determines the oldest runtime that reads it.
    """

    path: Path
    bytes: int
    sha256: str
    opset: int
    ir_version: int


def export_onnx(
    network: nn.Module,
    path: str | Path,
    image_size: runtime.Size,
    *,
    metadata: Mapping[str, str],
    opset: int = OPSET,
    output: str = OUTPUT,
    pixels: runtime.Preprocessing | None = None,
) -> OnnxFile:
    """Write `network` to an ONNX file atomically: input 'input' float32 [batch, 3, H, W] with dynamic batch.

    A detector has a method `exportable`, which returns a module with outputs float32 [batch, A, n] and their
    `output_names`, and a property `decoder`, which is added to the metadata. Its `onnx_operators`, if it has
    some, translate its custom operators for torch's exporter.

    The graph computes in evaluation mode and float32. Source paths, stack traces and other traces of the
    machine are removed, and the same network gives the same bytes. `network` is not changed. Raises
    ExportError if it cannot be exported, or `opset` is not supported.

    Args:
        metadata: written as the metadata of the model.
        output: name of a classifier's output, float32 [batch, classes].
        pixels: if given, the input is uint8 [batch, H, W, 3], and the file itself normalizes it.
    """
    check_opset(opset)
    path = Path(path)
    model = _trace(network, image_size, opset, output)
    if model.opset_imports[""] != opset:
        raise ExportError(
            f"{type(network).__name__} cannot be exported to opset {opset}: the exporter wrote opset "
            f"{model.opset_imports['']}. Use --opset {model.opset_imports['']} or omit it."
        )
    _fold_computed_weights(model)
    if RULES["clip_hard_sigmoid"](model):
        optimizer.remove_unused_nodes(model)
    # PyTorch 2.11 writes x.flatten(1) as a Reshape to a computed shape, which could not be calibrated.
    if materialize_reshape_shape_rule.apply_to_model(model):
        LiftConstantsToInitializersPass(size_limit=0)(model)
        optimizer.remove_unused_nodes(model)
    _strip(model)
    if is_detector(network):
        metadata = {**metadata, **runtime.decoder_metadata(_unwrap(network).decoder)}
    model.metadata_props.update(sorted(metadata.items()))
    model.producer_name, model.producer_version = "questpress", None
    model.ir_version = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    )
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    large = size > MAX_EMBEDDED_BYTES
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
    file = write_onnx(proto, path)
    path.with_name(path.name + ".data").unlink(missing_ok=True)
    return file


def write_onnx(proto: onnx.ModelProto, path: Path) -> OnnxFile:
    """Write a model atomically; the same model gives the same bytes."""
    content = proto.SerializeToString(deterministic=True)
    write_bytes(path, content)
    return _describe(path, content, proto)


def with_metadata(file: OnnxFile, metadata: Mapping[str, str]) -> OnnxFile:
    """Rewrite a file with these metadata entries added or replaced; external weights are not touched."""
    proto = onnx.load(file.path, load_external_data=False)
    entries = {entry.key: entry.value for entry in proto.metadata_props} | dict(metadata)
    before = file.path.stat().st_size
    onnx.helper.set_model_props(proto, dict(sorted(entries.items())))
    written = write_onnx(proto, file.path)
    return replace(written, bytes=file.bytes - before + written.bytes)


def describe(path: Path) -> OnnxFile:
    """Return the properties of a file without external weights."""
    content = path.read_bytes()
    return _describe(path, content, onnx.load_model_from_string(content))


def _describe(path: Path, content: bytes, proto: onnx.ModelProto) -> OnnxFile:
    sha256 = hashlib.sha256(content).hexdigest()
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return OnnxFile(path, len(content), sha256, opset, proto.ir_version)


def is_detector(network: Any) -> bool:
    """Return True for a network with class logits and box offsets, see `export_onnx`."""
    return hasattr(_unwrap(network), "exportable")


def _unwrap(network: Any) -> Any:
    return getattr(network, "_orig_mod", network)  # torch.compile's wrapper


def _exported_part(network: Any) -> Any:
    return _unwrap(network).exportable() if is_detector(network) else _unwrap(network)


def _trace(network: nn.Module, image_size: runtime.Size, opset: int, output: str) -> onnx_ir.Model:
    network = _unwrap(network)
    part = _exported_part(network)
    names, dims = (list(part.output_names), 3) if is_detector(network) else ([output], 2)
    try:
        # A copy, so that flags, device, dtype and memory format of the caller's network stay what they were.
        network_copy = merge_branches(part).requires_grad_(False).to(memory_format=torch.contiguous_format)
        for module in network_copy.modules():
            if "inplace" in vars(module):  # its decomposition takes half of the exporter's time
                vars(module)["inplace"] = False
        # A batch of 1 would be exported as a constant.
        size = runtime.height_width(image_size)
        example = torch.zeros(2, 3, *size, device="cpu", dtype=torch.float32)
        with _quiet(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            program = torch.onnx.export(
                network_copy,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                opset_version=opset,
                custom_translation_table=getattr(network, "onnx_operators", None),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the network's code and torch.export raise
        log.debug("the exporter failed", exc_info=True)
        raise ExportError(
            f"{type(network).__name__} at {image_size} px cannot be exported to ONNX: {_sentence(error)}"
        ) from error
    assert program is not None
    model: onnx_ir.Model = program.model
    inputs, outputs = model.graph.inputs, model.graph.outputs
    if len(inputs) != 1 or len(outputs) != len(names):
        raise ExportError(
            f"{type(network).__name__} has {len(inputs)} inputs and {len(outputs)} outputs. "
            f"It must have images and {', '.join(names)}."
        )
    input_shape = inputs[0].shape
    if input_shape is None or isinstance(input_shape[0], int):
        raise ExportError(f"{type(network).__name__} supports one batch size only: its code fixes it.")
    for value in outputs:
        if value.shape is None or len(value.shape) != dims:
            rest = "classes" if dims == 2 else "anchors, n"
            raise ExportError(f"{type(network).__name__} returns {value.shape}, not [batch, {rest}].")
        value.shape = onnx_ir.Shape([input_shape[0], *value.shape[1:]])
    return model


def merge_branches(network: nn.Module) -> nn.Module:
    """Return a float32 copy on the CPU whose branches for training are merged into single layers.

    MobileOne, RepVGG, RepViT, FastViT and others train with parallel branches that one convolution replaces
    at inference. Weights are merged in float64; networks without such branches are copied only.
    """
    from timm.utils import reparameterize_model

    with torch.no_grad():
        merged: nn.Module = reparameterize_model(copy.deepcopy(network).cpu().double().eval(), inplace=True)
    return merged.float().eval()


def _fold_computed_weights(model: onnx_ir.Model) -> None:
    """Fold the weight standardization of BiT and NFNet, which the quantizer could not see through.

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
    """Remove source files, stack traces and module names that the exporter records."""
    parts: list[Any] = [model, *model.functions.values()]
    nodes = [node for function in model.functions.values() for node in function.all_nodes()]
    for graph in model.graphs():
        parts += [graph, *graph.inputs, *graph.initializers.values()]
        nodes += graph
    parts += [part for node in nodes for part in (node, *node.outputs)]
    for part in parts:
        part.doc_string = None
        part.metadata_props.clear()


def _write_with_external_data(model: onnx_ir.Model, path: Path) -> OnnxFile:
    """Write the weights and then the graph, which refers to them, each atomically."""
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
    checksum, opset = hashlib.sha256(graph).hexdigest(), model.opset_imports[""]
    return OnnxFile(path, len(graph) + size, checksum, opset, model.ir_version)


@contextmanager
def _quiet() -> Iterator[None]:
    """Send the exporter's warnings to our log instead of the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    for message in messages:
        log.debug("exporter: %s", message.message)


def _sentence(error: BaseException) -> str:
    """Return the first line of the innermost error: the exporter wraps one failure into pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_parity(
    network: nn.Module,
    onnx_path: str | Path,
    images: torch.Tensor,
    *,
    pixels: np.ndarray | None = None,
    batch_sizes: Sequence[int] = (1, 5),
    tolerance: float = 1e-4,
) -> Parity:
    """Compare the outputs of the file in onnxruntime with those of the network in torch.

    The largest difference of each output at any batch size must be within `tolerance`, absolute or relative
    to its spread. Raises ExportError otherwise, or if values are not finite. The result describes the output
    that differs most.

    Args:
        images: preprocessed, float32 [N, 3, H, W].
        pixels: the same images, uint8 [N, H, W, 3], if the file has a uint8 input.
    """
    if not len(images):
        raise ExportError("The exported file cannot be compared with the network: there are no images.")
    network = copy.deepcopy(_exported_part(network)).cpu().float().eval()
    images = images.detach().cpu().float()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        parts = [network(chunk) for chunk in images.split(max(batch_sizes))]
    parts = [part if isinstance(part, tuple) else (part,) for part in parts]
    # Opened by its path, as external weights are in the same folder.
    session = runtime.open_session(Path(onnx_path), runtime.default_threads())
    if (session.get_inputs()[0].type == "tensor(uint8)") != (pixels is not None):
        raise ExportError(f"{onnx_path}: `pixels` is required for a uint8 input, and only for that.")
    batch = images.numpy() if pixels is None else pixels
    runs = [
        [session.run(None, {INPUT: chunk}) for chunk in np.split(batch, range(size, len(batch), size))]
        for size in batch_sizes
    ]
    results = [
        _compare(
            [np.concatenate([chunk[index] for chunk in chunks]) for chunks in runs],
            torch.cat([part[index] for part in parts]).numpy(),
            f"{onnx_path}: {output.name}",
            tolerance,
        )
        for index, output in enumerate(session.get_outputs())
    ]
    max_abs, max_rel = max(results, key=min)
    return Parity(max_abs=max_abs, max_rel=max_rel, n=len(images), batch_sizes=tuple(batch_sizes))


def _compare(
    outputs: Sequence[np.ndarray], expected: np.ndarray, name: str, tolerance: float
) -> tuple[float, float]:
    """Return the largest difference from `expected`, absolute and relative to its spread."""
    if any(values.shape != expected.shape for values in outputs):
        raise ExportError(f"{name} of shape {outputs[0].shape}, the network {expected.shape}.")
    if not all(np.isfinite(values).all() for values in (expected, *outputs)):
        raise ExportError(f"{name} of the file or of the network are not finite.")
    spread = float(expected.max() - expected.min())
    max_abs = max(float(np.abs(values - expected).max()) for values in outputs)
    max_rel = max_abs / spread if spread > 0 else (0.0 if max_abs == 0 else math.inf)
    if min(max_abs, max_rel) > tolerance:
        raise ExportError(
            f"{name} differ from the network's by up to {max_abs:.2g} ({max_rel:.2g} of their spread) on "
            f"{len(expected)} images, {tolerance:g} is allowed."
        )
    return max_abs, max_rel


FOLDING_TOLERANCE = 1e-4
"""Largest difference of the folded logits times T from the network's logits, relative to the largest."""


class TemperatureScaled(nn.Module):
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
    """Return a copy of `network` whose logits are divided by `temperature`, and the place of the division.

    Weight and bias of the classifier (timm's `get_classifier`, a Linear or Conv2d) are divided, which costs
    nothing at inference. If the logits are not the plain output of that layer (two heads, a norm after it,
    tied or standardized weights), one more operation after the network divides.

    Args:
        images: to check that the folded network is equal; preprocessed, float32 [N, 3, H, W].
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature}.")
    scaled: Any = copy.deepcopy(network).cpu().float().eval()
    classifier = scaled.get_classifier() if hasattr(scaled, "get_classifier") else None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if isinstance(classifier, nn.Linear | nn.Conv2d):
            expected = scaled(images)
            classifier.weight /= temperature
            if classifier.bias is not None:
                classifier.bias /= temperature
            difference = (scaled(images) * temperature - expected).abs().max()
            if difference <= FOLDING_TOLERANCE * expected.abs().max():
                return scaled, "last layer"
    return TemperatureScaled(copy.deepcopy(network).cpu().float().eval(), temperature), "after the logits"
