"""Static int8 quantization (QDQ) by ONNX Runtime's quantizer, in types that have fast CPU kernels.

    float file ─ prepare ─► rewritten graph ─ calibrate ─► ranges ─ quantize ─► QDQ graph ─► int8 file

The search (`search.py`) repeats the last steps.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationMethod, QuantType, calibrate
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from .. import runtime
from ..conversion.batch import has_fixed_batch, set_batch
from ..conversion.onnx_export import OnnxFile, write_onnx
from ..conversion.pixel_input import Folded, Front, attach, has_uint8_input, split
from ..conversion.rewrite import FOR_INTEGERS, RULES, rewrite
from ..errors import CalibratorError, ExportError
from ..files import temporary_folder
from .targets import Target


@dataclass(frozen=True)
class Scope:
    """The part of a graph that becomes int8: operators by type, except the nodes in `kept_float`."""

    op_types: tuple[str, ...]
    kept_float: tuple[str, ...]


def int8_scope(model: onnx.ModelProto) -> Scope:
    """Decide which part of `model` becomes int8, and name nodes that have no name.

    Convolutional networks: all operators with an integer kernel in ONNX Runtime. Networks with LayerNorm
    (ViT, Swin, ConvNeXt) or GroupNorm (BiT): products with weights only, as 8 bits cannot represent their
    residual stream (ViT-Tiny: 28 dB of signal to noise instead of 11). Of norms in the heads of detectors,
    only what surrounds them stays float: RetinaNet with MobileNetV2-0.5 is 2.1 times as fast as in float,
    1.7 times with products only. Regions stay float up to their pooled values, as 8 bits are too few
    for coordinates. Products of two activations in attention, and softmax, never become int8:
    ONNX Runtime 1.31 fuses them incorrectly (3 dB instead of 28).
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    attention = []
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type == "MatMul" and not constants.intersection(node.input):
            attention.append(node.name)
    if only_products(model):
        return Scope(WEIGHTED, tuple(attention))
    kept = dict.fromkeys([*attention, *_around_norms(model), *_around_suppression(model)])
    return Scope(_INTEGER, tuple(kept))


def only_products(model: onnx.ModelProto) -> bool:
    """Return True if only products with weights become int8.

    So it is with norms; in a detector, if a sum of activations depends on a norm, as in a residual stream.
    """
    if len(model.graph.output) == 1:
        return any(node.op_type in _NORMS for node in model.graph.node)
    constants = {tensor.name for tensor in model.graph.initializer}
    normalized: set[str] = set()
    for node in model.graph.node:
        if node.op_type in _NORMS or normalized.intersection(node.input):
            normalized.update(node.output)
            if node.op_type == "Add" and not constants.intersection(node.input):
                return True
    return False


def _around_norms(model: onnx.ModelProto) -> list[str]:
    """Return the nodes between norms and the next product with weights, and reshapes before norms."""
    read = {name for node in model.graph.node if node.op_type in _NORMS for name in node.input}
    around = [node for node in model.graph.node if node.op_type == "Reshape" and read & set(node.output)]
    return [node.name for node in (*_after(model, _NORMS), *around) if node.op_type in _INTEGER]


def _around_suppression(model: onnx.ModelProto) -> list[str]:
    """Return the nodes that choose and pool regions: from the products before to those after suppression."""
    needed: set[str] = set()
    before = []
    for node in reversed(model.graph.node):
        if node.op_type in _SUPPRESSION or (needed & set(node.output) and node.op_type not in WEIGHTED):
            needed.update(node.input)
            before.append(node)
    nodes = (*before, *_after(model, _SUPPRESSION))
    return [node.name for node in nodes if node.op_type in _INTEGER]


def _after(model: onnx.ModelProto, op_types: Collection[str]) -> list[onnx.NodeProto]:
    """Return the nodes between operators of these types and the next product with weights."""
    computed: set[str] = set()
    after = []
    for node in model.graph.node:
        if node.op_type in op_types:
            computed.update(node.output)
        elif computed.intersection(node.input) and node.op_type not in WEIGHTED:
            computed.update(node.output)
            after.append(node)
    return after


WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Products with weights."""

# The exporter writes GroupNorm as InstanceNormalization.
_NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")
_SUPPRESSION = ("NonMaxSuppression",)
_INTEGER = tuple(sorted({*QDQRegistry, *QLinearOpsRegistry} - {*_NORMS, "Softmax"}))

log = logging.getLogger(__name__)

METHODS: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "percentile": (CalibrationMethod.Percentile, {"symmetric": False, "percentile": 99.99}),
    # Of chunks of 8 images: the mean over about the last twenty of them.
    "moving-average": (CalibrationMethod.MinMax, {"moving_average": True, "averaging_constant": 0.05}),
    "entropy": (CalibrationMethod.Entropy, {}),
}
"""In the search's order. ONNX Runtime's Distribution is left out: its ranges are unusable (−0.8 dB SQNR)."""

CHUNK = 8
"""Images per run: histograms hold all activations of a chunk in memory."""

Batches = Callable[[], Iterable[np.ndarray]] | Sequence[np.ndarray]
"""Preprocessed images, float32 [b, 3, H, W] each."""


def calibrate_ranges(
    model: onnx.ModelProto, calibration: Batches, method: str, op_types: Sequence[str]
) -> tuple[TensorsData, int]:
    """Return the ranges of inputs and outputs of operators in `op_types`, and the number of images used.

    Ranges and histograms of chunks are merged, so that memory does not grow with the number of images. Raises
    CalibratorError if the method cannot process the activations, and ExportError.
    """
    if method not in METHODS:
        raise ExportError(f"Unknown calibration method {method!r}. Choose from {', '.join(METHODS)}.")
    kind, options = METHODS[method]
    input_name = model.graph.input[0].name
    n = 0
    with temporary_folder() as folder, quiet():
        path = folder / "float.onnx"
        onnx.save(model, str(path))
        augmented = folder / "augmented.onnx"
        calibrator = create_calibrator(
            path, list(op_types), str(augmented), calibrate_method=kind, extra_options=dict(options)
        )
        calibrator.infer_session = _session(augmented)
        try:
            for chunk in chunks(calibration):
                if not np.isfinite(chunk).all():
                    raise ExportError("Calibration images contain values that are not finite.")
                # A reader that returns one batch; the calibrators merge the batches of successive calls.
                feeds = chain([{input_name: chunk}], repeat(None))
                calibrator.collect_data(SimpleNamespace(get_next=feeds.__next__))
                n += len(chunk)
            if n == 0:
                raise ExportError("int8 quantization requires calibration images; there are none.")
            ranges = calibrator.compute_data()
        except MemoryError as error:  # a histogram's bins are as wide as the first chunk's
            raise CalibratorError(
                f"calibrator {method} needs more memory than there is, as activations of later images are "
                "far larger than those of the first"
            ) from error
        del calibrator
    for name, tensor in ranges.items():
        low, high = tensor.range_value[:2]
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ExportError(
                f"The network cannot be quantized: activations on the calibration images are not finite "
                f"({name} ranges from {np.min(low)} to {np.max(high)})."
            )
    return ranges, n


def chunks(calibration: Batches) -> Iterator[np.ndarray]:
    """Yield calibration images as float32 arrays of at most `CHUNK`."""
    for batch in calibration() if callable(calibration) else calibration:
        for start in range(0, len(batch), CHUNK):
            yield np.ascontiguousarray(batch[start : start + CHUNK], dtype=np.float32)


def _session(path: Path) -> ort.InferenceSession:
    """Create a session for the calibrator, which would otherwise use all cores, even forbidden ones."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = runtime.default_threads()
    options.log_severity_level = 4  # less severe records contain names from the file
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def quiet() -> Iterator[None]:
    """Redirect prints and root-logger records of ONNX Runtime's tools to our log."""
    root = logging.getLogger()
    nothing = logging.NullHandler()  # without a handler, logging.warning() would install one for good

    def drop(record: logging.LogRecord) -> bool:
        log.debug("quantizer: %s", record.getMessage())
        return False

    root.addHandler(nothing)
    root.addFilter(drop)  # of the root logger itself: other loggers' records don't pass here
    try:
        with patch.object(calibrate, "print", log.debug, create=True):
            yield
    finally:
        root.removeFilter(drop)
        root.removeHandler(nothing)


_RECIPE = runtime.METADATA_PREFIX + "quantization"

Overrides = Mapping[str, Mapping[str, Any]]
"""`scale` and `zero_point` of activations by their name in the float graph, in place of calibrated ones."""


@dataclass(frozen=True)
class Int8File(OnnxFile):
    """A written int8 file and its recipe, which is JSON-ready and also in the file's metadata."""

    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A float graph ready for the quantizer: rewritten, all nodes named."""

    model: onnx.ModelProto
    scope: Scope
    rewritten: tuple[str, ...]
    front: Front | None = None
    """Preprocessing before this graph if the file has a uint8 input."""
    fixed_batch: bool = False
    """True if the file takes single images only; this graph takes any number."""

    def stem(self, types: Target) -> tuple[str, ...]:
        """Return convolutions of at most 3 × 3 on an input of at most 4 channels, which are faster in float.

        There are none if the input is uint8 and needs no conversion.
        """
        if not types.float_stem or isinstance(self.front, Folded):
            return ()
        constants = {tensor.name: tensor.dims for tensor in self.model.graph.initializer}
        return tuple(
            node.name
            for node in self.model.graph.node
            if node.op_type == "Conv"
            and node.input[0] == self.model.graph.input[0].name
            and node.input[1] in constants
            and constants[node.input[1]][1] <= 4
            and max(constants[node.input[1]][2:]) <= 3
        )

    def fed(self, calibration: Batches) -> Batches:
        """Convert images as the file takes them to inputs of this graph. Raises ExportError."""
        front = self.front
        if front is None:
            return calibration

        def batches() -> Iterator[np.ndarray]:
            for pixels in calibration() if callable(calibration) else calibration:
                if pixels.dtype != np.uint8:
                    raise ExportError(f"Calibration images must be uint8 for this model, got {pixels.dtype}.")
                yield front.feed(pixels)

        return batches


def prepare(fp32_path: str | Path, rules: Collection[str] | None = None) -> Prepared:
    """Read a float file and rewrite its graph by `rules`; None for those that make it faster.

    Raises ExportError.
    """
    try:
        model = onnx.load(str(fp32_path))
    except Exception as error:  # protobuf's exception isn't onnx's
        raise ExportError(f"{fp32_path} cannot be read as ONNX: {error}") from error
    fixed_batch = has_fixed_batch(model)
    if fixed_batch:
        set_batch(model, None)
    front = split(model) if has_uint8_input(model) else None
    if rules is None and only_products(model):
        rules = RULES.keys() - FOR_INTEGERS
    rewritten = rewrite(model, rules)
    return Prepared(model, int8_scope(model), tuple(rewritten), front, fixed_batch)


def recipe(
    prepared: Prepared, types: Target, calibration: Mapping[str, Any], kept_float: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the recipe of an int8 file, JSON-ready."""
    all_float = [*prepared.scope.kept_float, *prepared.stem(types), *kept_float]
    operators = {node.op_type for node in prepared.model.graph.node} & set(prepared.scope.op_types)
    return {
        "format": "QDQ",
        "target": types.name,
        **types.described,
        "calibration": dict(calibration),
        "rewritten": list(prepared.rewritten),
        "operators": sorted(operators),
        "kept_float": list(dict.fromkeys(all_float)),
        "quantizer": f"onnxruntime {ort.__version__}",
        **({} if prepared.front is None else {"input": f"uint8; {prepared.front.description}"}),
    }


def write_int8(
    prepared: Prepared, model: onnx.ModelProto, path: str | Path, made_by: Mapping[str, Any]
) -> Int8File:
    """Write a quantized graph atomically with its recipe in the metadata. Raises ExportError."""
    if prepared.front is not None:
        attach(model, prepared.front)
        onnx.checker.check_model(model)
    if prepared.fixed_batch:
        set_batch(model, 1)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    metadata.pop("onnx.infer", None)  # written by onnxruntime's quantizer
    metadata[_RECIPE] = json.dumps(dict(made_by), sort_keys=True)
    onnx.helper.set_model_props(model, metadata)
    file = write_onnx(model, Path(path))
    return Int8File(file.path, file.bytes, file.sha256, file.opset, file.ir_version, dict(made_by))


def read_recipe(path: Path) -> dict[str, Any] | None:
    """Return the recipe in the metadata of an int8 file; None if it has none."""
    model = onnx.load(str(path), load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    made_by: dict[str, Any] | None = json.loads(metadata.get(_RECIPE, "null"))
    return made_by


def quantize(
    prepared: Prepared,
    ranges: TensorsData,
    types: Target,
    *,
    kept_float: Sequence[str] = (),
    overrides: Overrides | None = None,
) -> onnx.ModelProto:
    """Return the QDQ graph of a prepared float graph, which is not changed. Raises ExportError.

    Args:
        kept_float: names of further nodes that stay float.
        overrides: scales and zero points that replace calibrated ones.
    """
    model = copy.deepcopy(prepared.model)
    tensor_overrides = {name: [dict(values)] for name, values in (overrides or {}).items()}
    if isinstance(prepared.front, Folded):
        tensor_overrides |= prepared.front.overrides(signed=types.activations == QuantType.QInt8)
    try:
        with quiet():
            quantizer = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=types.reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=types.activations,
                tensors_range=ranges,
                nodes_to_quantize=[],
                nodes_to_exclude=[*prepared.scope.kept_float, *prepared.stem(types), *kept_float],
                op_types_to_quantize=list(prepared.scope.op_types),
                extra_options={
                    "WeightSymmetric": True,
                    "TensorQuantOverrides": tensor_overrides,
                },
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            model = quantizer.model.model
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise ExportError(f"ONNX Runtime's quantizer failed: {error}.") from error
    model.producer_name = prepared.model.producer_name
    model.producer_version = prepared.model.producer_version
    used = {node.domain or "" for node in model.graph.node}
    for entry in [entry for entry in model.opset_import if (entry.domain or "") not in used]:
        model.opset_import.remove(entry)
    # The runtime infers the shapes of intermediate values; storing them would repeat every name.
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    onnx.checker.check_model(model)
    return model
