"""export: the student as ONNX, equal to torch on real images or not at all."""

from pathlib import Path
from typing import Any

import numpy as np

from ...export.onnx_export import OnnxFile, check_parity, export_onnx, with_metadata
from ...export.runtime import Classifier, metadata, normalise
from .. import multi_label
from ..files import whole
from ..job import Job
from ..run_folder import Done
from ..trained import trained_network

PARITY_IMAGES = 32
BATCH = 32
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
        if job.data.multi_label:
            file = _with_thresholds(job, file)
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


def _with_thresholds(job: Job, file: OnnxFile) -> OnnxFile:
    """The file with a threshold for each class, chosen by its own answers to the select images."""
    pixels, labels, _ = job.rendered("select", job.student)
    thresholds = np.full(len(job.data.classes), multi_label.EVEN)
    if len(labels):
        logits = onnx_logits(job, Classifier(file.path.read_bytes(), STUDENT_ONNX.name), pixels.numpy())
        thresholds = multi_label.choose_thresholds(logits, labels.numpy())
    preprocessing = job.preprocessing(job.student)
    return with_metadata(file, metadata(preprocessing, job.data.classes, origin(job), thresholds.tolist()))


def onnx_logits(job: Job, classifier: Classifier, images: np.ndarray) -> np.ndarray:
    """A shipped file's answers in its runtime, fp32 [n,classes], to rendered images uint8 [n,S,S,3]."""
    logits = []
    for start in range(0, len(images), BATCH):
        batch = normalise(images[start : start + BATCH], classifier.preprocessing)
        logits.append(classifier.logits(batch))
        job.stage.update(f"asking {classifier.name}", min(start + BATCH, len(images)), len(images), "images")
    return np.concatenate(logits)


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
