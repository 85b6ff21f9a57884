"""Resize, crop and normalize images: the parameters, the geometry, and the pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Tuple, Union

import numpy as np
from PIL import Image

SCHEMA_VERSION = 1
Pixels = np.ndarray
"""uint8 [H, W, 3], RGB."""
Size = Union[int, Tuple[int, int]]
"""Pixels: the side of a square, or height and width of another rectangle."""


def height_width(size: Size) -> tuple[int, int]:
    """Return height and width of a size."""
    return (size, size) if isinstance(size, int) else size


def make_size(height: int, width: int) -> Size:
    """Return the size of a rectangle; a number if it is a square."""
    return height if height == width else (height, width)


_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_CROP_MODES = ("center", "squash", "border")
_CROP_FRACTIONS = (1 / 16, 2.0)  # timm's are 0.875 to 1.15
_MAX_MEAN = 1e6  # larger means and 1/std overflow float32
MAX_SIDE = 1 << 13  # pixels of a network's input; one image takes 800 MB
_MAX_RESIZED_PIXELS = 1 << 25  # of a larger resized image only the part in the crop is computed


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input, in the terms of `timm.data.transforms_factory`.

    `size` is the input's in pixels and `resize` that before the crop, floor(size / crop_fraction).
    `crop_mode`: 'center' covers `resize` and crops, 'squash' ignores the aspect ratio, 'border' fits into
    `resize` and pads with the mean. `interpolation` is a filter of Pillow, antialiased. `mean` and `std` are
    for pixels in [0, 1].
    """

    size: Size
    resize: Size
    crop_fraction: float
    interpolation: str
    crop_mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    gray_bits: int
    """Number of bits that 16-bit gray images use, see `decode_image`."""

    @classmethod
    def create(
        cls,
        size: Size | Sequence[int],
        crop_fraction: float = 0.875,
        interpolation: str = "bicubic",
        crop_mode: str = "center",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        gray_bits: int = 16,
    ) -> Preprocessing:
        """Create the preprocessing of a timm `pretrained_cfg`; `resize` follows from `crop_fraction`.

        Raises ValueError, which names the argument, for values that no image can be preprocessed with.
        """
        sides = check_numbers("size", size if isinstance(size, Sequence) else (size, size), 2, 1, MAX_SIDE)
        [fraction] = check_numbers("crop_fraction", [crop_fraction], 1, *_CROP_FRACTIONS)
        for name, value, choices in (
            ("interpolation", interpolation, tuple(_FILTERS)),
            ("crop_mode", crop_mode, _CROP_MODES),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}")
        return cls(
            make_size(*sides),
            make_size(*(max(1, math.floor(side / fraction)) for side in sides)),
            float(fraction),
            interpolation,
            crop_mode,
            _triple(check_numbers("mean", mean, 3, -_MAX_MEAN, _MAX_MEAN)),
            _triple(check_numbers("std", std, 3, 1 / _MAX_MEAN, _MAX_MEAN)),
            *check_numbers("gray_bits", [gray_bits], 1, 8, 16),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the preprocessing as JSON."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {
            "version": SCHEMA_VERSION,
            "library": "Pillow",
            "antialias": True,
            "color": "RGB",
            **{key: value for key, value in values.items() if (key, value) != ("gray_bits", 16)},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Raise ValueError if `values` cannot come from this version of `to_dict`."""
        if not isinstance(values, Mapping):
            raise ValueError(f"preprocessing must be an object, got {type(values).__name__}")
        keys = ("size", "crop_fraction", "interpolation", "crop_mode", "mean", "std")
        arguments = {"gray_bits": 16, **dict.fromkeys(keys), **values}
        preprocessing = cls.create(**{key: arguments[key] for key in (*keys, "gray_bits")})
        for key, value in preprocessing.to_dict().items():
            stated = values.get(key)
            if stated != value or isinstance(stated, bool) != isinstance(value, bool):
                raise ValueError(f"preprocessing with {key} {stated!r:.80} is not supported")
        return preprocessing


def check_numbers(name: str, values: Any, count: int, low: float, high: float) -> Any:
    """Raise ValueError unless `values` are `count` numbers from `low` to `high`, whole if `low` is an int."""
    kind: Any = int if isinstance(low, int) else (int, float)
    if not (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high for v in values)
    ):
        noun = "whole number" if kind is int else "number"
        expected = f"a {noun}" if count == 1 else f"{count} {noun}s"
        value = values[0] if isinstance(values, list) and len(values) == count == 1 else values
        raise ValueError(f"{name} must be {expected} from {low:g} to {high:g}, got {value!r:.80}")
    return values


def _triple(values: Iterable[Any]) -> tuple[float, float, float]:
    r, g, b = (float(value) for value in values)
    return r, g, b


def render(image: Pixels, p: Preprocessing) -> Pixels:
    """Resize and crop an image to uint8 [*size, 3], as timm's evaluation transform with Pillow 9 to 12.

    Rows are resized before columns, unless that would require a large image in between.
    """
    height, width = image.shape[:2]
    size = height_width(p.size)
    new, (top, left) = place_crop(height, width, p)
    fill = tuple(round(255 * value) for value in p.mean) if p.crop_mode == "border" else (0, 0, 0)
    picture = Image.fromarray(np.ascontiguousarray(image))
    resample = _FILTERS[p.interpolation]
    if new[0] * new[1] > _MAX_RESIZED_PIXELS:
        scale_y, scale_x = height / new[0], width / new[1]
        bottom, right = min(new[0], top + size[0]), min(new[1], left + size[1])
        top, left = max(0, top), max(0, left)
        box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
        picture = picture.resize((right - left, bottom - top), resample, box=box)
        top, left = (
            -((crop - side) // 2) if side < crop else 0
            for side, crop in zip((picture.height, picture.width), size)
        )
    else:  # one side at a time: Pillow 13 chooses another order for tall images than earlier versions
        is_small = height * new[1] <= _MAX_RESIZED_PIXELS
        first = (new[1], height) if is_small else (width, new[0])
        picture = picture.resize(first, resample).resize((new[1], new[0]), resample)
    canvas = Image.new("RGB", (size[1], size[0]), fill)
    canvas.paste(picture, (-left, -top))
    return np.array(canvas, dtype=np.uint8)


def place_crop(height: int, width: int, p: Preprocessing) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return an image's height and width after resizing, and the crop's top and left, negative in padding."""
    new = resized_size(height, width, p)
    top, left = (
        round((side - crop) / 2) if side >= crop else -((crop - side) // 2)
        for side, crop in zip(new, height_width(p.size))
    )
    return new, (top, left)


def to_original(boxes: np.ndarray, height: int, width: int, p: Preprocessing) -> np.ndarray:
    """Convert boxes from fractions of the rendered image to pixels of the image itself, clipped to it.

    `boxes` are x1, y1, x2, y2, [n, 4]; `height` and `width` are those of the image. Returns float64 [n, 4].
    """
    (tall, wide), (top, left) = place_crop(height, width, p)
    canvas_height, canvas_width = height_width(p.size)
    corners = boxes.reshape(-1, 2, 2).astype(np.float64) * (canvas_width, canvas_height) + (left, top)
    return (corners * (width / wide, height / tall)).clip(0, (width, height)).reshape(-1, 4)


def resized_size(height: int, width: int, p: Preprocessing) -> tuple[int, int]:
    """Return height and width of an image after resizing and before the crop."""
    tall, wide = height_width(p.resize)
    if p.crop_mode == "squash":
        return tall, wide
    if p.crop_mode == "border":
        ratio = max(height / tall, width / wide)
    elif tall != wide:
        ratio = min(height / tall, width / wide)
    elif width <= height:
        return int(tall * height / width), wide
    else:
        return tall, int(wide * width / height)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def needed_size(height: int, width: int, p: Preprocessing) -> tuple[int, int]:
    """Return the height and width at which an image may be decoded: twice those after resizing."""
    tall, wide = resized_size(height, width, p)
    return 2 * tall, 2 * wide


def normalize(pixels: np.ndarray, p: Preprocessing) -> np.ndarray:
    """Convert uint8 [B, H, W, 3] to float32 [B, 3, H, W]: (pixels / 255 - mean) / std."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    batch = np.empty((len(pixels), 3, *pixels.shape[1:3]), dtype=np.float32)
    for channel in range(3):
        table = (levels - np.float32(p.mean[channel])) / np.float32(p.std[channel])
        batch[:, channel] = table[pixels[..., channel]]
    return batch
