"""Search for the int8 file that loses no more accuracy than allowed and is as fast as that permits.

    1. every calibrator, and ranges from quantization-aware training   on the graph as it is
    2. the best of them on the equalized graph
    3. the best so far with corrected biases
    4. the best so far with float islands: the most sensitive parts stay float, more of them each time

Each step is taken only if no candidate is within the budget yet. Of those within it the most accurate ships;
of equally accurate ones the one with the fewest float islands, which is the fastest; of these the one whose
logits are closest to those of the float file, then the first. Measured times do not decide, so that the same
input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import TensorsData

from ..errors import CalibratorError, ExportError, NotInTorchError
from ..results import Candidate, Verdict
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
    """Search for the best int8 form of a prepared graph within the judge's budget.

    Args:
        calibration: preprocessed images as the file takes them (see `quantize_int8`). Ranges are measured on
            all of them, biases and scales of channels on the first `CORRECTION_IMAGES`.
        folder: where candidates' files are written, `0.onnx`, `1.onnx` …
        judge: measures a file and compares it with the budget.
        learned: a graph and ranges from quantization-aware training, another candidate of step 1.
        facts: further entries of the recipe's `calibration`.

    Raises:
        ExportError: there is no calibrator and nothing learned, or quantization failed.
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


class _Attempts:
    """The candidates so far; `add` writes and judges another one."""

    def __init__(
        self,
        types: Target,
        folder: Path,
        judge: Judge,
        facts: Mapping[str, Any],
        progress: Callable[[str], None],
    ) -> None:
        self.types, self.folder, self.judge, self.facts, self.progress = types, folder, judge, facts, progress
        self.variants: list[_Variant] = []
        self.candidates: list[Candidate] = []
        self.files: list[Int8File] = []

    @property
    def best(self) -> int:
        return max(range(len(self.candidates)), key=lambda i: (self.candidates[i].rank, -i))

    @property
    def hold(self) -> bool:
        """True if a candidate is within the budget."""
        return self.candidates[self.best].holds

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
