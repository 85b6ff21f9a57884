"""Which images a run has trained on, by their content: with it they are known again among others."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from .runs.files import whole

TRAIN_IMAGES_FILE = "train_images.safetensors"


def write_train_images(run: Path, keys: np.ndarray) -> None:
    """Write the keys, int64 [n], of the images that can be read, whole or not at all."""
    with whole(run / TRAIN_IMAGES_FILE) as part:
        save_file({"keys": keys}, part)


def read_train_images(run: Path) -> frozenset[int]:
    """The keys; none of an older run, which has not noted them."""
    return (
        frozenset(load_file(run / TRAIN_IMAGES_FILE)["keys"].tolist())
        if (run / TRAIN_IMAGES_FILE).exists()
        else frozenset()
    )
