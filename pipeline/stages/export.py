"""export: the student as ONNX, equal to torch on real images or not at all."""

from pathlib import Path
from typing import Any

from torch import nn

from ...export.conversion.onnx_export import OnnxFile, check_parity, export_onnx, with_metadata
from ...export.conversion.pixel_input import Outside, front_of
from ...export.runtime import metadata, normalise
from ..evaluation.inference import tempered, thresholds
from ..runs.files import atomic_write
from ..runs.folder import StageResult
from ..training.job import Job, takes_pixels
from ..training.weights import trained_network

PARITY_IMAGES = 32
ARTIFACT = Path("artifact")
STUDENT_ONNX = ARTIFACT / "student.onnx"


def run(job: Job) -> StageResult:
    import torch

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
            network, file, fit = tempered(job, network, images, part, export)
        if job.data.multi_label:
            file = with_metadata(file, about(fit.value if fit else None, thresholds(job, part)))
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
