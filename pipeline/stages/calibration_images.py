"""The training images that int8's ranges are taken from: drawn by the seed, rendered as for testing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ...export.runtime import normalise
from ..data.decode import rendered
from ..data.views import permutation
from ..runs.files import digest
from ..training.job import Job, takes_pixels

BATCH = 16


@dataclass(frozen=True)
class CalibrationImages:
    pixels: np.ndarray
    """uint8 [n,S,S,3]."""
    labels: np.ndarray
    hash: str
    """Of the images, whatever their order."""


def calibration_batches(job: Job, images: CalibrationImages) -> Callable[[], Iterator[np.ndarray]]:
    """The images a few at a time, as the student's files take them: pixels, or normalised."""
    preprocessing = job.preprocessing(job.student)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(images.pixels), BATCH):
            pixels = images.pixels[start : start + BATCH]
            yield pixels if takes_pixels(job) else normalise(pixels, preprocessing)

    return batches


def calibration_images(job: Job) -> CalibrationImages:
    """``--calibration-images`` of them, all where there are fewer."""
    order = permutation(job.options.seed, 0, job.train.keys)[: job.options.calibration_images].tolist()
    images = [job.train.images[i] for i in order]
    decoded = rendered(images, job.preprocessing(job.student))
    return CalibrationImages(
        decoded.pixels.stacked().numpy(),
        decoded.targets(job.data).numpy(),
        digest(sorted(image.key for image in images)),
    )
