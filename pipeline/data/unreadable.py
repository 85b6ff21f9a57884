"""Unreadable images: why an image cannot be read, skipping it, and stopping a run that has too many of them.

The reasons are shown in the report's table "Skipped files".
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from ...export.runtime import ImageError, decode_image
from ..errors import JobError
from .dataset import Image, Skipped

T = TypeVar("T")

MAX_UNREADABLE_FRACTION = 0.01
"""Fraction of all images that may be unreadable."""


def read_pixels(image: Image, form: Callable[[np.ndarray], T]) -> T | str:
    """Return ``form`` of an image's pixels (uint8 [H, W, 3]), or the reason why it is unreadable.

    Raises:
        JobError: the image has changed since the data set was opened.
    """
    try:
        content = image.read()
        if isinstance(content, np.ndarray):
            return form(content)
        if hashlib.sha256(content).hexdigest() != image.key:
            raise JobError(f"{image.name} was changed during the run. Start the run again.")
        return form(decode_image(content))
    except ImageError as error:
        return error.reason
    except OSError as error:
        return f"could not be read: {error.strerror or error}"


def require_pixels(image: Image, form: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return ``form`` of the pixels of an image that was readable before.

    Raises:
        JobError: it is unreadable now, or has changed.
    """
    pixels = read_pixels(image, form)
    if isinstance(pixels, str):
        raise JobError(f"{image.name} became unreadable during the run ({pixels}). Start the run again.")
    return pixels


def skip_unreadable(
    images: Sequence[Image], reasons: Mapping[int, str]
) -> tuple[tuple[Image, ...], tuple[Skipped, ...]]:
    """Separate the readable images from those that have a reason, given by position."""
    readable = tuple(image for position, image in enumerate(images) if position not in reasons)
    skipped = tuple(
        Skipped(images[position].name, reason, unreadable=True) for position, reason in reasons.items()
    )
    return readable, skipped


def check_unreadable(skipped: Sequence[Skipped], total: int) -> None:
    """Check that few images are unreadable.

    Args:
        skipped: everything that was skipped; only unreadable images count.
        total: number of images, readable or not.

    Raises:
        JobError: they exceed ``MAX_UNREADABLE_FRACTION``.
    """
    unreadable = sorted((entry for entry in skipped if entry.unreadable), key=lambda entry: entry.name)
    if len(unreadable) <= MAX_UNREADABLE_FRACTION * total:
        return
    first = "; ".join(f"{entry.name} ({entry.reason})" for entry in unreadable[:5])
    more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    raise JobError(
        f"{len(unreadable)} of {total} images are unreadable, more than {MAX_UNREADABLE_FRACTION:.0%}: "
        f"{first}{more}. Repair or remove them."
    )
