"""The student in the further formats of `--formats`, each checked against its source; part of validate."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...export.artifact import ShippedFile
from ...export.conversion.half import emulate_half, write_half
from ...export.conversion.ort_format import write_ort
from ...export.errors import ExportError
from ...export.int8.quantizer import read_recipe
from ...export.int8.targets import is_exact_here
from ...export.runtime import ORT_SUFFIX, ArtifactError
from ..evaluation.predictions import compute_onnx_logits
from ..runs.files import atomic_write
from ..runs.folder import ARTIFACT
from ..tasks.base import Outputs, Task
from ..training.context import RunContext

FP16, ORT = "fp16", "ort"
STUDENT_FP16 = ARTIFACT / "student.fp16.onnx"
MAX_DIFFERENCE = {"fp16": 0.05, "fp32": 1e-3, "int8": 0.05}
"""Largest difference of logits by a file's precision, relative to the largest logit.

In an int8 file, sums in float in another order change some roundings.
"""
MIN_SAME = 0.99
"""Smallest fraction of images with the same prediction; one that differs is always allowed."""


@dataclass(frozen=True)
class Source:
    """A file of the artifact, its int8 target (None for fp32), and its outputs for the test images."""

    path: Path
    """In the run folder."""
    target: str | None
    outputs: Outputs

    @property
    def precision(self) -> str:
        return "fp32" if self.target is None else "int8"


def write_formats(context: RunContext, pixels: np.ndarray, sources: Sequence[Source]) -> list[ShippedFile]:
    """Write the files that `--formats` requests and delete others.

    ``sources`` are the fp32 file and the int8 files, with their outputs for ``pixels``. Without a file whose
    outputs differ too much the run continues, with a warning.
    """
    formats, shipped = context.options.formats, []
    if FP16 in formats:
        shipped.append(_write(context, pixels, sources[0], STUDENT_FP16, FP16))
    for source in sources if ORT in formats else ():
        path = source.path.with_suffix(ORT_SUFFIX)
        if source.target is not None and not is_exact_here(source.target):
            context.display.warn(
                f"--formats ort: {path.name} is not written, since this processor computes int8 files for "
                f"{source.target} inexactly. Export on a processor with VNNI or on Arm"
            )
        else:
            shipped.append(_write(context, pixels, source, path, source.precision))
    files = [file for file in shipped if file is not None]
    folder = context.folder.path / ARTIFACT
    for path in [context.folder.path / STUDENT_FP16, *folder.glob(f"student*{ORT_SUFFIX}")]:
        if path not in [file.file.path for file in files]:
            path.unlink(missing_ok=True)  # of an earlier command
    return files


def describe_formats(files: list[ShippedFile]) -> str:
    """Return the continuation of the stage's summary."""
    return "".join(
        f"; {file.file.path.name}, {file.file.bytes / 1e6:.2f} MB, differs by at most "
        f"{file.parity['max_abs']:.1g} from {file.parity['source']}, with the same prediction on "
        f"{file.parity['same']}"
        for file in files
        if file.parity is not None
    )


def _write(
    context: RunContext, pixels: np.ndarray, source: Source, path: Path, precision: str
) -> ShippedFile | None:
    """Write a file of another format or precision, or warn why it is not written."""
    folder, task, outputs = context.folder.path, context.task, source.outputs
    with tempfile.TemporaryDirectory(prefix=".formats.", suffix=".part", dir=folder) as scratch:
        converted = runnable = Path(scratch, path.name)
        try:
            if precision == FP16:
                file, runnable = write_half(folder / source.path, converted), Path(scratch, "emulated.onnx")
                emulate_half(converted, runnable)
            else:
                file = write_ort(folder / source.path, converted, source.target)
            logits = compute_onnx_logits(runnable, pixels, context.progress)
            parity = compare_logits(task, outputs, replace(outputs, logits=logits), precision)
        except (ArtifactError, ExportError) as error:
            name = ORT if path.suffix == ORT_SUFFIX else FP16
            context.display.warn(f"--formats {name}: {error}. {path.name} is not written")
            return None
        with atomic_write(folder / path) as part:
            shutil.copyfile(converted, part)
    return ShippedFile(
        replace(file, path=folder / path),
        precision,
        task.manifest_entry(task.score(logits, outputs.labels, thresholds=outputs.thresholds)),
        None if source.target is None else read_recipe(folder / source.path),
        source.target,
        {"source": source.path.name, **parity},
    )


def compare_logits(task: Task, source: Outputs, other: Outputs, precision: str) -> dict[str, Any]:
    """Return the largest difference of a logit, and the images with the same prediction, as JSON.

    Raises:
        ExportError: the logits are not finite or differ too much.
    """
    n = len(other.logits)
    if not np.isfinite(other.logits).all():
        raise ExportError(f"logits are not finite on some of {n} images. The largest value of fp16 is 65,504")
    largest = float(np.abs(source.logits).max())
    difference = float(np.abs(other.logits - source.logits).max())
    same = int(task.is_same(source, other).sum())
    if difference > MAX_DIFFERENCE[precision] * largest or n - same > max(1, (1 - MIN_SAME) * n):
        raise ExportError(
            f"logits of up to {largest:.3g} differ by {difference:.2g}, the prediction is the same on {same} "
            f"of {n} images"
        )
    return {"max_abs": difference, "same": same, "n": n}
