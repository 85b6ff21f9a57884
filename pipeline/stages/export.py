"""export: the student as ONNX, equal to torch on real images or not at all."""

from pathlib import Path
from typing import Any

from ...export.onnx_export import check_parity, export_onnx
from ...export.runtime import metadata, normalise
from ..files import whole
from ..job import Job
from ..run_folder import Done
from ..trained import trained_network

PARITY_IMAGES = 32
ARTIFACT = Path("artifact")
STUDENT_ONNX = ARTIFACT / "student.onnx"


def run(job: Job) -> Done:
    import torch

    # The manifest comes last: an artifact without one is not finished.
    (job.folder.path / ARTIFACT / "manifest.json").unlink(missing_ok=True)
    student = job.student
    network = trained_network(job, student)
    preprocessing = job.preprocessing(student)
    pixels, _, _ = job.rendered("test", student)
    images = torch.from_numpy(normalise(pixels[:PARITY_IMAGES].numpy(), preprocessing))
    with whole(job.folder.path / STUDENT_ONNX) as part:
        file = export_onnx(
            network,
            part,
            student.image_size,
            metadata=metadata(preprocessing, job.data.classes, origin(job)),
        )
        parity = check_parity(network, part, images)
    facts = {
        "student": {
            "file": STUDENT_ONNX.as_posix(),
            "bytes": file.bytes,
            "sha256": file.sha256,
            "opset": file.opset,
            "ir_version": file.ir_version,
            "parity": {"max_abs": parity.max_abs, "max_rel": parity.max_rel, "n": parity.n},
        }
    }
    return Done(
        f"{STUDENT_ONNX.as_posix()}, {file.bytes / 1e6:.2f} MB, opset {file.opset}; "
        f"equal to torch within {parity.max_abs:.1e} on {parity.n} images",
        [STUDENT_ONNX.as_posix()],
        facts,
    )


def origin(job: Job) -> dict[str, Any]:
    """Where the student comes from, as it travels inside the files that ship."""
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
    }
