"""quantize: search the int8 file of each target that is within the accuracy budget."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...export.int8 import targets
from ...export.int8.quantizer import METHODS, Int8File, Prepared, prepare
from ...export.int8.search import KEPT, Learned, Search, float_nodes, search
from ...export.latency import runner
from ...export.results import Candidate, FloatNode, Verdict
from ...export.runtime import detect_target, lacks_dot_products
from ..data.training_data import TrainingData
from ..evaluation.predictions import compute_onnx_logits
from ..report.sections.int8 import explain_excess
from ..runs.files import atomic_write
from ..runs.folder import ARTIFACT, StageResult
from ..runs.results import Int8Search
from ..tasks.base import Task
from ..training.context import RunContext
from .export import STUDENT_INT8, STUDENT_ONNX
from .qat import CalibrationImages, draw_calibration_images, load_graph

SECONDS = 0.5
"""Time to measure the latency of each candidate."""

TIMED_INPUTS = 16

FASTER = "left in float, where it is faster or truer for this network"


class Budget:
    """The accuracy that int8 may lose, and the fp32 file's logits on the images that decide."""

    def __init__(self, task: Task, logits: np.ndarray, labels: np.ndarray, max_drop: float) -> None:
        self.task, self.logits, self.labels, self.max_drop = task, logits, labels, max_drop
        self.score = task.percent(logits, labels)

    def judge(self, logits: np.ndarray) -> Verdict:
        """Compare a candidate's logits with those of the fp32 file."""
        score = self.task.percent(logits, self.labels)
        lost = self.score - score
        sqnr = self.task.fidelity(self.logits, logits)
        test = self.task.paired_test(self.logits, logits, self.labels)
        holds = lost <= self.max_drop or test.may_be_chance
        return Verdict(score=score, lost=lost, holds=holds, sqnr=sqnr, p=test.p)


def int8_file(context: RunContext, target: str) -> Path:
    """Return the path of a target's file in the run folder."""
    first = target == context.options.target[0]
    return STUDENT_INT8 if first else ARTIFACT / f"student.int8.{target}.onnx"


@dataclass(frozen=True)
class _Inputs:
    """The inputs of the search for any target."""

    prepared: Prepared
    calibration: CalibrationImages
    pixels: np.ndarray
    """The images that decide, uint8 [n,H,W,3]; see ``Budget``."""
    split: str
    budget: Budget


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    o, folder = context.options, context.folder.path
    calibration = draw_calibration_images(data, context.student)
    prepared = prepare(folder / STUDENT_ONNX)
    trained = dict([load_graph(folder, prepared)]) if o.qat else {}
    pixels, labels, split = _deciding_images(context, data, calibration)
    logits = compute_onnx_logits(folder / STUDENT_ONNX, pixels, context.progress)
    inputs = _Inputs(prepared, calibration, pixels, split, Budget(context.task, logits, labels, o.max_drop))
    searches: list[Int8Search] = []
    shipped: dict[str, Int8File] = {}
    for target in o.target:
        described, chosen = _search(context, target, inputs, trained.get(target))
        searches.append(described)
        if chosen is not None:
            shipped[target] = chosen
        if (text := explain_excess(described, o.qat)) is not None:
            context.display.warn(text)
        for tried in described.tried:
            context.display.detail(
                f"{target}, {tried.name}: {tried.score:.2f}, {tried.lost:+.2f} points lost"
            )
    for left in (folder / ARTIFACT).glob("student.int8*.onnx"):
        if left.relative_to(folder) not in [int8_file(context, target) for target in shipped]:
            left.unlink()  # of a target of an earlier command
    facts: dict[str, Any] = {"int8": [described.model_dump() for described in searches]}
    if o.target[0] in shipped:
        facts["student_int8"] = _facts(context, previous["student"], shipped[o.target[0]])
    fp32_bytes = (folder / STUDENT_ONNX).stat().st_size
    return StageResult(
        "; ".join(_summarize(described, fp32_bytes) for described in searches),
        [int8_file(context, target).as_posix() for target in shipped],
        facts,
    )


def _search(
    context: RunContext, target: str, inputs: _Inputs, learned: Learned | None
) -> tuple[Int8Search, Int8File | None]:
    """Search the file of one target and write it, if there is one, into the run folder."""
    folder, calibration = context.folder.path, context.options.calibration
    batches = inputs.calibration.batches(pixel_input=context.has_pixel_input)

    def judge(file: Path) -> Verdict:
        fuse = targets.is_exact_here(target)
        return inputs.budget.judge(compute_onnx_logits(file, inputs.pixels, context.progress, fuse=fuse))

    def show(work: str, fraction: float = 0.0) -> None:
        context.progress.update(f"int8 for {target}: {work}", fraction, 1.0)

    with tempfile.TemporaryDirectory(prefix=".int8.", suffix=".part", dir=folder) as scratch:
        result = search(
            inputs.prepared,
            batches,
            targets.find_target(target),
            Path(scratch),
            judge,
            calibrators=tuple(METHODS) if calibration == "auto" else (calibration,),
            learned=learned,
            facts={"calibration_hash": inputs.calibration.hash},
            progress=show,
        )
        if result.stopped is not None:
            context.display.warn(f"The int8 search for {target} is incomplete: {result.stopped}.")
        times = None
        if targets.explain_untimed([target])[target] is None:
            times = _measure_latency(context, result, next(iter(batches()))[:TIMED_INPUTS], show)
        chosen = None if result.chosen is None else result.files[result.chosen]
        file = int8_file(context, target)
        if chosen is not None:
            with atomic_write(folder / file) as part:
                shutil.copyfile(chosen.path, part)
        return _describe(result, target, file, inputs, times), chosen


def _deciding_images(
    context: RunContext, data: TrainingData, calibration: CalibrationImages
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the images on which candidates are compared, their labels and their split."""
    pixels, labels, _ = data.rendered("val", context.student)
    if len(labels):
        return pixels.numpy(), labels.numpy(), "val"
    context.display.warn(
        "There are no val images. The accuracy that int8 loses is measured on its calibration images, which "
        "underestimates it. Hold some out with --val-fraction 0.1."
    )
    return calibration.pixels, calibration.labels, "train"


def _measure_latency(
    context: RunContext, result: Search, inputs: np.ndarray, show: Callable[[str, float], None]
) -> runner.BenchResult:
    """Measure the latency of the candidates and the fp32 file, interleaved, on one thread."""
    subjects = [runner.Subject("fp32", context.folder.path / STUDENT_ONNX, inputs)]
    subjects += [runner.Subject(path.name, path, inputs) for path in _timed_files(result).values()]
    return runner.bench(
        subjects,
        threads=[1],
        seconds=min(SECONDS, context.options.bench_seconds),
        seed=context.options.seed,
        progress=lambda fraction, work: show(work, fraction),
    )


def _timed_files(result: Search) -> Mapping[tuple[str, ...], Path]:
    """Return one file for each set of nodes that stay float; other candidates differ in constants only."""
    return {c.kept_float: file.path for c, file in zip(result.candidates, result.files, strict=True)}


def _describe(
    result: Search, target: str, file: Path, inputs: _Inputs, times: runner.BenchResult | None
) -> Int8Search:
    budget = inputs.budget
    if times is not None:
        timed = _timed_files(result)
        for candidate in result.candidates:
            name = timed[candidate.kept_float].name
            candidate.p50 = times.latency(name, 1).p50
            candidate.speedup = times.speedup(name, "fp32", 1)
    ships, parts = None, []
    if result.chosen is not None:
        ships = result.candidates[result.chosen]
        if times is not None:  # what runs in float is known for this family of processors only
            parts = _float_nodes(result.files[result.chosen], ships.kept_float)
    return Int8Search(
        target=target,
        file=None if ships is None else file.as_posix(),
        max_drop=budget.max_drop,
        role=inputs.split,
        n=len(budget.labels),
        fp32_score=budget.score,
        p50_fp32=None if times is None else times.latency("fp32", 1).p50,
        tried=list(result.candidates),
        float_parts=parts,
        slow=None if ships is None else why_slow(ships, parts),
        worst=[(source.tensor, source.sqnr) for source in result.sources[:20]],
        not_timed=targets.explain_untimed([target])[target],
    )


def _facts(context: RunContext, student: Mapping[str, Any], file: Int8File) -> dict[str, Any]:
    """Describe the first target's file; ``student`` holds the facts of the fp32 student."""
    return {
        "name": context.student.name,
        "weights": student["weights"],
        "parameters": student["parameters"],
        "file": STUDENT_INT8.as_posix(),
        "bytes": file.bytes,
        "sha256": file.sha256,
        "opset": file.opset,
        "ir_version": file.ir_version,
        "quantization": file.recipe,
    }


def _summarize(described: Int8Search, fp32_bytes: int) -> str:
    n = len(described.tried)
    best = next((tried for tried in described.tried if tried.ships), None)
    if best is None:
        return (
            f"no int8 file for {described.target}: none of {n} candidates is within {described.max_drop:g} "
            "points of fp32; the fp32 file ships"
        )
    change = "loses no" if best.lost == 0 else f"{'loses' if best.lost > 0 else 'gains'} {abs(best.lost):.2f}"
    name = best.name if n == 1 else f"{best.name}, the best of {n},"
    return (
        f"{described.file}, {best.bytes / 1e6:.2f} MB, {fp32_bytes / best.bytes:.2f} times smaller; "
        f"{name} {change} points on {described.n} {described.role} images"
    )


def _float_nodes(file: Int8File, kept: Sequence[str]) -> list[FloatNode]:
    """Return the nodes that run in float and why: ``kept`` for accuracy, others because it is faster."""
    return [
        node.model_copy(update={"why": FASTER}) if node.why == KEPT and node.name not in kept else node
        for node in float_nodes(file.path, set(file.recipe["kept_float"]))
    ]


def why_slow(tried: Candidate, parts: Sequence[FloatNode]) -> str | None:
    """Explain why int8 is not faster than fp32, and which students would be; None if it is faster."""
    if tried.speedup is None or tried.speedup.low > 1:
        return None
    in_float = [part for part in parts if part.why.startswith(("ONNX Runtime has no", KEPT))]
    kinds = ", ".join(sorted({part.op_type for part in in_float}))
    if detect_target() == "x86":
        reason = "this processor has no VNNI instructions for int8 products"
    elif lacks_dot_products():
        reason = "this processor has no int8 dot product instructions"
    elif in_float:
        reason = f"{len(in_float)} of its nodes run in float between integer ones ({kinds})"
    else:
        reason = "the network is so small that the conversion of input and output takes the time saved"
    relu6 = ""
    if "HardSwish" in kinds or "HardSigmoid" in kinds:
        relu6 = ", or mobilenetv3 with --activation relu6"
    return (
        f"int8 is not faster than fp32 here: {reason}. Students with plain convolutions and ReLU gain most: "
        f"mobilenetv2, mobilenetv4_conv_small, resnet18{relu6}."
    )
