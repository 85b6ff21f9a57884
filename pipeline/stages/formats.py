"""The student in the further formats of `--formats`, each checked against the fp32 file; part of validate."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...export.artifact import ShippedFile
from ...export.conversion.half import emulate_half, write_half
from ...export.conversion.onnx_export import describe
from ...export.errors import ExportError
from ...export.runtime import ArtifactError
from ..evaluation.predictions import compute_onnx_logits
from ..runs.files import atomic_write
from ..runs.folder import ARTIFACT
from ..tasks.base import Outputs, Task
from ..training.context import RunContext
from .export import STUDENT_ONNX

FP16 = "fp16"
STUDENT_FP16 = ARTIFACT / "student.fp16.onnx"
MAX_DIFFERENCE = 0.05
"""Largest difference of the fp16 file's logits, relative to the largest logit."""
MIN_SAME = 0.99
"""Smallest fraction of images with the same prediction; one that differs is always allowed."""


def write_formats(context: RunContext, pixels: np.ndarray, fp32: Outputs) -> list[ShippedFile]:
    """Write the files that `--formats` requests and delete others; ``fp32`` is computed from ``pixels``.

    Without a file whose outputs differ too much from ``fp32`` the run continues, with a warning.
    """
    folder = context.folder.path
    shipped = _write_fp16(context, pixels, fp32) if FP16 in context.options.formats else None
    if shipped is None:
        (folder / STUDENT_FP16).unlink(missing_ok=True)  # of an earlier command
    return [] if shipped is None else [shipped]


def describe_formats(files: list[ShippedFile]) -> str:
    """Return the continuation of the stage's summary."""
    return "".join(
        f"; {file.file.path.name}, {file.file.bytes / 1e6:.2f} MB, differs by at most "
        f"{file.parity['max_abs']:.1g} from fp32, with the same prediction on {file.parity['same']}"
        for file in files
        if file.parity is not None
    )


def _write_fp16(context: RunContext, pixels: np.ndarray, fp32: Outputs) -> ShippedFile | None:
    folder, task = context.folder.path, context.task
    with tempfile.TemporaryDirectory(prefix=".fp16.", suffix=".part", dir=folder) as scratch:
        half, emulated = Path(scratch, STUDENT_FP16.name), Path(scratch, "emulated.onnx")
        try:
            write_half(folder / STUDENT_ONNX, half)
            emulate_half(half, emulated)
            logits = compute_onnx_logits(emulated, pixels, context.progress)
            parity = compare_logits(task, fp32, replace(fp32, logits=logits))
        except (ArtifactError, ExportError) as error:
            context.display.warn(f"--formats fp16: {error}. {STUDENT_FP16.name} is not written")
            return None
        with atomic_write(folder / STUDENT_FP16) as part:
            shutil.copyfile(half, part)
    accuracy = task.manifest_entry(task.score(logits, fp32.labels, thresholds=fp32.thresholds))
    return ShippedFile(describe(folder / STUDENT_FP16), FP16, accuracy, parity=parity)


def compare_logits(task: Task, fp32: Outputs, half: Outputs) -> dict[str, Any]:
    """Return the largest difference of a logit, and the images with the same prediction, as JSON.

    Raises:
        ExportError: the logits are not finite or differ too much.
    """
    n = len(half.logits)
    if not np.isfinite(half.logits).all():
        raise ExportError(f"values of the network exceed 65,504, the largest of fp16, on some of {n} images")
    largest, difference = float(np.abs(fp32.logits).max()), float(np.abs(half.logits - fp32.logits).max())
    same = int(task.is_same(fp32, half).sum())
    if difference > MAX_DIFFERENCE * largest or n - same > max(1, (1 - MIN_SAME) * n):
        raise ExportError(
            f"logits of up to {largest:.3g} differ by {difference:.2g} from fp32, the prediction is the same "
            f"on {same} of {n} images"
        )
    return {"max_abs": difference, "same": same, "n": n}
