"""Images for timing: made up if none are given, and as other packages' users read them."""

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from questpress.export.runtime import decode_image
from questpress.pipeline.data.dataset import Image, ImageSet, hash_array
from torch.utils.data import Dataset

PHOTO = (375, 500)
"""Height and width of ImageNet's commonest photograph; with the grain below, its 100 kB of JPEG too."""

GRAIN = 9


def made_up(count: int, classes: int, side: int | None, seed: int = 0) -> ImageSet:
    """Return smooth colors with grain: arrays of ``side`` pixels, or JPEG photographs if ``side`` is None."""
    rng = np.random.default_rng(seed)
    images = []
    for index in range(count):
        pixels = _picture(rng, *((side, side) if side else PHOTO))
        label, name = index % classes, f"{index % classes}/{index}"
        if side:
            images.append(Image(name, label, hash_array(pixels), pixels))
        else:
            file = _jpeg(pixels)
            images.append(Image(name, label, hashlib.sha256(file).hexdigest(), file))
    names = tuple(f"class {label}" for label in range(classes))
    size = f"{side} × {side} pixels" if side else f"JPEG of {PHOTO[1]} × {PHOTO[0]} pixels"
    return ImageSet("made up", f"{count} made-up images, {size}", names, tuple(images), (), ())


def _picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    coarse = rng.integers(0, 256, (max(2, height // 25), max(2, width // 25), 3), dtype=np.uint8)
    smooth = PillowImage.fromarray(coarse).resize((width, height), PillowImage.Resampling.BICUBIC)
    grain = rng.normal(0, GRAIN, (height, width, 3))
    return (np.asarray(smooth) + grain).round().clip(0, 255).astype(np.uint8)


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


class Pictures(Dataset[tuple[Any, int]]):
    """Images as torchvision's ImageFolder and CIFAR give them: PIL images, transformed one by one.

    ``side``: decoded once and kept as arrays of this size, as CIFAR is; None: read and decoded each time. The
    images come ``repeat`` times over, so that no epoch ends while time is taken.
    """

    def __init__(self, images: Sequence[Image], side: int | None, repeat: int) -> None:
        self.images, self.repeat = images, repeat
        self.arrays = [_resized(image.read(), side) for image in images] if side else None
        self.transform: Callable[[PillowImage.Image], Any] | None = None
        # Other packages' loaders may set it.
        self.target_transform: Callable[[int], int] | None = None

    def __len__(self) -> int:
        return self.repeat * len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index %= len(self.images)
        if self.arrays is None:
            read = self.images[index].read()
            picture = (
                PillowImage.fromarray(read)
                if isinstance(read, np.ndarray)
                else PillowImage.open(io.BytesIO(read)).convert("RGB")
            )
        else:
            picture = PillowImage.fromarray(self.arrays[index])
        return picture if self.transform is None else self.transform(picture), self.images[index].label


def _resized(read: bytes | np.ndarray, side: int) -> np.ndarray:
    pixels = read if isinstance(read, np.ndarray) else decode_image(read)
    if pixels.shape[:2] == (side, side):
        return pixels
    return np.asarray(PillowImage.fromarray(pixels).resize((side, side), PillowImage.Resampling.BICUBIC))
