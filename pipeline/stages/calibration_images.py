"""The training images from which int8 ranges are computed, drawn by the seed and rendered as for testing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ...export.runtime import Preprocessing, normalize
from ..config.network import NetworkSpec
from ..data.decode import render_images
from ..data.training_data import TrainingData
from ..data.views import draw_order
from ..runs.hashes import digest

BATCH = 16


@dataclass(frozen=True)
class CalibrationImages:
    """Rendered images."""

    pixels: np.ndarray
    """uint8 [n,S,S,3]."""
    labels: np.ndarray
    preprocessing: Preprocessing
    hash: str
    """Of the set of images, independent of their order."""

    def batches(self, *, pixel_input: bool) -> Callable[[], Iterator[np.ndarray]]:
        """Return a function that yields batches of a file's input: uint8 pixels, or normalized images."""

        def batches() -> Iterator[np.ndarray]:
            for start in range(0, len(self.pixels), BATCH):
                pixels = self.pixels[start : start + BATCH]
                yield pixels if pixel_input else normalize(pixels, self.preprocessing)

        return batches


def draw_calibration_images(data: TrainingData, student: NetworkSpec) -> CalibrationImages:
    """Draw ``--calibration-images`` images; all if there are fewer."""
    o = data.options
    order = draw_order(o.seed, 0, data.train.keys)[: o.calibration_images].tolist()
    images = [data.train.images[i] for i in order]
    decoded = render_images(images, student.preprocessing)
    return CalibrationImages(
        decoded.pixels.stack().numpy(),
        decoded.targets(data.dataset).numpy(),
        student.preprocessing,
        digest(sorted(image.key for image in images)),
    )
