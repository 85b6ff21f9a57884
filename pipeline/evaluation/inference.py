"""The files that ship, asked in ONNX Runtime: their logits, and a temperature that makes those honest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...export.conversion.onnx_export import OnnxFile, fold_temperature
from ...export.runtime import Classifier, session
from ..errors import JobError
from ..runs.scores import Temperature
from ..training.job import Job
from . import multi_label
from .calibration import fit_temperature

BATCH = 32
TOLERANCE = 1e-4
"""Largest difference between a file's logits times T and those without T, by the largest of these."""


def shipped_logits(job: Job, file: Path, images: np.ndarray, *, fuse: bool = True) -> np.ndarray:
    """Logits [n,classes] of an ONNX file on rendered images, uint8 [n,S,S,3], n > 0; for ``fuse`` see
    ``runtime.session``.
    """
    classifier = Classifier(file.read_bytes(), file.name)
    if not fuse:
        classifier.session = session(file, classifier.threads, fuse=False)
    logits = []
    for start in range(0, len(images), BATCH):
        logits.append(classifier.logits(classifier.feed(images[start : start + BATCH])))
        job.stage.update(f"asking {file.name}", min(start + BATCH, len(images)), len(images), "images")
    return np.concatenate(logits)


def tempered(
    job: Job,
    network: nn.Module,
    images: torch.Tensor,
    file: Path,
    export: Callable[[nn.Module, float | None], OnnxFile],
) -> tuple[nn.Module, OnnxFile, Temperature]:
    """Fit a temperature to an exported file on the val role, fold it into the network, export that.

    Args:
        network: what ``file`` was exported from.
        images: some of its input, float32 [N,3,S,S].
        export: writes ``file`` anew.

    Returns:
        The network with the temperature, its file, and how the temperature was found.

    Raises:
        JobError: there is no val image, or the new file answers differently.
    """
    pixels, labels, _ = job.rendered("val", job.student)
    if not len(pixels):
        raise JobError(
            "--calibrate fits a temperature on val images, and there is none to be read; hold some out, "
            "as with --val-fraction 0.1."
        )
    val = pixels.numpy()
    plain = shipped_logits(job, file, val)
    fit = fit_temperature(plain, labels.numpy())
    if fit.note:
        job.display.warn(
            f"--calibrate, on {fit.n} val images: {fit.note}; temperature {fit.value:g} is used."
        )
    network, folded = fold_temperature(network, fit.value, images)
    exported = export(network, fit.value)
    check_tempered(plain, shipped_logits(job, file, val), fit.value)
    return network, exported, fit.model_copy(update={"folded": folded})


def check_tempered(plain: np.ndarray, divided: np.ndarray, temperature: float) -> None:
    """``divided`` times the temperature is ``plain``, both logits [n,classes]: then every answer is the same,
    but between two logits that float32 can hardly tell apart.

    Raises:
        JobError: it is not.
    """
    off = float(np.abs(divided * np.float64(temperature) - plain).max())
    most = float(np.abs(plain).max())
    if not off <= TOLERANCE * most:
        raise JobError(
            f"The file with temperature {temperature:.4g} does not answer as the one without: logits of up "
            f"to {most:.3g} differ by up to {off:.2g}; leave --calibrate out."
        )


def thresholds(job: Job, file: Path) -> list[float]:
    """Each class's best threshold for a file's answers to the val images, which have several labels."""
    pixels, labels, _ = job.rendered("val", job.student)
    if not len(labels):
        return [multi_label.EVEN] * len(job.data.classes)
    logits = shipped_logits(job, file, pixels.numpy())
    chosen: list[float] = multi_label.choose_thresholds(logits, labels.numpy()).tolist()
    return chosen
