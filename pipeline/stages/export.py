"""export: the student as ONNX, equal to torch on real images or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...export.conversion.onnx_export import (
    OnnxFile,
    check_parity,
    export_onnx,
    fold_temperature,
    with_metadata,
)
from ...export.conversion.pixel_input import Outside, front_of
from ...export.runtime import metadata, normalise
from ..evaluation.calibration import fit_temperature
from ..evaluation.inference import compute_onnx_logits
from ..errors import JobError
from ..runs.files import atomic_write
from ..runs.folder import StageResult
from ..runs.scores import Temperature
from ..tasks import task_of
from ..training.job import Job, takes_pixels
from ..training.weights import trained_network

PARITY_IMAGES = 32
ARTIFACT = Path("artifact")
STUDENT_ONNX = ARTIFACT / "student.onnx"

MAX_TEMPERATURE_ERROR = 1e-4
"""Largest difference between a file's logits times T and those before, relative to the largest of these."""


def run(job: Job) -> StageResult:
    student = job.student
    network = trained_network(job, student)
    preprocessing = job.preprocessing(student)
    pixels, _, _ = job.rendered("test", student)
    shown = pixels[:PARITY_IMAGES].numpy()
    images = torch.from_numpy(normalise(shown, preprocessing))
    folded = preprocessing if takes_pixels(job) else None
    with atomic_write(job.folder.path / STUDENT_ONNX) as part:

        def about(temperature: float | None, chosen: list[float] | None = None) -> dict[str, str]:
            classes = job.data.classes
            return metadata(
                preprocessing, classes, origin(job, temperature), chosen, takes_pixels=folded is not None
            )

        def export(network: nn.Module, temperature: float | None) -> OnnxFile:
            return export_onnx(
                network,
                part,
                student.image_size,
                metadata=about(temperature),
                pixels=folded,
                opset=job.options.opset,
            )

        file, fit = export(network, None), None
        if job.options.calibrate:
            network, file, fit = _calibrate(job, network, images, part, export)
        if task_of(job.data).has_thresholds:
            file = with_metadata(file, about(fit.value if fit else None, _choose_thresholds(job, part)))
        parity = check_parity(network, part, images, pixels=shown if folded else None)
        if folded and isinstance(front_of(part), Outside):
            job.display.warn(
                f"--input uint8: the first layer of {student.name} is not a plain convolution, so that the "
                "normalisation stands before it in float; at 224 px that adds about 10 % to the time of a "
                "MobileNetV2 in int8, where folded it costs nothing."
            )
        # The manifest comes last: an artifact without one is not finished. What is said of the old one goes.
        for name in ("manifest.json", "README.md"):
            (job.folder.path / ARTIFACT / name).unlink(missing_ok=True)
    facts: dict[str, Any] = {
        "student": {
            "file": STUDENT_ONNX.as_posix(),
            "bytes": file.bytes,
            "sha256": file.sha256,
            "opset": file.opset,
            "ir_version": file.ir_version,
            "parity": {"max_abs": parity.max_abs, "max_rel": parity.max_rel, "n": parity.n},
        }
    }
    if fit is not None:
        facts["temperature"] = fit.model_dump(exclude_none=True)
    told = "" if fit is None else f"; temperature {fit.value:.3g} fitted on {fit.n} val images"
    return StageResult(
        f"{STUDENT_ONNX.as_posix()}, {file.bytes / 1e6:.2f} MB, opset {file.opset}; "
        f"equal to torch within {parity.max_abs:.1e} on {parity.n} images{told}",
        [STUDENT_ONNX.as_posix()],
        facts,
    )


def onnx_logits(job: Job, file: Path, images: np.ndarray, *, fuse: bool = True) -> np.ndarray:
    """Return a file's logits [n,classes] and show the progress; see ``compute_onnx_logits``."""

    def show(done: int, total: int) -> None:
        job.stage.update(f"evaluating {file.name}", done, total, "images")

    return compute_onnx_logits(file, images, show, fuse=fuse)


def _calibrate(
    job: Job,
    network: nn.Module,
    images: torch.Tensor,
    file: Path,
    export: Callable[[nn.Module, float | None], OnnxFile],
) -> tuple[nn.Module, OnnxFile, Temperature]:
    """Fit a temperature to an exported file on the val images, fold it into the network and export it again.

    Args:
        network: the network that ``file`` was exported from.
        images: some of its inputs, float32 [N,3,S,S].
        export: writes ``file``.

    Raises:
        JobError: there are no val images, or the new file's logits are not the old ones divided by T.
    """
    pixels, labels, _ = job.rendered("val", job.student)
    if not len(pixels):
        raise JobError("--calibrate: there are no readable val images. Hold some out with --val-fraction 0.1.")
    val = pixels.numpy()
    before = onnx_logits(job, file, val)
    fit = fit_temperature(before, labels.numpy(), task_of(job.data).likelihood)
    if fit.note:
        job.display.warn(f"--calibrate: {fit.note}, on {fit.n} val images. Using temperature {fit.value:g}.")
    network, folded = fold_temperature(network, fit.value, images)
    exported = export(network, fit.value)
    check_temperature(before, onnx_logits(job, file, val), fit.value)
    return network, exported, fit.model_copy(update={"folded": folded})


def check_temperature(before: np.ndarray, after: np.ndarray, temperature: float) -> None:
    """Check that ``after`` times the temperature is ``before``, so that predictions are the same.

    Raises:
        JobError: it is not.
    """
    error = float(np.abs(after * np.float64(temperature) - before).max())
    largest = float(np.abs(before).max())
    if not error <= MAX_TEMPERATURE_ERROR * largest:
        raise JobError(
            f"--calibrate: with temperature {temperature:.4g} the file's logits of up to {largest:.3g} differ "
            f"by {error:.2g} from those without. Omit --calibrate."
        )


def _choose_thresholds(job: Job, file: Path) -> list[float]:
    pixels, labels, _ = job.rendered("val", job.student)
    logits = onnx_logits(job, file, pixels.numpy()) if len(labels) else np.empty(labels.shape)
    thresholds = task_of(job.data).choose_thresholds(logits, labels.numpy())
    assert thresholds is not None
    chosen: list[float] = thresholds.tolist()
    return chosen


def origin(job: Job, temperature: float | None = None) -> dict[str, Any]:
    """Where the student comes from, as it travels inside the files that ship.

    Args:
        temperature: what its logits were divided by, if anything.
    """
    facts = job.folder.facts()
    return {
        "student": job.student.name,
        "student_weights": facts["student"]["weights"],
        "teachers": [{"name": t["name"], "weights": t["weights"]} for t in facts["teachers"]],
        "method": job.options.method,
        "data": job.data.name,
        "licences": sorted(
            {s["licence"] for s in [facts["student"], *facts["teachers"]] if s.get("licence")}
        ),
        **({} if job.options.rounds == 1 else {"rounds": job.options.rounds}),
        **({} if temperature is None else {"temperature": temperature}),
    }
