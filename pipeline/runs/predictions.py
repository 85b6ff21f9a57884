"""What each file that ships has answered to the test images: with it two runs are compared image by image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .files import atomic_write

PREDICTIONS_FILE = "test_answers.safetensors"


@dataclass(frozen=True)
class PerImage:
    """``keys`` int64 [n] tell the images by their content, ``labels`` and ``answers`` [n] are class numbers,
    the answers by what the report calls the file.
    """

    keys: np.ndarray
    labels: np.ndarray
    answers: Mapping[str, np.ndarray]

    def right(self, file: str) -> np.ndarray:
        """bool [n], of the images in the order of their keys."""
        return np.asarray((self.answers[file] == self.labels)[np.argsort(self.keys, kind="stable")])

    def same_images(self, other: "PerImage") -> bool:
        return np.array_equal(np.sort(self.keys), np.sort(other.keys))


def write_predictions(
    path: Path, keys: np.ndarray, labels: np.ndarray, logits: Mapping[str, np.ndarray]
) -> None:
    """Write the answers of files with these ``logits`` [n,classes] to images of one label each, whole or not
    at all.
    """
    answers = {file: one.argmax(1).astype(np.int32) for file, one in logits.items()}
    with atomic_write(path) as part:
        save_file({"keys": keys, "labels": labels.astype(np.int32), **answers}, part)


def read_predictions(path: Path) -> PerImage | None:
    """None where there are none: of older runs, and of images with several labels."""
    try:
        found = load_file(path)
        return PerImage(found.pop("keys"), found.pop("labels"), found)
    except (OSError, SafetensorError, KeyError):
        return None


TRAIN_IMAGES_FILE = "train_images.safetensors"


def write_train_images(run: Path, keys: np.ndarray) -> None:
    """Write the keys, int64 [n], of the images that can be read, whole or not at all."""
    with atomic_write(run / TRAIN_IMAGES_FILE) as part:
        save_file({"keys": keys}, part)


def read_train_images(run: Path) -> frozenset[int]:
    """The keys; none of an older run, which has not noted them."""
    return (
        frozenset(load_file(run / TRAIN_IMAGES_FILE)["keys"].tolist())
        if (run / TRAIN_IMAGES_FILE).exists()
        else frozenset()
    )
