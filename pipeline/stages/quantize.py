"""quantize: int8, calibrated on training images as the test transform renders them."""

from collections.abc import Iterator

import numpy as np

from ...export.quantize import quantize_int8
from ...export.runtime import normalise
from ..data.decode import rendered
from ..data.views import permutation
from ..files import digest, whole
from ..job import Job
from ..run_folder import Done
from .export import ARTIFACT, STUDENT_ONNX, takes_pixels

STUDENT_INT8 = ARTIFACT / "student.int8.onnx"
CHUNK = 16
"""Images a calibrator sees at once: all activations of a chunk are in memory."""


def run(job: Job) -> Done:
    o = job.options
    order = permutation(o.seed, 0, job.train.keys)[: o.calibration_images].tolist()
    images = [job.train.images[i] for i in order]
    preprocessing = job.preprocessing(job.student)
    pixels = rendered(images, preprocessing).pixels.stacked().numpy()

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, len(pixels), CHUNK):
            chunk = pixels[start : start + CHUNK]
            yield chunk if takes_pixels(job) else normalise(chunk, preprocessing)
            job.stage.update("calibrating", min(start + CHUNK, len(pixels)), len(pixels), "images")

    fp32 = job.folder.path / STUDENT_ONNX
    with whole(job.folder.path / STUDENT_INT8) as part:
        file = quantize_int8(fp32, part, chunks, method=o.calibration)
    recipe = {**file.recipe, "calibration_hash": digest(sorted(image.key for image in images))}
    facts = {
        "student_int8": {
            "name": job.student.name,
            "weights": job.folder.facts()["student"]["weights"],
            "parameters": job.folder.facts()["student"]["parameters"],
            "file": STUDENT_INT8.as_posix(),
            "bytes": file.bytes,
            "sha256": file.sha256,
            "opset": file.opset,
            "ir_version": file.ir_version,
            "quantization": recipe,
        }
    }
    smaller = fp32.stat().st_size / file.bytes
    return Done(
        f"{STUDENT_INT8.as_posix()}, {file.bytes / 1e6:.2f} MB, {smaller:.2f} times smaller, calibrated by "
        f"{o.calibration} on {len(images)} training images",
        [STUDENT_INT8.as_posix()],
        facts,
    )
