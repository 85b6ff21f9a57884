"""Search for the int8 file that loses no more accuracy than allowed and is as fast as that permits.

    1. ranges from quantization-aware training, then one calibrator after another   on the graph as it is
    2. the best of them on the equalized graph
    3. the best so far with corrected biases
    4. the best so far with float islands: the most sensitive parts stay float, more of them each time

Each step is taken only if no candidate is within the budget yet, and step 1 ends with a candidate that loses
nothing (`LOSSLESS_SQNR`), as calibrators by histograms take most of the time. Of candidates within the budget
the most accurate ships; of equally accurate ones the one with the fewest float islands, which is the fastest;
of these the one whose logits are closest to those of the float file, then the first. Measured times do not
decide, so that the same input gives the same bytes. `float_nodes` lists the nodes of the file that run in
float, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from onnxruntime.quantization.calibrate import TensorsData

from .. import runtime
from ..conversion.pixel_input import map_readers
from ..errors import CalibratorError, ExportError, NotInTorchError
from ..files import temporary_folder
from ..results import Candidate, FloatNode, Verdict
from .correction import Source, correct_biases, equalize, measure_sensitivity, with_all_biases
from .fake_quantize import FakeQuantized
from .quantizer import (
    METHODS,
    Batches,
    Int8File,
    Overrides,
    Prepared,
    calibrate_ranges,
    chunks,
    quantize,
    recipe,
    write_int8,
)
from .targets import Target

CORRECTION_IMAGES = 128
"""Images for equalizing channels and correcting biases, whose activations are held at once."""

SENSITIVITY_IMAGES = 16
"""Images on which the sensitivity of each part is measured separately."""

LOSSLESS_SQNR = 20.0
"""Decibels of signal to noise from which no loss on val is trusted: few images do not show every loss."""

MAX_FLOAT_FRACTION = 0.5
"""Fraction of the roundings that may be kept float at most; beyond it int8 gains nothing."""

Judge = Callable[[Path], Verdict]


@dataclass(frozen=True)
class Learned:
    """A graph trained under fake quantization, and the ranges that it learned."""

    prepared: Prepared
    overrides: Overrides


@dataclass(frozen=True)
class Search:
    """All candidates and their files in the order in which they were tried."""

    candidates: tuple[Candidate, ...]
    files: tuple[Int8File, ...]
    sources: tuple[Source, ...] = ()
    """The roundings of the best candidate, the worst first, if step 4 was reached."""
    stopped: str | None = None
    """What was left out and why: a failed calibrator, or steps 2 to 4 if torch cannot compute the graph."""

    @property
    def chosen(self) -> int | None:
        """Index of the candidate that ships; None if none is within the budget."""
        return next((i for i, candidate in enumerate(self.candidates) if candidate.ships), None)


@dataclass(frozen=True)
class _Variant:
    """The inputs of a candidate."""

    name: str
    prepared: Prepared
    ranges: TensorsData
    images: int
    """Number of images that the ranges were measured on."""
    calibration: str
    overrides: Overrides | None = None
    equalized: bool = False
    bias_corrected: bool = False
    kept_float: tuple[str, ...] = ()

    def quantized(self, types: Target) -> onnx.ModelProto:
        return quantize(
            self.prepared, self.ranges, types, kept_float=self.kept_float, overrides=self.overrides
        )


def search(
    prepared: Prepared,
    calibration: Batches,
    types: Target,
    folder: Path,
    judge: Judge,
    *,
    calibrators: Sequence[str] = tuple(METHODS),
    learned: Learned | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Search:
    """Search for the best int8 form of a prepared graph within the judge's budget. Raises ExportError.

    Args:
        calibration: preprocessed images, float32 [b, 3, H, W], or uint8 [b, H, W, 3] for a file with uint8
            input. Ranges are measured on all of them, biases and scales of channels on the first
            `CORRECTION_IMAGES`.
        folder: where candidates' files are written, `0.onnx`, `1.onnx` …
        judge: measures a file and compares it with the budget.
        learned: a graph and ranges from quantization-aware training, another candidate of step 1.
        facts: further entries of the recipe's `calibration`.
    """
    if not calibrators and learned is None:
        raise ExportError("The int8 search requires at least one calibrator.")
    attempts = _Attempts(types, folder, judge, facts or {}, progress)
    complete = with_all_biases(prepared)
    batches = prepared.fed(calibration)
    if learned is not None:
        # For tensors without a learned range.
        ranges = calibrate_ranges(learned.prepared.model, batches, "minmax", learned.prepared.scope.op_types)
        attempts.add(_Variant("learned", learned.prepared, *ranges, "learned", learned.overrides))
    failures: list[str] = []
    for method in calibrators:
        if attempts.is_lossless:
            break
        try:
            ranges = calibrate_ranges(complete.model, batches, method, complete.scope.op_types)
        except CalibratorError as error:
            if method == calibrators[-1] and not attempts.candidates:
                raise
            progress(str(error))
            failures.append(str(error))
            continue
        attempts.add(_Variant(method, complete, *ranges, method))
    sources: Sequence[Source] = ()
    if not attempts.hold:
        try:
            sources = _recover(attempts, batches)
        except NotInTorchError as error:
            failures.append(str(error))
    best = attempts.candidates[attempts.best]
    best.ships = best.holds
    stopped = "; ".join(failures) or None
    return Search(tuple(attempts.candidates), tuple(attempts.files), tuple(sources), stopped)


@dataclass
class _Attempts:
    """The candidates so far; `add` writes and judges another one."""

    types: Target
    folder: Path
    judge: Judge
    facts: Mapping[str, Any]
    progress: Callable[[str], None]
    variants: list[_Variant] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    files: list[Int8File] = field(default_factory=list)

    @property
    def best(self) -> int:
        return max(range(len(self.candidates)), key=lambda i: (self.candidates[i].rank, -i))

    @property
    def hold(self) -> bool:
        """True if a candidate is within the budget."""
        return self.candidates[self.best].holds

    @property
    def is_lossless(self) -> bool:
        """True if a candidate loses no accuracy and little of the logits."""
        return any(c.holds and c.lost <= 0 and c.sqnr >= LOSSLESS_SQNR for c in self.candidates)

    def add(self, variant: _Variant) -> None:
        self.progress(variant.name)
        calibration = {"method": variant.calibration, "images": variant.images, **self.facts}
        made_by = {
            **recipe(variant.prepared, self.types, calibration, variant.kept_float),
            "equalized": variant.equalized,
            "bias_corrected": variant.bias_corrected,
        }
        path = self.folder / f"{len(self.files)}.onnx"
        file = write_int8(variant.prepared, variant.quantized(self.types), path, made_by)
        candidate = Candidate(
            name=variant.name,
            calibration=variant.calibration,
            equalized=variant.equalized,
            bias_corrected=variant.bias_corrected,
            kept_float=variant.kept_float,
            bytes=file.bytes,
            **self.judge(file.path).model_dump(),
        )
        self.variants.append(variant)
        self.candidates.append(candidate)
        self.files.append(file)


def _recover(attempts: _Attempts, batches: Batches) -> Sequence[Source]:
    """Take steps 2 to 4 until a candidate is within the budget; return the roundings if step 4 is reached."""
    types, images = attempts.types, _first(batches, CORRECTION_IMAGES)
    variant = attempts.variants[attempts.best]
    if variant.overrides is None and (equalized := equalize(variant.prepared, images)) is not None:
        ranges, _ = calibrate_ranges(equalized.model, batches, variant.calibration, equalized.scope.op_types)
        attempts.add(
            replace(
                variant, name=f"{variant.name}, equalized", prepared=equalized, ranges=ranges, equalized=True
            )
        )
        if attempts.hold:
            return ()
    variant = attempts.variants[attempts.best]
    network = FakeQuantized(variant.prepared, variant.quantized(types), types).eval()
    corrected = correct_biases(variant.prepared, network, images)
    attempts.add(
        replace(variant, name=f"{variant.name}, biases corrected", prepared=corrected, bias_corrected=True)
    )
    if attempts.hold:
        return ()
    variant = attempts.variants[attempts.best]
    network = FakeQuantized(variant.prepared, variant.quantized(types), types).eval()
    attempts.progress("sensitivity")
    sources = measure_sensitivity(variant.prepared, network, images[:SENSITIVITY_IMAGES])
    for nodes in _islands(sources):
        attempts.add(replace(variant, name=f"{variant.name}, {len(nodes)} nodes float", kept_float=nodes))
        if attempts.hold:
            break
    return sources


def _first(batches: Batches, count: int) -> np.ndarray:
    images: list[np.ndarray] = []
    for chunk in chunks(batches):
        images.append(chunk)
        if sum(map(len, images)) >= count:
            break
    return np.concatenate(images)[:count]


def _islands(sources: Sequence[Source]) -> Iterable[tuple[str, ...]]:
    """Yield the nodes of the worst 1, 2, 4, 8 … roundings."""
    count, before = 1, 0
    while count <= MAX_FLOAT_FRACTION * len(sources):
        nodes = tuple(dict.fromkeys(node for source in sources[:count] for node in source.nodes))
        if len(nodes) > before:
            yield nodes
        before, count = len(nodes), 2 * count


# Operators with an integer kernel in ONNX Runtime on CPUs, or folded into the integer node before them.
_INTEGER_KERNELS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Concat", "Where", "LeakyRelu", "Sigmoid"),
        *("GlobalAveragePool", "AveragePool", "MaxPool", "Relu", "Clip", "Softmax", "Split", "Slice", "Pad"),
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Resize", "Gather", "GatherElements"),
    }
)
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}

KEPT = "kept in float for accuracy"
CONVERTS_INPUT = "conversion of the input to integers"
CONVERTS_OUTPUT = "conversion of the output to float"
CONVERTS_BETWEEN = "conversion between integers and float, next to a node that runs in float"
WRITES_FLOAT = "an integer kernel exists, but its output is not converted to integers"
NOT_FUSED = "an integer kernel exists, but ONNX Runtime did not use it between these conversions"


def float_nodes(model: str | Path | bytes, kept: Collection[str] = ()) -> list[FloatNode]:
    """Return the nodes of a file that ONNX Runtime runs in float here, in the order of execution.

    Read from the graph that `runtime.open_session` optimized for this machine. Conversions from and to
    integers are nodes of it, too. `kept` names nodes that were deliberately not quantized. Raises
    runtime.ArtifactError.
    """
    with temporary_folder() as folder:
        path = folder / "optimized.onnx"
        runtime.open_session(model, 1, optimized=path)
        running = onnx.load(path, load_external_data=False)
    content = model if isinstance(model, bytes) else Path(model).read_bytes()
    file = onnx.load_model_from_string(content)
    return _OptimizedGraph(running.graph, file.graph, frozenset(kept)).float_nodes()


class _OptimizedGraph:
    """The graph that runs, and the graph in the file."""

    def __init__(self, graph: onnx.GraphProto, file: onnx.GraphProto, kept: frozenset[str]) -> None:
        self.graph, self.kept = graph, kept
        self.named = {node.name: node for node in file.node if node.name}
        self.file_producers = {name: node for node in file.node for name in node.output}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.inputs = {value.name for value in graph.input}
        self.readers = map_readers(graph)
        self.constants = {tensor.name for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
        for node in graph.node:
            self.types |= dict.fromkeys(node.output, self._output_type(node))

    def float_nodes(self) -> list[FloatNode]:
        nodes: dict[FloatNode, None] = {}  # one node of the file may run as two
        for node in self.graph.node:
            writes_float = any(self.types.get(name) in _FLOATS for name in node.output)
            if not _is_integer(node) and (node.op_type == "QuantizeLinear" or writes_float):
                origin = self._origin(node) or node
                name, operator = origin.name or node.output[0], origin.op_type
                reason = KEPT if name in self.kept else self._reason(node, operator)
                nodes[FloatNode(name=name, op_type=operator, why=reason)] = None
        return list(nodes)

    def _reason(self, node: onnx.NodeProto, operator: str) -> str:
        if operator == "QuantizeLinear":
            return CONVERTS_INPUT if node.input[0] in self.inputs else CONVERTS_BETWEEN
        if operator == "DequantizeLinear":
            if node.input[0] in self.constants:
                return "weights stored as integers and used in float"
            return CONVERTS_OUTPUT if node.output[0] in self.outputs else CONVERTS_BETWEEN
        if operator in ("ReorderInput", "ReorderOutput"):
            return "change of memory layout for convolutions in float"
        if operator not in _INTEGER_KERNELS:
            return f"ONNX Runtime has no integer kernel for {operator}"
        for tensor in node.input:
            producer = self.producers.get(tensor)
            if tensor in self.inputs:
                return "an integer kernel exists, but the node reads the input in float"
            if producer is None or producer.op_type == "DequantizeLinear":
                continue
            if self.types.get(tensor) in _FLOATS:
                origin = self._origin(producer) or producer
                name = origin.name or origin.output[0]
                return f"an integer kernel exists, but the node reads the float output of {name}"
        readers = self.readers.get(node.output[0], [])
        converted = bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
        return NOT_FUSED if converted else WRITES_FLOAT

    def _origin(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return the node of the file that `node` comes from; None if ONNX Runtime inserted it."""
        if node.name in self.named:
            return self.named[node.name]
        if node.name.endswith("_nchwc"):  # a blocked convolution is named by its output or its activation's
            origin = self.file_producers.get(node.name.removesuffix("_nchwc"))
            while origin is not None and origin.op_type != node.op_type:
                origin = self.file_producers.get(origin.input[0])
            return origin
        if node.name:
            return None
        # Parts of a HardSwish and the like have no name; the next node with a name reads their output.
        reader = node
        while reader.name not in self.named:
            readers = self.readers.get(reader.output[0])
            if not readers:
                return None
            reader = readers[0]
        origin = self.file_producers.get(self.named[reader.name].input[0])
        while origin is not None and origin.op_type in ("QuantizeLinear", "DequantizeLinear"):
            origin = self.file_producers.get(origin.input[0])
        return origin

    def _output_type(self, node: onnx.NodeProto) -> int:
        if node.op_type == "QuantizeLinear":
            zero_point = node.input[2] if len(node.input) > 2 else ""
            return self.types.get(zero_point, TensorProto.UINT8)
        if node.op_type == "DequantizeLinear" or node.op_type.endswith("ToFloat"):
            return TensorProto.FLOAT
        if _is_integer(node):
            return TensorProto.UINT8
        if node.op_type in ("Shape", "Size", "ArgMax", "ArgMin", "NonZero"):
            return TensorProto.INT64
        if node.op_type == "Cast":
            return next(a.i for a in node.attribute if a.name == "to")
        data = node.input[1:2] if node.op_type == "Where" else node.input[:1]
        return self.types.get(data[0], TensorProto.FLOAT) if data else TensorProto.FLOAT


def _is_integer(node: onnx.NodeProto) -> bool:
    """Return True if an operator computes in integers, even if its output is float."""
    return node.op_type.startswith(("QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger"))
