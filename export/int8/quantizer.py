"""Float ONNX to static int8 QDQ through ONNX Runtime's own quantizer, in the types its CPU kernels like.

    float file ─ prepare ─► rewritten graph ─ calibrate ─► ranges ─ quantize ─► QDQ graph ─► int8 file

`quantize_int8` does all of it once; the search (`search.py`) goes through the last steps again and again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from .. import runtime
from ..conversion.onnx_export import OnnxFile, write_onnx
from ..conversion.pixel_input import attach, has_uint8_input, split
from ..errors import ExportError
from ..ranges import Batches, calibrate_ranges, quiet
from ..rewriting import FOR_INTEGERS, RULES, rewrite
from ..scope import Scope, int8_scope, only_products, stem
from ..uint8_front import Folded, Front
from .targets import Target, target

Overrides = Mapping[str, Mapping[str, Any]]
"""Of an activation by its name in the float graph: `scale` and `zero_point` instead of those of its range."""


@dataclass(frozen=True)
class Int8File(OnnxFile):
    """A written int8 file and the recipe it was made by (JSON-ready; in the file's metadata, too)."""

    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A float graph as it goes into the quantizer: rewritten, its nodes named."""

    model: onnx.ModelProto
    scope: Scope
    rewritten: tuple[str, ...]
    front: Front | None = None
    """What a file that takes pixels has before this graph."""

    def stem(self, types: Target) -> tuple[str, ...]:
        """What of it is faster in float; pixels go in as integers, so that nothing is converted."""
        return stem(self.model) if types.float_stem and not isinstance(self.front, Folded) else ()

    def fed(self, calibration: Batches) -> Batches:
        """What the graph takes, from what the file takes. Raises ExportError for numbers of another kind."""
        front = self.front
        if front is None:
            return calibration

        def batches() -> Iterator[np.ndarray]:
            for pixels in calibration() if callable(calibration) else calibration:
                if pixels.dtype != np.uint8:
                    raise ExportError(f"the model takes pixels, uint8, and is calibrated on {pixels.dtype}")
                yield front.feed(pixels)

        return batches


def quantize_int8(
    fp32_path: str | Path,
    int8_path: str | Path,
    calibration: Batches,
    *,
    method: str = "minmax",
    target_name: str | None = None,
    rules: Collection[str] | None = None,
) -> Int8File:
    """Write the int8 form of a float ONNX file, without a search: QDQ, in the types of a target.

    Args:
        calibration: preprocessed images, float32 [b, 3, S, S] each, or of a file that takes pixels those,
            uint8 [b, S, S, 3]; their activations set the ranges.
        method: how they do: one of `ranges.METHODS`.
        target_name: one of `targets.TARGETS`; this machine's where none is named.
        rules: which rewritings of the graph come first; None: those that pay.

    Metadata is carried over; the same input gives the same bytes. Raises ExportError.
    """
    types = target(target_name or runtime.target_of_this_machine())
    prepared = prepare(fp32_path, rules)
    ranges, n = calibrate_ranges(prepared.model, prepared.fed(calibration), method, prepared.scope.op_types)
    model = quantize(prepared, ranges, types)
    made_by = recipe(prepared, types, {"method": method, "images": n})
    return write_int8(prepared, model, int8_path, made_by)


def prepare(fp32_path: str | Path, rules: Collection[str] | None = None) -> Prepared:
    """Read a float file and bring its graph into the form that runs best in int8.

    `rules` are those of `rewriting`; None: those that pay. Raises ExportError.
    """
    try:
        model = onnx.load(str(fp32_path))
    except Exception as error:  # protobuf's exception isn't onnx's
        raise ExportError(f"{fp32_path} cannot be read as ONNX: {error}") from error
    front = split(model) if has_uint8_input(model) else None
    if rules is None and only_products(model):
        rules = RULES.keys() - FOR_INTEGERS
    rewritten = rewrite(model, rules)
    return Prepared(model, int8_scope(model), tuple(rewritten), front)


def recipe(
    prepared: Prepared, types: Target, calibration: Mapping[str, Any], kept_float: Sequence[str] = ()
) -> dict[str, Any]:
    """How an int8 file is made, JSON-ready."""
    scope = prepared.scope
    left = [*scope.kept_float, *prepared.stem(types), *kept_float]
    return {
        "format": "QDQ",
        "target": types.name,
        **types.described,
        "calibration": dict(calibration),
        "rewritten": list(prepared.rewritten),
        "operators": sorted({node.op_type for node in prepared.model.graph.node} & set(scope.op_types)),
        "kept_float": list(dict.fromkeys(left)),
        "quantizer": f"onnxruntime {ort.__version__}",
        **({} if prepared.front is None else {"input": f"uint8; {prepared.front.told}"}),
    }


def write_int8(
    prepared: Prepared, model: onnx.ModelProto, path: str | Path, made_by: Mapping[str, Any]
) -> Int8File:
    """Write the quantized form of a prepared graph whole, its recipe in its metadata. Raises ExportError."""
    if prepared.front is not None:
        attach(model, prepared.front)
        onnx.checker.check_model(model)
    known = {entry.key: entry.value for entry in model.metadata_props}
    said = {runtime.METADATA_PREFIX + "quantization": json.dumps(dict(made_by), sort_keys=True)}
    onnx.helper.set_model_props(model, known | said)
    file = write_onnx(model, Path(path))
    return Int8File(file.path, file.bytes, file.sha256, file.opset, file.ir_version, dict(made_by))


def recipe_of(path: Path) -> dict[str, Any] | None:
    """The recipe that an int8 file was written with; None of a file that says nothing of it."""
    model = onnx.load(str(path), load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    found: dict[str, Any] | None = json.loads(said.get(runtime.METADATA_PREFIX + "quantization", "null"))
    return found


def quantize(
    prepared: Prepared,
    ranges: TensorsData,
    types: Target,
    *,
    kept_float: Sequence[str] = (),
    overrides: Overrides | None = None,
) -> onnx.ModelProto:
    """The QDQ graph of a prepared float graph, which stays as it is.

    Args:
        kept_float: names of further nodes that stay float.
        overrides: scales and zero points that were learned and not calibrated.

    Raises ExportError.
    """
    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    producer = model.producer_name, model.producer_version
    excluded = [*prepared.scope.kept_float, *prepared.stem(types), *kept_float]
    try:
        with quiet():
            quantizer = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=types.reduce_range,
                weight_qType=types.weights,
                activation_qType=types.activations,
                tensors_range=ranges,
                nodes_to_quantize=[],
                nodes_to_exclude=excluded,
                op_types_to_quantize=list(prepared.scope.op_types),
                extra_options={
                    "ActivationSymmetric": types.symmetric,
                    "WeightSymmetric": True,
                    "TensorQuantOverrides": _overrides(prepared, types, overrides or {}),
                },
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


def _overrides(prepared: Prepared, types: Target, given: Overrides) -> dict[str, list[dict[str, Any]]]:
    """As ONNX Runtime takes them; pixels are quantized already, whatever the activations are."""
    found = {name: [dict(one)] for name, one in given.items()}
    if prepared.front is not None:
        found |= prepared.front.overrides(signed=types.activations == QuantType.QInt8)
    return found
