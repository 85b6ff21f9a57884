"""The built-in data set: handwritten digits that come with scikit-learn, so nothing is downloaded."""

import numpy as np

from .dataset import Image, ImageSet, array_key
from .given import Given


def open_digits(*, select_fraction: float | None = None) -> ImageSet:
    """scikit-learn's ``load_digits``: 1,797 real 8×8 images of the digits 0 to 9, as uint8 RGB.

    Their 17 levels of grey (0 to 16) are spread over 0 to 255. Source: UCI Optical Recognition of
    Handwritten Digits (Alpaydin and Kaynak 1998), its test part.
    """
    return read_digits().assembled(select_fraction)


def read_digits() -> Given:
    """The same images, without roles."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = []
    for number, (pixels, label) in enumerate(zip(grey, data.target, strict=True)):
        rgb = np.repeat(pixels[:, :, None], 3, axis=2)
        images.append(Image(f"{label}/{number:04d}", int(label), array_key(rgb), rgb))
    digits = tuple(str(digit) for digit in range(10))
    return Given("digits", "the built-in digits", digits, {"train": images}, has_roles=False)
