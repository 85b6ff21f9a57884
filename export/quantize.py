"""Float ONNX to static int8 QDQ through ONNX Runtime's own quantizer, in the types its CPU kernels like."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, calibrate
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from . import runtime
from .errors import ExportError
from .onnx_export import OnnxFile, write_onnx
from .rewriting import FOR_INTEGERS, RULES, rewrite

log = logging.getLogger(__name__)

METHODS = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "entropy": (CalibrationMethod.Entropy, {}),
    "percentile": (CalibrationMethod.Percentile, {"symmetric": False, "percentile": 99.99}),
}
# Histograms hold every activation of a chunk at once.
_CHUNK = 8

Batches = Callable[[], Iterable[np.ndarray]] | Sequence[np.ndarray]


@dataclass(frozen=True)
class Int8File(OnnxFile):
    """A written int8 file and the recipe it was made by (JSON-ready; in the file's metadata, too)."""

    recipe: dict[str, Any] = field(default_factory=dict)


def quantize_int8(
    fp32_path: str | Path,
    int8_path: str | Path,
    calibration: Batches,
    *,
    method: str = "minmax",
    reduce_range: bool = False,
    rules: Collection[str] | None = None,
) -> Int8File:
    """Write the int8 form of a float ONNX file: QDQ, activations uint8 asymmetric, weights int8 per channel.

    `calibration` gives preprocessed images, float32 [b, 3, S, S] each, whose activations set the ranges by
    `method` ('minmax', 'entropy', 'percentile'). `reduce_range` keeps weights to 7 bits, for x86 without
    VNNI, whose 16-bit sums saturate otherwise. `rules` names the rewritings of the graph beforehand;
    None: those that pay. Metadata is carried over; the same input gives the same bytes. Raises ExportError.
    (Facts behind the types: only u8×s8 has the fast convolution kernel on x86, and only asymmetric
    activations let ReLU and Clip fold away.)
    """
    if method not in METHODS:
        raise ExportError(f"no calibration method {method!r}; there are {', '.join(METHODS)}")
    try:
        model = onnx.load(str(fp32_path))
    except Exception as error:  # protobuf's exception isn't onnx's
        raise ExportError(f"{fp32_path} cannot be read as ONNX: {error}") from error
    if rules is None and int8_scope(model).op_types != _INTEGER:
        rules = RULES.keys() - FOR_INTEGERS
    rewritten = rewrite(model, rules)
    scope = int8_scope(model)
    ranges, n = calibrate_ranges(model, calibration, method, scope.op_types)
    recipe = {
        "format": "QDQ",
        "activations": "uint8 asymmetric",
        "weights": "int8 symmetric per channel",
        "reduce_range": reduce_range,
        "calibration": {"method": method, "images": n},
        "rewritten": rewritten,
        "operators": sorted({node.op_type for node in model.graph.node} & set(scope.op_types)),
        "kept_float": list(scope.kept_float),
        "quantizer": f"onnxruntime {ort.__version__}",
    }
    model = _quantized(model, ranges, scope, reduce_range)
    onnx.helper.set_model_props(
        model,
        {entry.key: entry.value for entry in model.metadata_props}
        | {runtime.METADATA_PREFIX + "quantization": json.dumps(recipe, sort_keys=True)},
    )
    file = write_onnx(model, Path(int8_path))
    return Int8File(file.path, file.bytes, file.sha256, file.opset, file.ir_version, recipe)


@dataclass(frozen=True)
class Scope:
    """What of a graph becomes int8: operators by type, but for the nodes named in `kept_float`."""

    op_types: tuple[str, ...]
    kept_float: tuple[str, ...]


def int8_scope(model: onnx.ModelProto) -> Scope:
    """Decide what of `model` is fit for int8; names nodes that have no name.

    A convolutional network: every operator ONNX Runtime has an integer kernel for. One with LayerNorm (ViT,
    Swin, ConvNeXt) or GroupNorm (BiT): products with weights only, for its residual stream spans more than 8
    bits hold (ViT-Tiny: 28 dB of signal to noise instead of 11). Attention's products of two activations
    never: fused by ONNX Runtime 1.31 they compute something else than the graph says (3 dB instead of 28),
    and softmax with them.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    attention = []
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type == "MatMul" and not constants.intersection(node.input):
            attention.append(node.name)
    normalised = any(node.op_type in _NORMS for node in model.graph.node)
    op_types = _WEIGHTED if normalised else _INTEGER
    return Scope(op_types, tuple(attention))


_WEIGHTED = ("Conv", "Gemm", "MatMul")
_NORMS = (
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
)  # GroupNorm is written as the second
_INTEGER = tuple(sorted({*QDQRegistry, *QLinearOpsRegistry} - {*_NORMS, "Softmax"}))


def calibrate_ranges(
    model: onnx.ModelProto, calibration: Batches, method: str, op_types: Sequence[str]
) -> tuple[TensorsData, int]:
    """The range of every activation beside an operator of `op_types`, and how many images it was taken from.

    Raises ExportError where there is none, or where an image or an activation isn't finite.
    """
    kind, options = METHODS[method]
    input_name = model.graph.input[0].name
    n = 0
    with tempfile.TemporaryDirectory(prefix="questpress-") as folder, _quiet():
        path = Path(folder) / "float.onnx"
        onnx.save(model, str(path))
        augmented = Path(folder) / "augmented.onnx"
        calibrator = create_calibrator(
            path, list(op_types), str(augmented), calibrate_method=kind, extra_options=options
        )
        calibrator.infer_session = _calibration_session(augmented)
        for chunk in _chunks(calibration):
            if not np.isfinite(chunk).all():
                raise ExportError("calibration images hold values that are not finite numbers")
            calibrator.collect_data(_One({input_name: chunk}))
            n += len(chunk)
        if n == 0:
            raise ExportError("int8 needs calibration images, and there are none")
        ranges = calibrator.compute_data()
        del calibrator
    for name, tensor in ranges.items():
        low, high = tensor.range_value[:2]
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ExportError(
                f"the network's activations on the calibration images are not finite ({name} ranges from "
                f"{np.min(low)} to {np.max(high)}): it cannot be quantized"
            )
    return ranges, n


def _quantized(
    model: onnx.ModelProto, ranges: TensorsData, scope: Scope, reduce_range: bool
) -> onnx.ModelProto:
    producer = model.producer_name, model.producer_version
    try:
        with _quiet():
            quantizer = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=ranges,
                nodes_to_quantize=[],
                nodes_to_exclude=list(scope.kept_float),
                op_types_to_quantize=list(scope.op_types),
                extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            model = quantizer.model.model
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise ExportError(f"ONNX Runtime's quantizer failed: {error}") from error
    model.producer_name, model.producer_version = producer
    used = {node.domain or "" for node in model.graph.node}
    imports = [entry for entry in model.opset_import if (entry.domain or "") in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    # Shapes of intermediate values: the runtime infers them, and they name every tensor once more.
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    onnx.checker.check_model(model)
    return model


class _One(CalibrationDataReader):
    """One batch, once: ONNX Runtime's calibrators merge what they see from call to call."""

    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self._feed: dict[str, np.ndarray] | None = feed

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed, self._feed = self._feed, None
        return feed


def _chunks(calibration: Batches) -> Iterator[np.ndarray]:
    for batch in calibration() if callable(calibration) else calibration:
        for start in range(0, len(batch), _CHUNK):
            yield np.ascontiguousarray(batch[start : start + _CHUNK], dtype=np.float32)


def _calibration_session(path: Path) -> ort.InferenceSession:
    """As the calibrator's own, which would start a thread for each core of the host, allowed or not."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = runtime.default_threads()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's prints and its use of the root logger away from the terminal."""
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
