"""quantize: for each target the int8 file that loses no more than it may, looked for among candidates."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...export.int8 import targets
from ...export.int8.float_nodes import KEPT, float_nodes
from ...export.int8.quantizer import METHODS, Int8File, prepare
from ...export.int8.search import Candidate, Search, Verdict, search
from ...export.latency import runner
from ...export.latency.machine import has_vnni, is_arm
from ...export.runtime import int8_flags
from ..report.budget import missed
from ..runs.files import atomic_write
from ..runs.folder import StageResult
from ..runs.results import FloatPart, Int8Search, TriedInt8
from ..tasks import Task, task_of
from ..training.job import Job
from .calibration_images import CalibrationImages, calibration_batches, calibration_images
from .export import ARTIFACT, STUDENT_ONNX, onnx_logits
from .qat import recovered

class Budget:
    """The fp32 file's answers on the images that decide, and how much may be lost of them."""

    def __init__(self, task: Task, answers: np.ndarray, labels: np.ndarray, max_drop: float) -> None:
        """
        Args:
            answers: the fp32 file's logits [n,classes], n > 0.
        """
        self.task, self.answers, self.labels, self.max_drop = task, answers, labels, max_drop
        self.score = task.percent(answers, labels)

    def verdict(self, logits: np.ndarray) -> Verdict:
        """What a candidate with these logits is worth."""
        score = self.task.percent(logits, self.labels)
        lost = self.score - score
        noise = float(np.square(logits.astype(np.float64) - self.answers).sum())
        power = float(np.square(self.answers, dtype=np.float64).sum())
        sqnr = 10 * float(np.log10(power / noise)) if noise and power else float("inf")
        test = self.task.paired_test(self.answers, logits, self.labels)
        return Verdict(score, lost, lost <= self.max_drop or test.may_be_chance, sqnr, {"p": test.p})


STUDENT_INT8 = ARTIFACT / "student.int8.onnx"
"""Of the first target; see :func:`file_of`."""

SECONDS = 0.5
"""Of measuring for each candidate."""

TIMED_INPUTS = 16

FASTER = "left in float, where it is faster or truer for this network"


def file_of(job: Job, target: str) -> Path:
    """Where a target's int8 file ships, in the run folder."""
    first = target == job.options.target[0]
    return STUDENT_INT8 if first else ARTIFACT / f"student.int8.{target}.onnx"


def run(job: Job) -> StageResult:
    o = job.options
    calibration = calibration_images(job)
    prepared = prepare(job.folder.path / STUDENT_ONNX)
    inputs = next(iter(calibration_batches(job, calibration)()))[:TIMED_INPUTS]
    learned = dict([recovered(job.folder.path, prepared)]) if o.qat else {}
    pixels, labels, role = _deciding(job, calibration)
    budget = Budget(
        task_of(job.data), onnx_logits(job, job.folder.path / STUDENT_ONNX, pixels), labels, o.max_drop
    )
    found: list[Int8Search] = []
    shipped: dict[str, Int8File] = {}
    for name in o.target:
        with tempfile.TemporaryDirectory(prefix=".int8.", suffix=".part", dir=job.folder.path) as folder:
            result = search(
                prepared,
                calibration_batches(job, calibration),
                targets.target(name),
                Path(folder),
                _judge(job, budget, pixels, name),
                calibrators=tuple(METHODS) if o.calibration == "auto" else (o.calibration,),
                learned=learned.get(name),
                facts={"calibration_hash": calibration.hash},
                tell=partial(_show, job, name),
            )
            if result.stopped is not None:
                job.display.warn(f"The search for int8 for {name} left something out: {result.stopped}.")
            file = file_of(job, name)
            times = _times(job, result, name, inputs)
            if result.chosen is not None:
                with atomic_write(job.folder.path / file) as part:
                    shutil.copyfile(result.chosen.file.path, part)
                shipped[name] = result.chosen.file
            found.append(_told(job, result, name, role, len(labels), budget, times))
            if (told := missed(found[-1], o.qat)) is not None:
                job.display.warn(told)
            for one in found[-1].tried:
                job.display.detail(f"{name}, {one.name}: {one.score:.2f}, {one.lost:+.2f} points lost")
    for left in (job.folder.path / ARTIFACT).glob("student.int8*.onnx"):
        if left.relative_to(job.folder.path) not in [file_of(job, name) for name in shipped]:
            left.unlink()  # of a target that is no longer asked for
    return StageResult(
        "; ".join(_line(job, one) for one in found),
        [file_of(job, name).as_posix() for name in shipped],
        _facts(job, found, shipped),
    )


def _deciding(job: Job, calibration: CalibrationImages) -> tuple[np.ndarray, np.ndarray, str]:
    """The images on which candidates are compared, their labels, and which role they are of."""
    pixels, labels, _ = job.rendered("val", job.student)
    if len(labels):
        return pixels.numpy(), labels.numpy(), "val"
    job.display.warn(
        "There are no val images: what int8 costs in accuracy is measured on the training images that it "
        "is calibrated on, which flatters it (--val-fraction 0.1 holds some out)."
    )
    return calibration.pixels, calibration.labels, "train"


def _show(job: Job, target: str, what: str, share: float = 0.0) -> None:
    job.stage.update(f"int8 for {target}: {what}", share, 1.0)


def _judge(job: Job, budget: Budget, pixels: np.ndarray, target: str) -> Callable[[Path], Verdict]:
    fuse = targets.right_here(target)
    return lambda file: budget.verdict(onnx_logits(job, file, pixels, fuse=fuse))


def _times(job: Job, result: Search, target: str, inputs: np.ndarray) -> runner.BenchResult | None:
    """Latency of every candidate and of the fp32 file, on one thread, in the same rounds."""
    if targets.timed_here([target])[target] is not None:
        return None
    subjects = [runner.Subject("fp32", job.folder.path / STUDENT_ONNX, inputs)]
    subjects += [runner.Subject(one.file.path.name, one.file.path, inputs) for one in result.candidates]
    return runner.bench(
        subjects,
        threads=[1],
        seconds=min(SECONDS, job.options.bench_seconds),
        seed=job.options.seed,
        progress=lambda share, what: _show(job, target, what, share),
    )


def _told(
    job: Job,
    result: Search,
    target: str,
    role: str,
    n: int,
    budget: Budget,
    times: runner.BenchResult | None,
) -> Int8Search:
    chosen = result.chosen
    tried = [_tried(one, chosen, times) for one in result.candidates]
    ships = next((one for one in tried if one.ships), None)
    # The graph as it runs here tells nothing of another family's processors.
    here = times is not None and chosen is not None
    parts = _float_parts(chosen.file, chosen.kept_float) if here and chosen is not None else []
    return Int8Search(
        target=target,
        file=None if chosen is None else file_of(job, target).as_posix(),
        max_drop=budget.max_drop,
        role=role,
        n=n,
        fp32_score=budget.score,
        p50_fp32=None if times is None else times.latency("fp32", 1).p50,
        tried=tried,
        float_parts=parts,
        slow=None if ships is None else why_slow(ships, parts),
        worst=[(source.tensor, source.sqnr) for source in result.sources[:20]],
        not_timed=targets.timed_here([target])[target],
    )


def _tried(one: Candidate, chosen: Candidate | None, times: runner.BenchResult | None) -> TriedInt8:
    p50, speedup = None, None
    if times is not None:
        p50 = times.latency(one.file.path.name, 1).p50
        speedup = times.speedup(one.file.path.name, "fp32", 1)
    return TriedInt8(
        name=one.name,
        calibration=one.calibration,
        equalised=one.equalised,
        bias_corrected=one.corrected,
        kept_float=list(one.kept_float),
        score=one.verdict.score,
        lost=one.verdict.lost,
        p=one.verdict.more.get("p"),
        sqnr=one.verdict.sqnr,
        holds=one.verdict.holds,
        ships=one is chosen,
        bytes=one.file.bytes,
        p50=p50,
        speedup=speedup,
    )


def _facts(job: Job, found: Sequence[Int8Search], shipped: dict[str, Int8File]) -> dict[str, Any]:
    facts: dict[str, Any] = {"int8": [one.model_dump() for one in found]}
    known, first = job.folder.facts()["student"], job.options.target[0]
    if first in shipped:
        file = shipped[first]
        facts["student_int8"] = {
            "name": job.student.name,
            "weights": known["weights"],
            "parameters": known["parameters"],
            "file": STUDENT_INT8.as_posix(),
            "bytes": file.bytes,
            "sha256": file.sha256,
            "opset": file.opset,
            "ir_version": file.ir_version,
            "quantization": file.recipe,
        }
    return facts


def _line(job: Job, one: Int8Search) -> str:
    best = next((tried for tried in one.tried if tried.ships), None)
    if best is None:
        return (
            f"no int8 for {one.target}: of {len(one.tried)} candidates none keeps within {one.max_drop:g} "
            f"points of fp32, so the fp32 file ships"
        )
    size = (job.folder.path / STUDENT_ONNX).stat().st_size / best.bytes
    word = (
        f"loses {best.lost:.2f}"
        if best.lost > 0
        else f"gains {-best.lost:.2f}"
        if best.lost < 0
        else "loses no"
    )
    return (
        f"{one.file}, {best.bytes / 1e6:.2f} MB, {size:.2f} times smaller; {best.name}, the best of "
        f"{len(one.tried)}, {word} points on {one.n} {one.role} images"
    )


def _float_parts(file: Int8File, kept: Sequence[str]) -> list[FloatPart]:
    """What runs in float; what was left so before accuracy was looked at is so because it is faster."""
    found = float_nodes(file.path, set(file.recipe["kept_float"]))
    return [
        FloatPart(
            name=one.name,
            op_type=one.operator,
            why=FASTER if one.reason == KEPT and one.name not in kept else one.reason,
        )
        for one in found
    ]


def why_slow(tried: TriedInt8, parts: Sequence[FloatPart]) -> str | None:
    """Where int8 is not faster than fp32: the reason, and which students would be."""
    if tried.speedup is None or tried.speedup.low > 1:
        return None
    computing = [one for one in parts if one.why.startswith(("ONNX Runtime has no", KEPT))]
    kinds = ", ".join(sorted({one.op_type for one in computing}))
    flags = int8_flags()
    if not is_arm() and not has_vnni():
        reason = "this processor has no instruction for products of int8 (VNNI)"
    elif is_arm() and "asimddp" not in flags and flags:
        reason = "this processor has no dot product of int8"
    elif computing:
        reason = f"{len(computing)} of its nodes run in float between the integers ({kinds})"
    else:
        reason = "the network is so small that converting its input and answers costs what integers save"
    return (
        f"int8 is not faster than fp32 here: {reason}. Students of plain convolutions with ReLU gain most: "
        "mobilenetv2, mobilenetv4_conv_small, resnet18"
        + (
            ", or mobilenetv3 with --activation relu6."
            if "HardSwish" in kinds or "HardSigmoid" in kinds
            else "."
        )
    )
