"""export: write the student as ONNX, checked against torch on real images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...export.conversion.batch import fix_batch
from ...export.conversion.onnx_export import (
    OnnxFile,
    check_parity,
    export_onnx,
    fold_temperature,
    merge_branches,
    with_metadata,
)
from ...export.conversion.pixel_input import Outside, load_front
from ...export.runtime import build_metadata, normalize
from ...models.initialize import parameters
from ..data.training_data import TrainingData
from ..errors import JobError
from ..evaluation.calibration import fit_temperature
from ..evaluation.predictions import compute_onnx_logits
from ..runs.files import atomic_write
from ..runs.folder import ARTIFACT, StageResult
from ..runs.scores import Temperature
from ..training.context import RunContext
from ..training.weights import load_network

PARITY_IMAGES = 32
STUDENT_ONNX = ARTIFACT / "student.onnx"
STUDENT_INT8 = ARTIFACT / "student.int8.onnx"
"""The int8 file of the first target."""
MAX_TEMPERATURE_ERROR = 1e-4
"""Largest difference between a file's logits times T and those before, relative to the largest of these."""


@dataclass(frozen=True)
class _Exporter:
    """Writes the student's ONNX file, whose metadata depend on temperature and thresholds."""

    context: RunContext
    data: TrainingData
    previous: Mapping[str, Any]
    path: Path

    def export(self, network: nn.Module, temperature: float | None = None) -> OnnxFile:
        student, options = self.context.student, self.context.options
        file = export_onnx(
            network,
            self.path,
            student.image_size,
            metadata=self._metadata(temperature),
            pixels=student.preprocessing if self.context.has_pixel_input else None,
            opset=options.opset,
        )
        return file if options.batch == "dynamic" else fix_batch(file)

    def add_thresholds(self, file: OnnxFile, temperature: float | None) -> OnnxFile:
        """Choose each class's threshold on val images and add them to the metadata."""
        pixels, labels, _ = self.data.rendered("val", self.context.student)
        logits = np.empty(labels.shape)
        if len(labels):
            logits = compute_onnx_logits(self.path, pixels.numpy(), self.context.progress)
        thresholds = self.context.task.choose_thresholds(logits, labels.numpy())
        assert thresholds is not None
        return with_metadata(file, self._metadata(temperature, thresholds.tolist()))

    def _metadata(self, temperature: float | None, thresholds: list[float] | None = None) -> dict[str, str]:
        return build_metadata(
            self.context.student.preprocessing,
            self.data.classes,
            origin(self.context, self.previous, temperature),
            thresholds,
            takes_pixels=self.context.has_pixel_input,
        )


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    student, folder = context.student, context.folder.path
    network = load_network(folder, student)
    pixels = data.rendered("test", student)[0][:PARITY_IMAGES].numpy()
    images = torch.from_numpy(normalize(pixels, student.preprocessing))
    with atomic_write(folder / STUDENT_ONNX) as part:
        exporter = _Exporter(context, data, previous, part)
        file, fit = exporter.export(network), None
        if context.options.calibrate:
            network, file, fit = _calibrate(exporter, network, images)
        if context.task.has_thresholds:
            file = exporter.add_thresholds(file, fit.value if fit else None)
        parity = check_parity(
            network,
            part,
            images,
            pixels=pixels if context.has_pixel_input else None,
            batch_sizes=(1, 5) if context.options.batch == "dynamic" else (1,),
        )
        if context.has_pixel_input and isinstance(load_front(part), Outside):
            context.display.warn(
                f"--input uint8: the first layer of {student.name} is not a plain convolution, so the "
                "normalization is computed in float before it. At 224 px this adds about 10 % to the "
                "latency of an int8 MobileNetV2; folded into a convolution it costs nothing."
            )
        # An artifact without manifest is unfinished. The old one describes other files.
        for name in ("manifest.json", "README.md"):
            (folder / ARTIFACT / name).unlink(missing_ok=True)
    facts: dict[str, Any] = {
        "student": {
            "file": STUDENT_ONNX.as_posix(),
            "bytes": file.bytes,
            "sha256": file.sha256,
            "parameters": parameters(merge_branches(network)),
            "opset": file.opset,
            "ir_version": file.ir_version,
            "parity": {"max_abs": parity.max_abs, "max_rel": parity.max_rel, "n": parity.n},
        }
    }
    temperature = ""
    if fit is not None:
        facts["temperature"] = fit.model_dump(exclude_none=True)
        temperature = f"; temperature {fit.value:.3g} fitted on {fit.n} val images"
    return StageResult(
        f"{STUDENT_ONNX.as_posix()}, {file.bytes / 1e6:.2f} MB, opset {file.opset}; "
        f"equal to torch within {parity.max_abs:.1e} on {parity.n} images{temperature}",
        [STUDENT_ONNX.as_posix()],
        facts,
    )


def origin(
    context: RunContext, previous: Mapping[str, Any], temperature: float | None = None
) -> dict[str, Any]:
    """Return the student's origin, which is part of the files that ship."""
    o, student, teachers = context.options, previous["student"], previous["teachers"]
    return {
        "student": context.student.name,
        "student_weights": student["weights"],
        "teachers": [{"name": teacher["name"], "weights": teacher["weights"]} for teacher in teachers],
        "method": o.method,
        "data": context.dataset_name,
        "licenses": sorted({n["license"] for n in [student, *teachers] if n.get("license")}),
        **({} if o.rounds == 1 else {"rounds": o.rounds}),
        **({} if temperature is None else {"temperature": temperature}),
    }


def _calibrate(
    exporter: _Exporter, network: nn.Module, images: torch.Tensor
) -> tuple[nn.Module, OnnxFile, Temperature]:
    """Fit a temperature to the exported file on the val images, fold it into the network and export it again.

    ``images`` are some inputs of the network, float32 [N,3,H,W].
    """
    context, file = exporter.context, exporter.path
    pixels, labels, _ = exporter.data.rendered("val", context.student)
    if not len(pixels):
        raise JobError(
            "--calibrate: there are no readable val images. Hold some out with --val-fraction 0.1."
        )
    val = pixels.numpy()
    before = compute_onnx_logits(file, val, context.progress)
    assert context.task.likelihood is not None  # see api.resolve
    fit = fit_temperature(before, labels.numpy(), context.task.likelihood)
    if fit.note:
        context.display.warn(
            f"--calibrate: {fit.note}, on {fit.n} val images. Using temperature {fit.value:g}."
        )
    network, folded = fold_temperature(network, fit.value, images)
    exported = exporter.export(network, fit.value)
    check_temperature(before, compute_onnx_logits(file, val, context.progress), fit.value)
    return network, exported, fit.model_copy(update={"folded": folded})


def check_temperature(before: np.ndarray, after: np.ndarray, temperature: float) -> None:
    """Raise JobError unless ``after`` times the temperature is ``before``, so predictions are the same."""
    error = float(np.abs(after * np.float64(temperature) - before).max())
    largest = float(np.abs(before).max())
    if not error <= MAX_TEMPERATURE_ERROR * largest:
        raise JobError(
            f"--calibrate: with temperature {temperature:.4g} the file's logits of up to {largest:.3g} "
            f"differ by {error:.2g} from those without. Omit --calibrate."
        )
