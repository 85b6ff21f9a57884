"""The search for an int8 file that loses no more than it may, and is as fast as that allows.

    1. every calibrator, and ranges that were learned, if any       on the graph as it is
    2. the best of them on the equalised graph
    3. the best so far with corrected biases
    4. the best so far with float islands: the parts that suffer most stay float, more of them each time

Each step is taken only where no candidate has held the budget yet. Of those that hold it the most accurate
ships; of equally accurate ones the one with the fewest float islands, which is the faster one; of these the
one whose logits are nearest to the float file's, then the first. No measured time decides, so that the same
input gives the same bytes; times are measured by the caller and recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import TensorsData

from ..errors import CalibratorError, ExportError, NotInTorchError
from .correction import Source, bias_corrected, equalised, sensitivity, with_all_biases
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

LOOKED_AT = 128
"""Images by which channels are equalised and biases corrected: their activations are held at once."""

WATCHED = 16
"""Images on which the parts' sensitivity is measured, each part for itself."""

MOST_ISLANDS = 0.5
"""Share of the roundings that may be kept float at most; beyond, int8 is no gain."""


@dataclass(frozen=True)
class Verdict:
    """What was measured of a candidate's file."""

    score: float
    """Accuracy, the more the better; percent."""
    lost: float
    """Points lost to the float file; negative where it is better."""
    holds: bool
    """Whether that is within the budget."""
    sqnr: float
    """Of its logits against the float file's, decibels."""
    more: Mapping[str, Any] = field(default_factory=dict)


Judge = Callable[[Path], Verdict]


@dataclass(frozen=True)
class Candidate:
    """One way to int8, and what came of it."""

    name: str
    calibration: str
    equalised: bool
    corrected: bool
    kept_float: tuple[str, ...]
    verdict: Verdict
    file: Int8File

    @property
    def rank(self) -> tuple[bool, float, int, float]:
        """The larger, the better."""
        v = self.verdict
        return v.holds, v.score, -len(self.kept_float), v.sqnr


@dataclass(frozen=True)
class Learned:
    """A graph trained under fake quantization, and the ranges that it learned."""

    prepared: Prepared
    overrides: Overrides


@dataclass(frozen=True)
class Search:
    """All candidates in the order they were tried, and the one that ships; None where none holds."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    sources: tuple[Source, ...] = ()
    """The roundings of the best candidate, the worst first, where step 4 was reached."""
    stopped: str | None = None
    """What had to be left out, and why: a calibrator that could not cope, or steps 2 to 4 where the graph
    cannot be computed in torch."""


@dataclass(frozen=True)
class _Way:
    """What a candidate is made from."""

    name: str
    prepared: Prepared
    ranges: TensorsData
    images: int
    """From how many the ranges are."""
    calibration: str
    overrides: Overrides | None = None
    equalised: bool = False
    corrected: bool = False
    kept_float: tuple[str, ...] = ()


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
    tell: Callable[[str], None] = lambda _: None,
) -> Search:
    """Look for the best int8 form of a prepared graph under the judge's budget.

    Args:
        calibration: preprocessed images as the file takes them (see `quantize_int8`); ranges are taken from
            all of them, biases and scales of channels from the first `LOOKED_AT`.
        folder: where candidates' files are written, `0.onnx`, `1.onnx` …
        judge: measures a file and says whether it holds the budget.
        learned: a graph and ranges from quantization-aware training, another candidate of step 1.
        facts: what the recipe says of the calibration besides its method and the number of images.

    Raises ExportError.
    """
    if not calibrators and learned is None:
        raise ExportError("a search for int8 needs a calibrator, and there is none")
    tried: list[Candidate] = []
    failed: list[str] = []
    ways: list[_Way] = []

    def attempt(way: _Way) -> None:
        tell(way.name)
        said = {"method": way.calibration, "images": way.images, **(facts or {})}
        made_by = {
            **recipe(way.prepared, types, said, way.kept_float),
            "equalised": way.equalised,
            "bias_corrected": way.corrected,
        }
        file = write_int8(way.prepared, _qdq(way, types), folder / f"{len(tried)}.onnx", made_by)
        verdict = judge(file.path)
        candidate = Candidate(
            way.name, way.calibration, way.equalised, way.corrected, way.kept_float, verdict, file
        )
        tried.append(candidate)
        ways.append(way)

    def best() -> int:
        return max(range(len(tried)), key=lambda i: (tried[i].rank, -i))

    def ended(sources: Sequence[Source] = (), stopped: str | None = None) -> Search:
        first = tried[best()]
        told = "; ".join([*failed, *([stopped] if stopped else [])]) or None
        return Search(tuple(tried), first if first.verdict.holds else None, tuple(sources), told)

    def ranges_of(graph: Prepared, method: str) -> tuple[TensorsData, int]:
        return calibrate_ranges(graph.model, fed, method, graph.scope.op_types)

    def held() -> bool:
        return tried[best()].verdict.holds

    def recover() -> Sequence[Source]:
        """Steps 2 to 4."""
        images = _first(fed, LOOKED_AT)
        way = ways[best()]
        if way.overrides is None and (level := equalised(way.prepared, images)) is not None:
            ranges, _ = ranges_of(level, way.calibration)
            attempt(
                replace(way, name=f"{way.name}, equalised", prepared=level, ranges=ranges, equalised=True)
            )
            if held():
                return ()
        way = ways[best()]
        fake = FakeQuantized(way.prepared, _qdq(way, types), types).eval()
        corrected = bias_corrected(way.prepared, fake, images)
        attempt(replace(way, name=f"{way.name}, biases corrected", prepared=corrected, corrected=True))
        if held():
            return ()
        way = ways[best()]
        fake = FakeQuantized(way.prepared, _qdq(way, types), types).eval()
        tell("sensitivity")
        sources = sensitivity(way.prepared, fake, images[:WATCHED])
        for nodes in _islands(sources):
            attempt(replace(way, name=f"{way.name}, {len(nodes)} nodes float", kept_float=nodes))
            if held():
                break
        return sources

    complete = with_all_biases(prepared)
    fed = prepared.fed(calibration)
    if learned is not None:
        ranges = ranges_of(learned.prepared, "minmax")  # of what no range was learned for
        attempt(_Way("learned", learned.prepared, *ranges, "learned", learned.overrides))
    for method in calibrators:
        try:
            ranges = ranges_of(complete, method)
        except CalibratorError as error:
            if method == calibrators[-1] and not tried:
                raise
            tell(str(error))
            failed.append(str(error))
            continue
        attempt(_Way(method, complete, *ranges, method))
    if held():
        return ended()
    try:
        return ended(recover())
    except NotInTorchError as error:
        return ended(stopped=str(error))


def _qdq(way: _Way, types: Target) -> onnx.ModelProto:
    return quantize(way.prepared, way.ranges, types, kept_float=way.kept_float, overrides=way.overrides)


def _first(batches: Batches, most: int) -> np.ndarray:
    found: list[np.ndarray] = []
    for chunk in chunks(batches):
        found.append(chunk)
        if sum(map(len, found)) >= most:
            break
    return np.concatenate(found)[:most]


def _islands(sources: Sequence[Source]) -> Iterable[tuple[str, ...]]:
    """The nodes of the worst 1, 2, 4, 8 … roundings."""
    count, before = 1, 0
    while count <= MOST_ISLANDS * len(sources):
        nodes = tuple(dict.fromkeys(node for source in sources[:count] for node in source.nodes))
        if len(nodes) > before:
            yield nodes
        before, count = len(nodes), 2 * count
