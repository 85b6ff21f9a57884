"""Predictions of the exported files on the test images, with which runs are compared image by image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .files import atomic_write

PREDICTIONS_FILE = "test_predictions.safetensors"
TRAIN_IMAGES_FILE = "train_images.safetensors"


@dataclass(frozen=True)
class Predictions:
    """Class numbers of n images: ``labels`` [n], and ``classes`` [n] by the report's name of a file.

    ``keys`` int64 [n] are hashes of the images' content.
    """

    keys: np.ndarray
    labels: np.ndarray
    classes: Mapping[str, np.ndarray]

    def is_correct(self, file: str) -> np.ndarray:
        """Return bool [n] in the order of the images' keys."""
        return np.asarray((self.classes[file] == self.labels)[np.argsort(self.keys, kind="stable")])

    def has_same_images(self, other: "Predictions") -> bool:
        """Return True if both are of the same images."""
        return np.array_equal(np.sort(self.keys), np.sort(other.keys))


def write_predictions(
    path: Path, keys: np.ndarray, labels: np.ndarray, logits: Mapping[str, np.ndarray]
) -> None:
    """Write the classes with the largest ``logits``, [n,classes] by file; see ``Predictions``."""
    classes = {file: rows.argmax(1).astype(np.int32) for file, rows in logits.items()}
    with atomic_write(path) as part:
        save_file({"keys": keys, "labels": labels.astype(np.int32), **classes}, part)


def read_predictions(path: Path) -> Predictions | None:
    """Return the predictions, or None if there are none, as for multi-label data."""
    try:
        arrays = load_file(path)
        return Predictions(arrays.pop("keys"), arrays.pop("labels"), arrays)
    except (OSError, SafetensorError, KeyError):
        return None


def write_train_images(run: Path, keys: np.ndarray) -> None:
    """Write the keys, int64 [n], of the training images that can be read."""
    with atomic_write(run / TRAIN_IMAGES_FILE) as part:
        save_file({"keys": keys}, part)


def read_train_images(run: Path) -> frozenset[int]:
    """Return the keys of a run's training images, or an empty set before they are written."""
    file = run / TRAIN_IMAGES_FILE
    return frozenset(load_file(file)["keys"].tolist()) if file.exists() else frozenset()
