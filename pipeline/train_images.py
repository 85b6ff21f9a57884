"""Which images a run has trained on, by their content: with it they are known again among others."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from .files import whole

FILE = "train_images.safetensors"


def save(run: Path, keys: np.ndarray) -> None:
    """Write the keys, int64 [n], of the images that can be read, whole or not at all."""
    with whole(run / FILE) as part:
        save_file({"keys": keys}, part)


def load(run: Path) -> frozenset[int]:
    """The keys; none of an older run, which has not noted them."""
    return frozenset(load_file(run / FILE)["keys"].tolist()) if (run / FILE).exists() else frozenset()
