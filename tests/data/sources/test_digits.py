import numpy as np
from questpress.pipeline.data.dataset import SPLITS
from sklearn.datasets import load_digits

from tests.support.pictures import open_digits


def test_digits_are_those_of_scikit_learn_in_8_bits() -> None:
    images = open_digits()
    assert len(images) == 1797 and images.classes == tuple("0123456789")
    source = load_digits().images
    for role in SPLITS:
        for image in images.split(role)[:5]:
            pixels = image.read()
            assert isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (8, 8, 3)
            number = int(image.name.split("/")[1])
            assert np.abs(pixels[..., 0] / 255 * 16 - source[number]).max() < 0.04
            assert load_digits().target[number] == image.label


def test_digits_are_split_10_percent_for_each_class() -> None:
    counts = open_digits().counts
    assert all(17 <= n <= 19 for role in ("val", "test") for n in counts[role])
    assert open_digits().fingerprint == open_digits().fingerprint
