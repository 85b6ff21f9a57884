"""Measure how many bits 16-bit gray images use, such as 12 bits of an X-ray."""

import io
import statistics
from collections.abc import Sequence

import numpy as np
from PIL import Image as PillowImage

from ....export.runtime import MAX_PIXELS, suppress_pillow_warnings
from ...errors import is_system_fault
from ..dataset import Image, fail_to_read
from ..decode import SAMPLE

SLIVER = 4
"""Bits above the usual content from which a note advises to convert the images."""


def measure_gray_bits(images: Sequence[Image]) -> tuple[int, list[str]]:
    """Return the number of bits that 16-bit gray images use (16 without such images), and notes on it.

    About ``SAMPLE`` images are read.
    """
    sample = images[:: max(1, len(images) // SAMPLE)]
    depths = [depth for image in sample if (depth := _measure_depth(image)) is not None]
    if not depths:
        return 16, []
    bits = max(8, *(largest for largest, _ in depths))
    typical = max(8, statistics.median_low([usual for _, usual in depths]))
    notes = []
    if bits < 16:
        notes.append(
            f"16-bit gray images use {bits} bits: {(1 << bits) - 1} is shown as white, here and by "
            "the exported files"
        )
    if typical <= bits - SLIVER:
        notes.append(
            f"most 16-bit gray images use {typical} of {bits} bits and are almost black: convert them to 8 "
            "bits, scaled by the range of their content"
        )
    return bits, notes


def _measure_depth(image: Image) -> tuple[int, int] | None:
    """Return the bits of the largest value and of 99.9 % of the values of a 16-bit gray image.

    None for any other image, and for a damaged one, which decoding reports.

    Raises:
        JobError: the machine cannot read the image.
    """
    try:
        content = image.read()
        if not isinstance(content, bytes):
            return None
        with suppress_pillow_warnings(), PillowImage.open(io.BytesIO(content)) as picture:
            is_gray = picture.mode == "F" or picture.mode.startswith("I")
            if not is_gray or picture.width * picture.height > MAX_PIXELS:
                return None
            values = np.asarray(picture)
            low, high = float(values.min()), float(values.max())
            if low < 0 or high > 65535 or (picture.mode == "F" and high <= 255):  # scaled by other ranges
                return None
            return int(high).bit_length(), int(np.quantile(values, 0.999)).bit_length()
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        if is_system_fault(error):
            raise fail_to_read(image.name, error) from error
        return None
