"""Defaults that depend on the data, for the job, ``--help`` and docs/command-line.md."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SMALL_IMAGES = 64
"""Largest median short side, in pixels, of images that are shifted instead of cropped and resized."""

ADAPTIVE_SCALE = 50.0
"""Learning rate of SGD over that of adaptive optimizers (0.1 and 0.002 are usual)."""

TUNING_STEPS, MAX_TUNING_EPOCHS = 300, 40
"""Least steps of tuning pretrained weights, and most epochs: on 600 photos 540 gained ≤ 1 point over 216."""

DETECTOR_STEPS = 1_000
"""Least steps of detectors, whose heads are new, within as many epochs."""

DIGITS: Mapping[str, Any] = {"teacher_epochs": 4, "epochs": 15, "batch_size": 64, "flip": False}
"""Options of the built-in digits, with which a first run takes a few minutes on two cores."""

DIGITS_SIZES = 40, 64
"""Sides of the digits in pixels. The first is their 8 pixels times 5, of which a MobileNet or ResNet makes a
map of 2 × 2 as of 64; the second suits networks that split images into patches.
"""

DIGITS_VIEWS = 5
"""As ``CACHE_VIEWS``: computing 9 views took a fifth of the student's time and gained nothing measurable."""

CACHE_VIEWS = 30
"""Ten views of each image, seen three times each, cost accuracy; 30 did not measurably (docs/benchmarks.md).
Most trainings with default options have 20 to 60 epochs.
"""

CACHE_BYTES = 4 << 30
"""Largest size of cached teacher outputs by default."""


@dataclass(frozen=True)
class Row:
    """Defaults of one option, for a network trained from scratch and from pretrained weights."""

    option: str
    scratch: str
    pretrained: str | None = None
    """None if it is the same."""


SCRATCH_METHOD, TUNING_METHOD = "quest", "quest+mimic"
"""Methods for students from scratch and for pretrained ones: the best on CIFAR-10 and on photos
(docs/benchmarks.md).
"""

DETECTION_METHODS: tuple[str, ...] = ("mimic", "pkd")
"""Methods for detectors, the best of docs/detection.md first; the next one is used if it does not fit."""

TABLE: tuple[Row, ...] = (
    Row("--method", "quest; mimic for detectors", "quest+mimic if one teacher's vector can be matched"),
    Row(
        "--epochs",
        "20; 60 from 2,000, 100 from 100,000 images; 15 for digits; detectors 40, 24 from 100,000",
        "20; 10 from 100,000 images; up to 40 for 300 steps, of detectors for 1,000",
    ),
    Row(
        "--teacher-epochs",
        "10; 60 from 2,000, 100 from 100,000 images; 4 for digits; detectors 40, 24 from 100,000",
        "10; 5 from 100,000 images; up to 40 for 300 steps; detectors as --epochs",
    ),
    Row(
        "--batch-size",
        "32; 64 for digits and from 2,000, 128 from 20,000, 256 from 200,000 images; an eighth for detectors",
    ),
    Row("--optimizer", "adamw"),
    Row(
        "--lr",
        "0.0028 at batch 64, proportional to √batch; 0.0016 for detectors; 50 times that with SGD",
        "the same; 0.0002 at batch 64 without BatchNorm",
    ),
    Row("--teacher-lr", "half of the default of --lr; of detectors as --lr", "as --lr"),
    Row("--schedule", "cosine to zero"),
    Row("--warmup-epochs, --teacher-warmup-epochs", "1/10 of the epochs, at most 5"),
    Row("--weight-decay", "0.05"),
    Row("--label-smoothing", "0"),
    Row("--crop", "pad for small images (median short side up to 64), otherwise resized"),
    Row("--crop-scale", "0.25 (resized)"),
    Row("--pad", "a crop moves by up to 1/8 of its size (pad)"),
    Row("--pad-mode", "zeros"),
    Row("--flip", "on; off for digits"),
    Row("--color-jitter", "0"),
    Row("--val-fraction", "0.1"),
    Row("--image-size", "the student's; 40 for digits"),
    Row(
        "--cache-views",
        f"{CACHE_VIEWS} (digits: {DIGITS_VIEWS}), at most --epochs; 0 if the outputs would take more than "
        "4 GiB, or with a recipe",
    ),
    Row("--seed", "0"),
)


def choose_epochs(role: str, images: int, batch: int, *, scratch: bool, detector: bool = False) -> int:
    """Return the epochs of the ``student`` or a ``teacher`` for a number of training images.

    Pretrained weights need about ``TUNING_STEPS`` steps, which are many epochs of few images.
    """
    if detector:
        least = _by_size(images, (0, 20), (100_000, 12)) * (2 if scratch else 1)
        return max(least, min(MAX_TUNING_EPOCHS, math.ceil(DETECTOR_STEPS / max(1, images // batch))))
    if scratch:
        return _by_size(images, (0, 10 if role == "teacher" else 20), (2_000, 60), (100_000, 100))
    least = _by_size(images, (0, 10), (100_000, 5)) * (1 if role == "teacher" else 2)
    return max(least, min(MAX_TUNING_EPOCHS, math.ceil(TUNING_STEPS / max(1, images // batch))))


def choose_batch_size(images: int, *, detector: bool = False) -> int:
    """Return the images per step for a number of training images."""
    size: int = _by_size(images, (0, 32), (2_000, 64), (20_000, 128), (200_000, 256))
    return size // 8 if detector else size


def choose_learning_rate(
    batch: int,
    optimizer: str,
    role: str,
    *,
    scratch: bool,
    has_batch_norm: bool = True,
    detector: bool = False,
) -> float:
    """Return the peak learning rate.

    From scratch, that of a teacher, the larger network, is half the student's. Pretrained networks without
    BatchNorm (transformers, ConvNeXt) are tuned at lower rates. Detectors have lower ones in both roles
    (docs/detection.md).
    """
    rate = (1.6e-3 if detector else 2.8e-3) if scratch or has_batch_norm else 2e-4
    if scratch and role == "teacher" and not detector:
        rate /= 2
    rate *= (batch / 64) ** 0.5
    return round(rate if is_adaptive(optimizer) else rate * ADAPTIVE_SCALE, 6)


def is_adaptive(optimizer: str) -> bool:
    """Return True if an optimizer of timm scales its steps by the gradients."""
    return "sgd" not in optimizer and optimizer not in ("momentum", "nesterov", "nesterovw")


def choose_cache_views(epochs: int, bytes_per_view: int, most: int = CACHE_VIEWS) -> int:
    """Return the number of views whose teacher outputs are cached; 0 if they would be too large."""
    views = min(epochs, most)
    return views if views * bytes_per_view <= CACHE_BYTES else 0


def choose_warmup_epochs(epochs: int) -> float:
    """Return the epochs over which the learning rate rises."""
    return min(5.0, epochs / 10)


def compute_pad(image_size: int, resized: int) -> int:
    """Return the pixels of padding with which a crop can move by 1/8 of its size in each direction.

    An image ``resized`` to more than ``image_size`` needs less padding.
    """
    return max(0, round(image_size / 8 - (resized - image_size) / 2))


def _by_size(images: int, *steps: tuple[int, Any]) -> Any:
    return next(value for least, value in reversed(steps) if images >= least)
