"""What is chosen where the user is silent: one table, used by the job, `--help` and the documentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SMALL_IMAGES = 64
"""Images whose median short side is at most this many pixels are small: shifted, not cropped and resized."""


ADAPTIVE_SCALE = 50.0
"""SGD's usual learning rates are so many times those of the adaptive optimizers (0.1 against 0.002)."""


CACHE_VIEWS = 30
"""Ten views of each image, met three times each, taught no worse than chance tells from new ones each epoch
(docs/benchmarks.md); most trainings by default have 20 to 60 epochs.
"""

CACHE_BYTES = 4 << 30
"""What a store may take without being asked for."""


@dataclass(frozen=True)
class Row:
    """Defaults of one option, for a network trained from scratch and for one that starts from weights."""

    option: str
    scratch: str
    pretrained: str


TABLE: tuple[Row, ...] = (
    Row("--epochs", "20; 60 from 2,000, 100 from 100,000 images", "20; 10 from 100,000 images"),
    Row("--teacher-epochs", "10; 60 from 2,000, 100 from 100,000 images", "10; 5 from 100,000 images"),
    Row("--batch-size", "32; 64 from 2,000, 128 from 20,000, 256 from 200,000 images", "the same"),
    Row("--optimizer", "adamw", "adamw"),
    Row(
        "--lr",
        "0.0028 at batch 64, in proportion to √batch; 50 times that with SGD",
        "0.0004 at batch 64, likewise",
    ),
    Row("--teacher-lr", "half of --lr's default", "half of --lr's default"),
    Row("--schedule", "cosine to zero", "the same"),
    Row("--warmup-epochs, --teacher-warmup-epochs", "a tenth of the epochs, at most 5", "the same"),
    Row("--weight-decay", "0.05", "0.05"),
    Row("--label-smoothing", "0", "0"),
    Row("--crop", "pad for small images (median short side up to 64), else resized", "the same"),
    Row("--crop-scale", "0.25 (resized)", "the same"),
    Row("--pad", "so much that a crop moves an eighth of its size (pad)", "the same"),
    Row("--pad-mode", "zeros", "zeros"),
    Row("--flip", "yes; no for digits", "the same"),
    Row("--color-jitter", "0", "0"),
    Row("--val-fraction", "0.1", "0.1"),
    Row("--image-size", "the student's own; 64 for digits", "the same"),
    Row(
        "--cache-views",
        "30, or the epochs where they are fewer, if their answers are likely to fit into 4 GiB; else, and "
        "with a recipe, 0",
        "the same",
    ),
    Row("--seed", "0", "0"),
)


def epochs(role: str, images: int, *, scratch: bool) -> int:
    """Epochs of the ``student`` or a ``teacher`` over so many training images."""
    if role == "teacher":
        return (
            _by_size(images, (0, 10), (2_000, 60), (100_000, 100))
            if scratch
            else _by_size(images, (0, 10), (100_000, 5))
        )
    return (
        _by_size(images, (0, 20), (2_000, 60), (100_000, 100))
        if scratch
        else _by_size(images, (0, 20), (100_000, 10))
    )


def batch_size(images: int) -> int:
    return _by_size(images, (0, 32), (2_000, 64), (20_000, 128), (200_000, 256))


def learning_rate(role: str, batch: int, *, scratch: bool, optimizer: str) -> float:
    """Peak learning rate; plain SGD wants ``ADAPTIVE_SCALE`` times that of the adaptive optimizers.

    A teacher, the larger network, learns at half the student's rate.
    """
    rate = (2.8e-3 if scratch else 4e-4) * (batch / 64) ** 0.5 * (0.5 if role == "teacher" else 1)
    return round(rate if adaptive(optimizer) else rate * ADAPTIVE_SCALE, 6)


def adaptive(optimizer: str) -> bool:
    """Whether an optimizer of timm's scales its steps to the gradients it sees."""
    return optimizer not in ("sgd", "momentum", "nesterov", "sgdp", "sgdw", "nesterovw")


def cache_views(epochs: int, bytes_per_view: int) -> int:
    """Views whose answers are stored; 0 where they would take too much room."""
    views = min(epochs, CACHE_VIEWS)
    return views if views * bytes_per_view <= CACHE_BYTES else 0


def warmup_epochs(epochs: int) -> float:
    return min(5.0, epochs / 10)


def small(median_short_side: int) -> bool:
    return median_short_side <= SMALL_IMAGES


def pad(image_size: int, resized: int) -> int:
    """Pixels of padding so that a crop moves an eighth of its size either way.

    The image is ``resized`` to the test transform's size before its crop, and what that has over the crop is
    room to move already.
    """
    return max(0, round(image_size / 8 - (resized - image_size) / 2))


def _by_size(images: int, *steps: tuple[int, Any]) -> Any:
    return next(value for least, value in reversed(steps) if images >= least)


def lines() -> Sequence[tuple[str, str, str]]:
    """The table as (option, from scratch, from weights)."""
    return [(row.option, row.scratch, row.pretrained) for row in TABLE]


def markdown() -> str:
    """The table as it stands in ``docs/defaults.md``."""
    rows = [f"| `{row.option}` | {row.scratch} | {row.pretrained} |" for row in TABLE]
    return "\n".join(["| option | from scratch | from weights |", "|---|---|---|", *rows]) + "\n"
