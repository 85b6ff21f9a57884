"""Decode images, preprocess them, and classify them or detect objects in them with an exported model.

This file requires only numpy, Pillow and onnxruntime, and runs on Python 3.8. It is also the first part of
`predict.py`, which ships with every artifact:

    classifier = Classifier.load("runs/shop")
    classifier.predict(["photo.jpg"])[0].label

    detector = Detector.load("runs/cells")
    detector.detect(["photo.jpg"])[0][0].box

Training and validation use the same functions, so that reported accuracies are those of the device.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import platform
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, NamedTuple, Tuple, Union

if TYPE_CHECKING:
    from typing import Self

# ONNX Runtime 1.31 and later sends telemetry and keeps a device id in the user's cache, unless this is set
# before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageCms

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26  # 21,000 classes take a third of a million
MAX_FILE_BYTES = (1 << 31) - 1  # the limit of protobuf, and so of an ONNX file
MAX_THREADS = 1024
MAX_PIXELS = 89_478_485  # of an image file; the limit from which Pillow warns
METADATA_PREFIX = "questpress."
MULTI_LABEL = "multi-label"
DETECTION = "detection"
UINT8 = "uint8"

Pixels = np.ndarray
"""uint8 [H, W, 3], RGB."""

Size = Union[int, Tuple[int, int]]
"""Pixels: the side of a square, or height and width of another rectangle."""
NeededSize = Callable[[int, int], Tuple[int, int]]
"""Returns height and width in pixels that suffice of an image of (height, width)."""

ImageSource = Union[str, Path, bytes, Image.Image, np.ndarray]
"""Path of an image file, its content, a PIL image, or decoded pixels: uint8 [H, W, 3], RGB."""


def height_width(size: Size) -> tuple[int, int]:
    """Return height and width of a size."""
    return (size, size) if isinstance(size, int) else size


def make_size(height: int, width: int) -> Size:
    """Return the size of a rectangle; a number if it is a square."""
    return height if height == width else (height, width)


class ImageError(Exception):
    """An image that cannot be read: the message contains its `name`, `reason` does not."""

    exit_code = 1

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"cannot read {name}: {reason}" if name else reason)
        self.reason = reason


class ArtifactError(Exception):
    """A model file or artifact folder that is missing, damaged or of another kind."""

    exit_code = 1


# ---------------------------------------------------------------------------------------------------------
# Decoding

# Raster formats that Pillow decodes itself. EPS and WMF are excluded because they run other programs.
_FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF", "HEIF", "JXL"),
    *("ICO", "DIB", "PCX", "SGI", "QOI", "PSD", "DDS", "ICNS", "TGA"),
)
# Packages that add formats to Pillow, used if they are installed.
_PLUGINS = ("pillow_heif", "pi_heif", "pillow_avif", "pillow_jxl")
_JPEG_FORMATS = ("JPEG", "MPO")
_MAX_MISSING = 0.05  # fraction of a JPEG's pixels that may be missing at its end
_MISSING_PIXELS = 18 * 18  # a block of 16 × 16 pixels and the pixels that are interpolated with it
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@lru_cache(maxsize=None)
def readable_formats() -> dict[str, str]:
    """Return the suffixes of the image files that are read, such as `.jpg`, with the names of formats."""
    Image.init()
    for name in _PLUGINS:
        with suppress(ImportError):  # also if it is of another version of Pillow
            plugin = importlib.import_module(name)
            getattr(plugin, "register_heif_opener", lambda: None)()  # the others register themselves
    formats = {name for name in _FORMATS if name in Image.OPEN}
    return {suffix: name for suffix, name in Image.registered_extensions().items() if name in formats}


def decode_image(
    source: str | Path | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    gray_bits: int = 16,
    needed: NeededSize | None = None,
) -> Pixels:
    """Decode an image file, or the bytes of one, as a viewer shows it: uint8 [H, W, 3], RGB.

    EXIF orientation is applied, transparency is composited on white, 16-bit and float images are scaled to 8
    bits, and the first frame of an animation is used. `gray_bits` is the number of bits that 16-bit gray
    images use. A JPEG may lack its last bytes. It is decoded at 1/2, 1/4 or 1/8 of its size if that has the
    `needed` pixels, or if it has more than `max_pixels` pixels, at most twice as many. Raises ImageError for
    any other image that is incomplete or larger, which is checked before decoding.
    """
    if isinstance(source, bytes):
        if not source:
            raise ImageError("it is empty", "an image given as bytes")
        return _decode(BytesIO(source), "an image given as bytes", max_pixels, gray_bits, needed)
    path = Path(source)
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    try:
        if path.exists() and not path.is_file():
            raise ImageError("it is not a file", name)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ImageError("the file is empty", name)
            return _decode(file, name, max_pixels, gray_bits, needed)
    except (OSError, ValueError) as error:
        raise ImageError(getattr(error, "strerror", None) or str(error), name) from error


def convert_image(image: Image.Image, *, gray_bits: int = 16) -> Pixels:
    """Return the pixels of a PIL image as `decode_image` does. Raises ImageError if it cannot be loaded."""
    try:
        with suppress_pillow_warnings():
            return _to_rgb(_rotate_upright(image), gray_bits)
    except Exception as error:  # see `_decode`
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(reason, "a PIL image") from error


def check_source(image: Any) -> ImageSource:
    """Return an image as it is. Raises TypeError or ValueError unless it is an `ImageSource`."""
    expected = "an image must be a path, the bytes of a file, a PIL image or a uint8 array [H, W, 3]"
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"{expected}, got an array of {image.dtype} {list(image.shape)}")
    elif isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"{expected}, got a PIL image of {image.width} × {image.height} pixels")
    elif not isinstance(image, (str, Path, bytes)):
        raise TypeError(f"{expected}, got {type(image).__name__}")
    return image


def list_images(images: ImageSource | Iterable[ImageSource]) -> Iterable[ImageSource]:
    """Return one image as a list, several as they are; an array of four dimensions has several."""
    is_one = isinstance(images, (str, Path, bytes, Image.Image)) or not isinstance(images, Iterable)
    if is_one or (isinstance(images, np.ndarray) and (images.ndim != 4 or images.size == 0)):
        return [check_source(images)]
    return images  # type: ignore[return-value]


def _open(file: BinaryIO | str | Path) -> Image.Image:
    formats = set(readable_formats().values())
    return Image.open(file, formats=[f for f in _FORMATS if f in formats])


def _decode(
    file: BinaryIO,
    name: str,
    max_pixels: int,
    gray_bits: int = 16,
    needed: NeededSize | None = None,
    *,
    repair: bool = True,
) -> Pixels:
    try:
        with suppress_pillow_warnings(), _open(file) as image:
            _shrink_jpeg(image, max_pixels, needed)
            _check_size(name, image, max_pixels)
            _check_tiles(name, image)
            try:
                image.load()
            except OSError as error:
                if not repair or image.format not in _JPEG_FORMATS or "truncated" not in str(error):
                    raise
                file.seek(0)
                return _decode_truncated_jpeg(file.read(), name, max_pixels)
            _check_size(name, image, max_pixels)  # the header of an icon may differ from its image
            return _to_rgb(_rotate_upright(image), gray_bits)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError("not an image, or in an unsupported format", name) from error
    except MemoryError as error:
        raise ImageError("not enough memory", name) from error
    except Exception as error:  # damaged files make Pillow's decoders raise exceptions of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(reason, name) from error


def _shrink_jpeg(image: Image.Image, max_pixels: int, needed: NeededSize | None) -> None:
    """Let a JPEG of at most twice `max_pixels` pixels be decoded at a half, quarter or eighth of its size."""
    width, height = image.size
    if image.format not in _JPEG_FORMATS or width * height > 2 * max_pixels:
        return
    tall, wide = (height, width) if width * height <= max_pixels else (height // 2, width // 2)
    if needed is not None:
        least = _upright(needed(*_upright((height, width), image)), image)
        tall, wide = min(tall, max(1, least[0])), min(wide, max(1, least[1]))
    image.draft(None, (wide, tall))


def _original_size(source: ImageSource, pixels: Pixels) -> tuple[int, int]:
    """Return height and width of an image, which may have been decoded to fewer `pixels`."""
    if isinstance(source, (str, Path, bytes)):
        file = BytesIO(source) if isinstance(source, bytes) else source
        with suppress_pillow_warnings(), _open(file) as image:
            if image.format in _JPEG_FORMATS:
                return _upright((image.height, image.width), image)
    return pixels.shape[0], pixels.shape[1]


def _upright(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    """Return a size with its sides exchanged if the image is stored on its side, or back."""
    return size[::-1] if _orientation(image) in (5, 6, 7, 8) else size


def _decode_truncated_jpeg(content: bytes, name: str, max_pixels: int) -> Pixels:
    """Decode a JPEG that lacks its last bytes; the missing pixels continue the last ones.

    Pixels that depend on what replaces the missing bytes are those that are missing.
    """
    content, end = content.rstrip(b"\xff"), b"\xff\xd9"
    pixels = _decode(BytesIO(content + end), name, max_pixels, repair=False)
    total = pixels.shape[0] * pixels.shape[1]
    filler = b"\x5a" * (1024 + total // 4)
    other = _decode(BytesIO(content + filler + end), name, max_pixels, repair=False)
    missing = int((pixels != other).any(axis=2).sum())
    if missing > max(_MAX_MISSING * total, _MISSING_PIXELS):
        raise ImageError(f"the file is truncated, about {missing / total:.0%} of the image is missing", name)
    return pixels


def _check_size(name: str, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width}×{height} pixels exceed the limit of {max_pixels}", name)


def _check_tiles(name: str, image: Image.Image) -> None:
    """Refuse a TIFF whose tiles do not cover it: Pillow would fill the rest with black."""
    tiles = getattr(image, "tile", None)
    if image.format != "TIFF" or not tiles:
        return
    covered = sum((right - left) * (lower - upper) for _, (left, upper, right, lower), *_ in tiles)
    if covered < image.width * image.height:
        raise ImageError("parts of the image are missing", name)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block; the pixels are intact
        return 1


def _rotate_upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image, gray_bits: int) -> Pixels:
    if image.mode == "F" or image.mode.startswith("I"):
        gray, opaque = _to_eight_bits(image, gray_bits)
        return np.repeat(np.where(opaque, gray, np.uint8(255))[:, :, None], 3, axis=2)
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    if _has_transparency(image):
        key = image.info.get("transparency")
        if isinstance(key, tuple) and max(key) > 255:  # a 16-bit color key; Pillow reads pixels as 8 bits
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in key)
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _has_transparency(image: Image.Image) -> bool:
    """Return `Image.has_transparency_data`, which Pillow lacks before 10.1."""
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return (
        image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
        or palette.endswith("A")
        or "transparency" in image.info
    )


def _to_eight_bits(image: Image.Image, gray_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a gray image of more than 8 bits as uint8 [H, W], and where it is opaque (bool [H, W]).

    A known bit depth is scaled by that depth, whatever the content: 16 bits by dropping the low byte, as
    Pillow does for 16-bit RGB, or fewer of the low bits if images use only `gray_bits`. Float and 32-bit
    images have no known depth; the smallest usual range that contains their values is used.
    """
    values = np.asarray(image)
    key = image.info.get("transparency")
    opaque = values != key if isinstance(key, int) else np.ones(values.shape, dtype=bool)
    tags = getattr(image, "tag_v2", {})
    bits = _first(tags.get(258), 16) if tags else 16
    if bits <= 16:
        bits = min(bits, gray_bits)
    if bits == 32 and image.mode == "I" and _first(tags.get(339), 1) == 1:
        values = values.view(np.uint32)  # unsigned samples of TIFF, which Pillow reads as signed
    gray = np.empty(values.shape, dtype=np.uint8)
    blocks = _row_blocks(values)
    if image.mode != "F" and bits <= 16:
        for rows in blocks:
            gray[rows] = (values[rows].astype(np.int64) >> (bits - 8)).clip(0, 255)
    else:
        ends = [(finite.min(), finite.max()) for rows in blocks if (finite := _finite(values[rows])).size]
        low, high = float(min(low for low, _ in ends)), float(max(high for _, high in ends))
        bounds = (255, (1 << gray_bits) - 1, 65535)
        usual = [bound for bound in ((1, *bounds) if image.mode == "F" else bounds) if high <= bound]
        if low < 0 or not usual:
            span = (high - low) or 1.0
        else:
            low, span = 0.0, float(usual[0])
        for rows in blocks:
            gray[rows] = np.round((_finite(values[rows]) - low) * (255 / span))
    if tags and _first(tags.get(262), 1) == 0:  # WhiteIsZero of TIFF, which Pillow inverts for 8 bits only
        gray = 255 - gray
    return gray, opaque


def _row_blocks(values: np.ndarray) -> list[slice]:
    """Cut an array into rows of about a million values, to bound the size of wider copies."""
    height, width = values.shape
    rows = max(1, (1 << 20) // max(1, width))
    return [slice(start, start + rows) for start in range(0, height, rows)]


def _finite(values: np.ndarray) -> np.ndarray:
    """Convert to float64, with NaN as 0 and infinities as the largest float32."""
    end = float(np.finfo(np.float32).max)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=end, neginf=-end)


def _first(value: Any, default: int) -> int:
    if isinstance(value, tuple):
        value = value[0] if value else None
    return default if value is None else int(value)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    if converted is None:
        raise ValueError("its LAB colors cannot be converted")
    return converted


_warnings_lock = threading.Lock()
_warnings_depth = 0
_warnings_saved: warnings.catch_warnings | None = None


@contextmanager
def suppress_pillow_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings in all threads; `warnings.catch_warnings` alone is not thread-safe."""
    global _warnings_depth, _warnings_saved
    with _warnings_lock:
        if _warnings_depth == 0:
            _warnings_saved = warnings.catch_warnings()
            _warnings_saved.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\b")
        _warnings_depth += 1
    try:
        yield
    finally:
        with _warnings_lock:
            _warnings_depth -= 1
            if _warnings_depth == 0 and _warnings_saved is not None:
                _warnings_saved.__exit__(None, None, None)
                _warnings_saved = None


# ---------------------------------------------------------------------------------------------------------
# Preprocessing

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
_MAX_RESIZED_PIXELS = 1 << 25  # a larger resized image is computed only where the crop is


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
        sides = _check_numbers("size", size if isinstance(size, Sequence) else (size, size), 2, 1, MAX_SIDE)
        [fraction] = _check_numbers("crop_fraction", [crop_fraction], 1, *_CROP_FRACTIONS)
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
            _triple(_check_numbers("mean", mean, 3, -_MAX_MEAN, _MAX_MEAN)),
            _triple(_check_numbers("std", std, 3, 1 / _MAX_MEAN, _MAX_MEAN)),
            *_check_numbers("gray_bits", [gray_bits], 1, 8, 16),
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


def _check_numbers(name: str, values: Any, count: int, low: float, high: float) -> Any:
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
    """Resize and crop an image to uint8 [*size, 3], pixel for pixel as timm's evaluation transform."""
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
    elif new != (height, width):
        picture = picture.resize((new[1], new[0]), resample)
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


# ---------------------------------------------------------------------------------------------------------
# The processor


def allowed_cores() -> int:
    """Return the number of cores in this process's affinity, or its cgroup's CPU quota if that is less."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # Windows, macOS
        cores = os.cpu_count() or 1
    return max(1, int(min(cores, _cgroup_quota())))


def _cgroup_quota(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the CPUs granted by the tightest cgroup, at least 1; inf without a limit or outside Linux."""
    quotas = (_read_quota(folder, is_v1) for folder, is_v1 in cgroup_folders(proc, root))
    return max(1.0, min(quotas, default=math.inf))


def cgroup_folders(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the cgroups that limit this process's CPU time, and True for cgroups v1."""
    try:
        lines = proc.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / controllers if controllers else root
        # In a container the path may be that of the host while only the root is mounted.
        inner = mount / group.lstrip("/")
        for folder in (inner, *inner.parents):
            yield folder, bool(controllers)
            if folder == mount:
                break


def _read_quota(folder: Path, is_v1: bool) -> float:
    try:
        if is_v1:
            granted, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            granted, period = (folder / "cpu.max").read_text().split()
        unlimited = granted == "max" or int(granted) <= 0
        return math.inf if unlimited else int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


THREADS: int | None = None
"""Default number of a session's threads; None for min(allowed cores, 4)."""


def default_threads() -> int:
    """Return `THREADS` or min(allowed cores, 4): more threads seldom help a small network."""
    return THREADS or min(allowed_cores(), 4)


_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def int8_flags() -> tuple[str, ...]:
    """Return the processor's instruction sets that matter for int8, in Linux's names; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ()
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), [])
    return tuple(flag for flag in _FLAGS if flag in flags)


def detect_target() -> str:
    """Return the int8 target for this processor: 'arm64', 'x86-vnni' or 'x86'.

    'x86' is correct on every x86 processor, and is returned if the instruction sets are unknown.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "arm64"
    return "x86" if {"avx512_vnni", "avx_vnni"}.isdisjoint(int8_flags()) else "x86-vnni"


def runnable_targets() -> tuple[str | None, ...]:
    """Return the targets whose files this processor computes exactly, the best one first."""
    target = detect_target()
    return (target, "x86", None) if target == "x86-vnni" else (target, None)


# ---------------------------------------------------------------------------------------------------------
# Running a model

CPU = "CPUExecutionProvider"


def open_session(
    model: str | Path | bytes,
    threads: int,
    *,
    fuse: bool = True,
    optimized: str | Path | None = None,
    name: str = "a model given as bytes",
    providers: str | Sequence[str] = CPU,
) -> ort.InferenceSession:
    """Open a model file with the options used everywhere: for validation, the bench and on the device.

    Without `fuse`, an int8 model computes in float between quantizing and dequantizing, without the
    processor's integer kernels. `optimized` is a file to write the optimized graph to, `name` that of a model
    given as bytes in errors. `providers` are names of onnxruntime's execution providers in order of
    preference; the CPU runs what they do not support. Raises ArtifactError if onnxruntime cannot load the
    model, or lacks a provider.
    """
    providers, available = [providers] if isinstance(providers, str) else list(providers), _providers()
    for provider in providers:
        if provider not in available:
            raise ArtifactError(
                f"onnxruntime has no provider {provider!r}. Available: {', '.join(available)}"
            )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fuse else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4  # less severe records contain names from the file
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    # Threads spin within a run, where microseconds count, and stop between runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Otherwise bytes that resemble ONNX Runtime's own format are read by another parser.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    name = name if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=providers,
            # It pads with zeros before a max-pool that would ignore padding: BiT's outputs are 3 % off.
            disabled_optimizers=["Pad_Fusion"],
        )
    except Exception as error:  # onnxruntime's exceptions have no common public class
        reason = " ".join(str(error).split())
        raise ArtifactError(f"onnxruntime cannot load {name}: {reason}") from error
    for provider in providers:  # without its libraries or device, onnxruntime continues without it
        if provider not in session.get_providers():
            raise ArtifactError(f"onnxruntime cannot start {provider}. Check its driver and libraries")
    return session


def _providers() -> list[str]:
    """Return the names of the execution providers of the installed onnxruntime."""
    names: list[str] = ort.get_available_providers()
    return names


# The parts of ONNX's messages that lead to tensors, as {field number: message}
# (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
_TENSOR_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_FIELDS = (13, 14)  # a tensor's external_data and data_location
_VARINT, _EIGHT_BYTES, _LENGTH_DELIMITED, _FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types
_MAX_FIELDS = 10_000_000  # a network of a thousand nodes has about thirty thousand


def refuse_external_data(model: bytes, name: str) -> None:
    """Raise ArtifactError if a model reads weights from other files, or is not an ONNX model.

    An artifact's model is one file, and its author must not choose which files of this machine are read. Only
    the frames of protobuf messages are parsed, before any runtime sees the model.
    """
    content = memoryview(model)
    pending, fields = [("model", 0, len(content))], 0
    try:
        while pending:
            message, position, end = pending.pop()
            children = _TENSOR_FIELDS.get(message, {})
            while position < end:
                key, position = _read_varint(content, position)
                number, wire_type = key >> 3, key & 7
                fields += 1
                if fields > _MAX_FIELDS:
                    raise ValueError(f"more than {_MAX_FIELDS:,} fields")
                value = size = 0
                if wire_type == _VARINT:
                    value, position = _read_varint(content, position)
                elif wire_type == _LENGTH_DELIMITED:
                    size, position = _read_varint(content, position)
                elif wire_type in (_EIGHT_BYTES, _FOUR_BYTES):
                    size = 8 if wire_type == _EIGHT_BYTES else 4
                else:
                    raise ValueError(f"a field of wire type {wire_type}")
                if position + size > end:
                    raise ValueError("a field exceeds its message")
                is_set = value or wire_type == _LENGTH_DELIMITED
                if message == "tensor" and number in _EXTERNAL_FIELDS and is_set:
                    raise ArtifactError(f"{name} stores weights in another file, which is not allowed")
                if wire_type == _LENGTH_DELIMITED and number in children:
                    pending.append((children[number], position, position + size))
                position += size
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{name} is not a valid ONNX file: {error}") from error


def _read_varint(content: memoryview, position: int) -> tuple[int, int]:
    """Return protobuf's variable-length integer at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


class Model:
    """A model file with its preprocessing and labels: a `Classifier` or a `Detector`."""

    thresholds: np.ndarray | None = None
    """For a multi-label classifier: the smallest probability at which each label is predicted, [labels]."""
    decoder: Decoder | None = None
    """For a detector."""

    def __init__(
        self,
        model: bytes | ort.InferenceSession,
        name: str,
        *,
        threads: int | None = None,
        providers: str | Sequence[str] = CPU,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Open the content of an ONNX file; `load` reads it from a folder or file.

        `preprocessing` and `labels` are by default those of the model's metadata. Raises ArtifactError if the
        model does not take images, or if the metadata is required and missing.
        """
        self.name = name
        self.threads = check_threads(threads)
        if isinstance(model, bytes):
            model = _open_checked(model, name, self.threads, providers)
        self.session = model
        self._complete = bool(preprocessing and labels)
        """True if the metadata of the file is not required."""
        self._own = _read_metadata(self.session, name, required=not self._complete)
        self.preprocessing: Preprocessing = preprocessing or self._own.preprocessing  # type: ignore[union-attr]
        self.labels: tuple[str, ...] = tuple(labels or self._own.labels)  # type: ignore[union-attr]
        inputs = self.session.get_inputs()
        if (
            len(inputs) != 1
            or not self.session.get_outputs()
            or inputs[0].type not in ("tensor(uint8)", "tensor(float)")
        ):
            types = ", ".join(entry.type for entry in inputs) or "no input"
            raise ArtifactError(f"{name} is not an image model: it takes {types}")
        self._input = inputs[0].name
        batch = inputs[0].shape[0] if inputs[0].shape else None
        self._batch: int | None = batch if isinstance(batch, int) and batch > 0 else None
        self.takes_pixels: bool = inputs[0].type == "tensor(uint8)"

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        file: str | None = None,
        threads: int | None = None,
        precision: str = "int8",
        providers: str | Sequence[str] = CPU,
    ) -> Self:
        """Load a model as `open_model` does. Raises ArtifactError, also if it is of the other class."""
        model = open_model(path, file=file, threads=threads, precision=precision, providers=providers)
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise ArtifactError(f"{model.name} is a {kind.lower()}, use {kind}")
        return model

    def decode(self, image: ImageSource) -> Pixels:
        """Decode an image as this model requires it. Raises ImageError, and as `check_source`."""
        p, image = self.preprocessing, check_source(image)
        if isinstance(image, np.ndarray):
            return image
        if isinstance(image, Image.Image):
            return convert_image(image, gray_bits=p.gray_bits)
        return decode_image(image, gray_bits=p.gray_bits, needed=partial(needed_size, p=p))

    def to_input(self, pixels: np.ndarray) -> np.ndarray:
        """Convert rendered images, uint8 [B, H, W, 3], to the model's input: normalize unless it does."""
        return pixels if self.takes_pixels else normalize(pixels, self.preprocessing)

    def infer(self, batch: np.ndarray) -> np.ndarray:
        """Run the model on the result of `to_input`: `Classifier.logits` or `Detector.detections`."""
        raise NotImplementedError

    def predict_logits(self, pixels: np.ndarray) -> np.ndarray:
        """Convert rendered images, uint8 [B, H, W, 3], to what `infer` returns.

        Raises ArtifactError if the largest logit of an image is not finite.
        """
        logits = self.infer(self.to_input(pixels))
        if not np.isfinite(logits.max(axis=-1)).all():
            raise ArtifactError(f"{self.name} returns logits that are not finite")
        return logits

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Convert the logits that `infer` returns to probabilities; those of detections are some already."""
        return outputs

    def run(self, batch: np.ndarray, names: list[str] | None = None) -> list[np.ndarray]:
        """Return the model's outputs of these names, by default all, for at least one image of `to_input`.

        A model of a fixed batch size is run several times.
        """
        if self.takes_pixels and batch.dtype != np.uint8:
            raise ValueError(f"{self.name} takes pixels, uint8 [B, H, W, 3], got {batch.dtype}")
        batch = np.ascontiguousarray(batch, dtype=np.uint8 if self.takes_pixels else np.float32)
        size = self._batch or len(batch)
        chunks = [batch[start : start + size] for start in range(0, len(batch), size)]
        try:
            outputs = [self.session.run(names, {self._input: chunk}) for chunk in chunks]
        except Exception as error:  # onnxruntime's exceptions have no common public class
            reason = " ".join(str(error).split())
            raise ArtifactError(f"onnxruntime cannot run {self.name}: {reason}") from error
        return outputs[0] if len(outputs) == 1 else [np.concatenate(parts) for parts in zip(*outputs)]

    def _render(
        self, images: ImageSource | Iterable[ImageSource], batch_size: int
    ) -> Iterator[tuple[list[ImageSource], list[Pixels], np.ndarray]]:
        """Yield up to `batch_size` images at a time, their decoded pixels, and what is rendered of them."""
        remaining = iter(list_images(images))
        while chunk := list(islice(remaining, batch_size)):
            decoded = [self.decode(image) for image in chunk]
            yield chunk, decoded, np.stack([render(image, self.preprocessing) for image in decoded])


def open_model(
    path: str | Path,
    *,
    file: str | None = None,
    threads: int | None = None,
    precision: str = "int8",
    providers: str | Sequence[str] = CPU,
) -> Classifier | Detector:
    """Load a model from a run folder, an artifact folder, or an .onnx file.

    In a folder, `file` is the name of the model file, by default the first of `precision` ('int8' or 'fp32')
    for this processor; its size and checksum are verified. `providers` are those of `open_session`. Raises
    ArtifactError.
    """
    path, count = Path(path), check_threads(threads)
    if path.is_file():
        return open_content(_read_file(path), path.name, threads=count, providers=providers)
    folder, manifest = read_manifest(path)
    entry = _choose_file(manifest["files"], folder, file, precision)
    content = read_verified(folder, entry)
    return open_content(content, entry["name"], threads=count, manifest=manifest, providers=providers)


def open_content(
    content: bytes,
    name: str,
    *,
    threads: int | None = None,
    manifest: Mapping[str, Any] | None = None,
    providers: str | Sequence[str] = CPU,
) -> Classifier | Detector:
    """Open the content of an ONNX file by its manifest, or its questpress metadata. Raises ArtifactError."""
    count = check_threads(threads)
    if manifest is None:
        session = _open_checked(content, name, count, providers)
        own = _read_metadata(session, name, required=True)
        is_detector = own is not None and own.decoder is not None
        return (Detector if is_detector else Classifier)(session, name, threads=count)
    about = Description.from_dict(manifest)
    shared: dict[str, Any] = {
        "threads": count,
        "providers": providers,
        "preprocessing": about.preprocessing,
        "labels": about.labels,
    }
    if about.decoder is not None:
        return Detector(content, name, **shared, decoder=about.decoder)
    return Classifier(content, name, **shared, thresholds=about.thresholds)


def check_threads(threads: int | None) -> int:
    """Return a number of threads, `default_threads` for None. Raises ValueError unless it is valid."""
    count = default_threads() if threads is None else threads
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"threads must be 1 to {MAX_THREADS}, got {threads}")
    return count


def _open_checked(
    model: bytes, name: str, threads: int, providers: str | Sequence[str]
) -> ort.InferenceSession:
    refuse_external_data(model, name)
    return open_session(model, threads, name=name, providers=providers)


@dataclass(frozen=True)
class Prediction:
    """The result for one image: the most likely label, its probability, and the `top` most likely labels.

    `labels` are the predicted labels with their probabilities: the most likely one. For a multi-label model,
    they are those whose probability reaches their threshold, the most likely first; there may be none.
    """

    label: str
    probability: float
    top: list[tuple[str, float]]
    labels: list[tuple[str, float]]


class Classifier(Model):
    """A model that maps images to labels and probabilities."""

    def __init__(
        self,
        model: bytes | ort.InferenceSession,
        name: str,
        *,
        threads: int | None = None,
        providers: str | Sequence[str] = CPU,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        """Open a model as `Model` does; `thresholds`, one per label, make it a multi-label model.

        Raises ArtifactError, also if it is not an image classifier.
        """
        super().__init__(
            model, name, threads=threads, providers=providers, preprocessing=preprocessing, labels=labels
        )
        if self._own is not None:
            if self._own.decoder is not None:
                raise ArtifactError(f"{name} is a detector, use Detector")
            if not self._complete and thresholds is None:
                thresholds = self._own.thresholds
        outputs = self.session.get_outputs()
        classes = outputs[0].shape[-1] if outputs[0].shape else None
        if isinstance(classes, int) and classes != len(self.labels):
            raise ArtifactError(f"{name} has {classes} outputs but {len(self.labels)} labels")
        self.thresholds = None if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        if self.thresholds is not None and self.thresholds.shape != (len(self.labels),):
            raise ArtifactError(f"{name} has {self.thresholds.size} thresholds but {len(self.labels)} labels")

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """Run the model on the result of `to_input`; return float32 [B, classes].

        Raises ValueError if `batch` is of the wrong type, ArtifactError if onnxruntime fails or the output
        has another shape.
        """
        if len(batch) == 0:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        logits = self.run(batch)[0]
        shape, expected = getattr(logits, "shape", None), (len(batch), len(self.labels))
        if shape != expected:
            raise ArtifactError(f"{self.name} must return logits of shape {expected}, got {shape}")
        if logits.dtype.kind not in "fiu":
            raise ArtifactError(f"{self.name} must return numbers, got {logits.dtype}")
        return logits

    infer = logits

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return float64 [B, classes]: softmax, or for a multi-label model sigmoid."""
        return softmax(logits) if self.thresholds is None else sigmoid(logits)

    def predict(
        self, images: ImageSource | Iterable[ImageSource], top: int = 5, *, batch_size: int = 16
    ) -> list[Prediction]:
        """Classify one or several images; see `ImageSource`. One image gives a list of one prediction.

        Raises ImageError if an image cannot be read, TypeError or ValueError for anything but images.
        """
        predictions = []
        for *_, pixels in self._render(images, batch_size):
            for row in self.probabilities(self.predict_logits(pixels)):
                order = np.argsort(-row, kind="stable")
                best = [(self.labels[index], float(row[index])) for index in order[: max(1, top)]]
                chosen = order[:1] if self.thresholds is None else order[(row >= self.thresholds)[order]]
                labels = [(self.labels[index], float(row[index])) for index in chosen]
                predictions.append(Prediction(*best[0], top=best, labels=labels))
        return predictions


@dataclass(frozen=True)
class AnchorLevel:
    """The anchors of one feature map: `cells` at every position of `grid`, in pixels of the input.

    Anchors are in the order of rows, columns, cells: `cells[k]` + stride · (column, row, column, row).
    """

    grid: tuple[int, int]
    """Rows and columns."""
    stride: tuple[float, float]
    """Pixels between columns, and between rows."""
    cells: tuple[tuple[float, float, float, float], ...]
    """x1, y1, x2, y2 at row 0, column 0."""

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1] * len(self.cells)

    def boxes(self) -> np.ndarray:
        """Return the anchors, float32 [count, 4]: x1, y1, x2, y2."""
        row, column = np.indices(self.grid, dtype=np.float32).reshape(2, -1, 1)
        x, y = column * np.float32(self.stride[0]), row * np.float32(self.stride[1])
        corners = np.stack([x, y, x, y], axis=-1) + np.array(self.cells, dtype=np.float32)
        return corners.reshape(-1, 4)


_DECODED_KINDS = ("retinanet", "ssdlite")
_REGION_KINDS = ("fasterrcnn",)
_MAX_ANCHORS = 1 << 22
_MAX_BOXES = 100_000  # candidates of a level, or detections of an image
_MIN_SIDE = 0.01  # of a detected box of a region in pixels, as in torchvision
_MAX_LOG_RATIO = np.float32(math.log(1000 / 16))  # of a box to its anchor, as torchvision's BoxCoder


@dataclass(frozen=True)
class Decoder:
    """How scores and offsets of anchors become detections: `RetinaNet.postprocess_detections` of torchvision.

    Scores are sigmoids. Of each level the `candidates` best pairs of anchor and class above `score_threshold`
    are decoded, clipped to the image, and suppressed by better ones of their class whose IoU exceeds
    `nms_iou`; the `detections` best remain. `box_weights` divide the offsets of x, y, width and height.
    """

    kind: str
    anchors: tuple[AnchorLevel, ...]
    box_weights: tuple[float, float, float, float]
    score_threshold: float
    nms_iou: float
    candidates: int
    detections: int

    def to_dict(self) -> dict[str, Any]:
        """Return the decoder as JSON."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Any) -> Decoder:
        """Raise ValueError if `values` is not a decoder that this version supports."""
        kinds = (*_DECODED_KINDS, *_REGION_KINDS)
        if not isinstance(values, Mapping) or values.get("kind") not in kinds:
            raise ValueError(f"decoder must be of kind {' or '.join(kinds)}")
        if values["kind"] in _REGION_KINDS:
            cls = RegionDecoder
        try:
            levels = tuple(
                AnchorLevel(
                    tuple(_check_numbers("grid", level["grid"], 2, 1, MAX_SIDE)),
                    tuple(_check_numbers("stride", level["stride"], 2, 0.0, MAX_SIDE)),
                    tuple(_check_cell(cell) for cell in level["cells"]),
                )
                for level in values["anchors"]
            )
            thresholds = [values["score_threshold"], values["nms_iou"]]
            counts = [values["candidates"], values["detections"]]
            decoder = cls(
                values["kind"],
                levels,
                tuple(_check_numbers("box_weights", values["box_weights"], 4, 1e-6, 1e6)),
                *_check_numbers("score_threshold and nms_iou", thresholds, 2, 1e-6, 1 - 1e-6),
                *_check_numbers("candidates and detections", counts, 2, 1, _MAX_BOXES),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"decoder has a missing or invalid value: {error}") from error
        if not 0 < decoder.count <= _MAX_ANCHORS:
            raise ValueError(f"decoder requires 1 to {_MAX_ANCHORS:,} anchors, got {decoder.count:,}")
        if any(x1 >= x2 or y1 >= y2 for level in levels for x1, y1, x2, y2 in level.cells):
            raise ValueError("decoder has an anchor without area")
        return decoder

    @property
    def count(self) -> int:
        """Number of anchors."""
        return sum(level.count for level in self.anchors)

    def outputs(self, labels: int) -> dict[str, int]:
        """Return the names of the model's outputs [batch, count, columns], and their columns."""
        return {"logits": labels, "boxes": 4}

    @cached_property
    def boxes(self) -> np.ndarray:
        """All anchors, float32 [count, 4], in pixels of the input."""
        return np.concatenate([level.boxes() for level in self.anchors])

    def decode(self, image: Sequence[np.ndarray], size: Size) -> np.ndarray:
        """Decode the `outputs` of one image of `size`, float32 [count, columns] each.

        Returns float32 [detections, 6], see `Detector.detections`.
        """
        logits, offsets = image
        classes, least = logits.shape[1], math.log(self.score_threshold / (1 - self.score_threshold))
        indices, scores, start = [], [], 0
        for level in self.anchors:
            values = logits[start : start + level.count].ravel()
            above = np.flatnonzero(values > least)
            probabilities = sigmoid(values[above]).astype(np.float32)
            best = np.argsort(-probabilities, kind="stable")[: self.candidates]
            indices.append(above[best] + start * classes)
            scores.append(probabilities[best])
            start += level.count
        anchors, labels = np.divmod(np.concatenate(indices), classes)
        return self._select(np.concatenate(scores), labels, offsets[anchors], self.boxes[anchors], size)

    def _select(
        self, score: np.ndarray, labels: np.ndarray, offsets: np.ndarray, anchors: np.ndarray, size: Size
    ) -> np.ndarray:
        """Return the detections among candidates: scores, labels, offsets, and boxes that they refer to."""
        order = np.argsort(-score, kind="stable")
        score, labels = score[order], labels[order]
        boxes = self._decode_boxes(offsets[order], anchors[order])
        height, width = height_width(size)
        sides = np.array([width, height, width, height], dtype=np.float32)
        boxes = boxes.clip(0, sides)
        kept = suppress_overlaps(boxes, labels, self.nms_iou, self.detections)
        detections = np.zeros((self.detections, 6), dtype=np.float32)
        detections[: len(kept)] = np.column_stack([score[kept], labels[kept], boxes[kept] / sides])
        return detections

    def _decode_boxes(self, offsets: np.ndarray, anchors: np.ndarray) -> np.ndarray:
        offsets = offsets / np.array(self.box_weights, dtype=np.float32)
        sides = anchors[:, 2:] - anchors[:, :2]
        centers = offsets[:, :2] * sides + (anchors[:, :2] + np.float32(0.5) * sides)
        halves = np.float32(0.5) * (np.exp(np.minimum(offsets[:, 2:], _MAX_LOG_RATIO)) * sides)
        return np.concatenate([centers - halves, centers + halves], axis=1)


class RegionDecoder(Decoder):
    """How scores and offsets of regions become detections: `RoIHeads.postprocess_detections` of torchvision.

    Scores are softmax, background first. There are no anchors, but `candidates` regions of each image, in
    pixels of the input; unused ones are 0. All pairs of region and class above `score_threshold` are decoded
    as those of `Decoder`, except boxes with a side below .01 pixels.
    """

    @property
    def count(self) -> int:
        """Number of regions."""
        return self.candidates

    def outputs(self, labels: int) -> dict[str, int]:
        return {"logits": 1 + labels, "boxes": 4, "regions": 4}

    def decode(self, image: Sequence[np.ndarray], size: Size) -> np.ndarray:
        logits, offsets, regions = image
        used = np.flatnonzero((regions[:, 2:] > regions[:, :2]).all(axis=1))
        probabilities = softmax(logits[used])[:, 1:].astype(np.float32)
        rows, labels = np.nonzero(probabilities > np.float32(self.score_threshold))
        height, width = height_width(size)
        clipped = self._decode_boxes(offsets[used], regions[used]).clip(0, [width, height, width, height])
        is_large = (clipped[rows, 2:] - clipped[rows, :2] >= _MIN_SIDE).all(axis=1)
        rows, labels = rows[is_large], labels[is_large]
        chosen = used[rows]
        return self._select(probabilities[rows, labels], labels, offsets[chosen], regions[chosen], size)


def _check_cell(values: Any) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = map(float, _check_numbers("cell", values, 4, -16.0 * MAX_SIDE, 16.0 * MAX_SIDE))
    return x1, y1, x2, y2


def suppress_overlaps(boxes: np.ndarray, labels: np.ndarray, iou: float, limit: int) -> np.ndarray:
    """Return the indices of the first `limit` boxes that overlap no better one of their class by over `iou`.

    Class-wise non-maximum suppression; `boxes`, x1, y1, x2, y2, [n, 4], are sorted by falling score.
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    remaining = np.arange(len(boxes))
    kept: list[int] = []
    while len(remaining) and len(kept) < limit:
        best, remaining = remaining[0], remaining[1:]
        kept.append(best)
        lows = np.maximum(boxes[remaining, :2], boxes[best, :2])
        shared = (np.minimum(boxes[remaining, 2:], boxes[best, 2:]) - lows).clip(0).prod(axis=1)
        overlaps = shared > np.float32(iou) * (areas[remaining] + areas[best] - shared)
        remaining = remaining[~overlaps | (labels[remaining] != labels[best])]
    return np.array(kept, dtype=np.intp)


class Detection(NamedTuple):
    """An object in an image."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of the decoded image."""


class Detector(Model):
    """A model that finds objects in images: labels, scores and boxes."""

    decoder: Decoder

    def __init__(
        self,
        model: bytes | ort.InferenceSession,
        name: str,
        *,
        threads: int | None = None,
        providers: str | Sequence[str] = CPU,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Open a model as `Model` does; `decoder` is by default that of its metadata.

        Raises ArtifactError, also if it is not a detector.
        """
        super().__init__(
            model, name, threads=threads, providers=providers, preprocessing=preprocessing, labels=labels
        )
        decoder = decoder or (None if self._own is None else self._own.decoder)
        shapes = {output.name: output.shape for output in self.session.get_outputs()}
        if decoder is None or not decoder.outputs(0).keys() <= shapes.keys():
            raise ArtifactError(f"{name} is not a detector")
        for output, columns in decoder.outputs(len(self.labels)).items():
            expected = (decoder.count, columns)
            sizes = zip(shapes[output][1:], expected)
            if len(shapes[output]) != 3 or any(isinstance(n, int) and n != m for n, m in sizes):
                raise ArtifactError(
                    f"{name} has {output} of shape {shapes[output]}, its decoder and labels require "
                    f"[batch, {decoder.count}, {columns}]"
                )
        self.decoder = decoder

    def detections(self, batch: np.ndarray) -> np.ndarray:
        """Run the model on the result of `to_input` and decode; return float32 [B, detections, 6].

        Rows are score, class, x1, y1, x2, y2 by falling score, the box in fractions of the rendered image;
        unused rows are 0. Raises as `Classifier.logits`, also if outputs are not finite.
        """
        detections = np.zeros((len(batch), self.decoder.detections, 6), dtype=np.float32)
        if len(batch) == 0:
            return detections
        expected_columns = self.decoder.outputs(len(self.labels))
        outputs = self.run(batch, list(expected_columns))
        for output, columns in zip(outputs, expected_columns.values()):
            shape, expected = output.shape, (len(batch), self.decoder.count, columns)
            if shape != expected or output.dtype != np.float32:
                raise ArtifactError(f"{self.name} must return float32 of shape {expected}, got {shape}")
            if not np.isfinite(output).all():
                raise ArtifactError(f"{self.name} returns outputs that are not finite")
        for row, *image in zip(detections, *outputs):
            row[:] = self.decoder.decode(image, self.preprocessing.size)
        return detections

    infer = detections

    def detect(
        self,
        images: ImageSource | Iterable[ImageSource],
        min_score: float = 0.5,
        *,
        batch_size: int = 16,
    ) -> list[list[Detection]]:
        """Find objects in one or several images; see `ImageSource`.

        Returns for each image its objects of at least `min_score`, the best first. Raises as
        `Classifier.predict`.
        """
        return [
            self._locate(
                rows[rows[:, 0] >= max(min_score, self.decoder.score_threshold)],
                _original_size(image, pixels),
            )
            for chunk, decoded, rendered in self._render(images, batch_size)
            for image, pixels, rows in zip(chunk, decoded, self.detections(self.to_input(rendered)))
        ]

    def _locate(self, rows: np.ndarray, size: tuple[int, int]) -> list[Detection]:
        boxes = to_original(rows[:, 2:], *size, self.preprocessing)
        return [
            Detection(self.labels[int(label)], float(score), (x1, y1, x2, y2))
            for (score, label), (x1, y1, x2, y2) in zip(rows[:, :2], boxes.tolist())
            if x1 < x2 and y1 < y2  # not in the padding alone
        ]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis, computed in float64."""
    shifted = logits.astype(np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each logit, computed in float64 without overflow."""
    small = np.exp(-np.abs(logits.astype(np.float64)))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


# ---------------------------------------------------------------------------------------------------------
# Metadata of a model file, and the manifest of an artifact folder


def build_metadata(
    preprocessing: Preprocessing,
    labels: Sequence[str],
    origin: Mapping[str, Any],
    thresholds: Sequence[float] | None = None,
    *,
    takes_pixels: bool = False,
) -> dict[str, str]:
    """Return the entries of `metadata_props` with which an .onnx file can be used without its folder.

    `names`, `imgsz`, `task` and `stride` are for readers of other tools, in the form that Ultralytics writes.
    `origin` names teachers, student, method and licenses, as any JSON. `thresholds`, one per label, make it a
    multi-label model. With `takes_pixels` its input is rendered images, uint8 [batch, H, W, 3].
    """
    entries = {
        "version": str(SCHEMA_VERSION),
        "preprocessing": json.dumps(preprocessing.to_dict(), sort_keys=True),
        "labels": json.dumps(list(labels), ensure_ascii=False),
        "origin": json.dumps(dict(origin), sort_keys=True, ensure_ascii=False),
    }
    if takes_pixels:
        entries = {"input": UINT8, **entries}
    if thresholds is not None:
        values = json.dumps([float(threshold) for threshold in thresholds])
        entries = {"task": MULTI_LABEL, "thresholds": values, **entries}
    return {
        **{METADATA_PREFIX + key: value for key, value in entries.items()},
        "names": repr(dict(enumerate(labels))),
        "imgsz": repr(list(height_width(preprocessing.size))),
        "task": "classify",
        "stride": "1",
    }


def decoder_metadata(decoder: Mapping[str, Any]) -> dict[str, str]:
    """Return the further entries of a detector's metadata, see `build_metadata`; `decoder` as JSON."""
    parsed = Decoder.from_dict(decoder)
    about = {"task": DETECTION, "decoder": json.dumps(parsed.to_dict(), sort_keys=True)}
    stride = max((max(level.stride) for level in parsed.anchors), default=1.0)
    return {
        **{METADATA_PREFIX + key: value for key, value in about.items()},
        "task": "detect",
        "stride": str(round(stride)),
    }


_INVALID_JSON = (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading JSON of any content may raise: too large numbers and too deep nesting included."""


def _check_labels(labels: Any) -> list[str]:
    """Raise ValueError unless it is a list of strings that is not empty."""
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError("labels must be strings")
    return labels


@dataclass(frozen=True)
class Description:
    """What a manifest, or the metadata of a file, describes of a model."""

    preprocessing: Preprocessing
    labels: list[str]
    thresholds: list[float] | None = None
    decoder: Decoder | None = None

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Description:
        """Raise ValueError if an entry is invalid, or the task is unknown."""
        preprocessing, labels = entries["preprocessing"], _check_labels(entries["labels"])
        about, task = cls(Preprocessing.from_dict(preprocessing), labels), entries.get("task")
        if task is None:
            return about
        if task == MULTI_LABEL:
            thresholds = _check_numbers("thresholds", entries["thresholds"], len(labels), 0.0, 1.0)
            return replace(about, thresholds=[float(threshold) for threshold in thresholds])
        if task == DETECTION:
            return replace(about, decoder=Decoder.from_dict(entries["decoder"]))
        raise ValueError(f"unknown task {task!r}")


def _read_metadata(session: ort.InferenceSession, name: str, *, required: bool) -> Description | None:
    entries = {
        key[len(METADATA_PREFIX) :]: value
        for key, value in session.get_modelmeta().custom_metadata_map.items()
        if key.startswith(METADATA_PREFIX)
    }
    version = entries.get("version")
    if version is None:
        if required:
            raise ArtifactError(f"{name} has no questpress metadata. Load its artifact folder instead")
        return None
    if version != str(SCHEMA_VERSION):
        raise ArtifactError(f"{name} has version {version}, this runtime supports version {SCHEMA_VERSION}")
    try:
        values: dict[str, Any] = {"task": entries.get("task")}
        for key in ("preprocessing", "labels", "thresholds", "decoder"):
            if key in entries:
                values[key] = json.loads(entries[key])
        return Description.from_dict(values)
    except _INVALID_JSON as error:
        raise ArtifactError(f"the questpress metadata of {name} is invalid: {error}") from error


def read_manifest(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the artifact folder at `path`, or in the run folder there, and its validated manifest.

    The files in it are not read; see `read_verified`. Raises ArtifactError.
    """
    path = Path(path)
    folder = next((f for f in (path, path / "artifact") if (f / MANIFEST).is_file()), None)
    if folder is None:
        models = sorted(path.glob("student*.onnx")) if path.is_dir() else []
        if models:
            raise ArtifactError(
                f"{path} contains {models[0].name} but no {MANIFEST}. Copy the artifact folder again"
            )
        problem = f"contains no {MANIFEST}" if path.is_dir() else "does not exist"
        raise ArtifactError(f"{path} {problem}. Specify a run folder, an artifact folder or an .onnx file")
    file = folder / MANIFEST
    try:
        if (size := file.stat().st_size) > MAX_MANIFEST_BYTES:
            raise ValueError(f"{size:,} bytes exceed the limit of {MAX_MANIFEST_BYTES:,}")
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        if version != SCHEMA_VERSION or isinstance(version, (bool, float)):
            raise ArtifactError(
                f"{file} has version {version!r}, this runtime supports version {SCHEMA_VERSION}"
            )
        if manifest["checksum"] != compute_checksum(manifest):
            raise ArtifactError(
                f"{file} was modified after it was written: its checksum differs. Copy the artifact folder "
                "again, or export the run again"
            )
        Description.from_dict(manifest)
        if "self_test" in manifest:
            _check_entry(manifest["self_test"])
        for entry in manifest["files"]:
            _check_entry(entry)
            str(entry["precision"])
            if not isinstance(entry.setdefault("target", None), (str, type(None))):
                raise ValueError(f"invalid target {entry['target']!r}")
    except _INVALID_JSON as error:
        raise ArtifactError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    return folder, manifest


def _check_entry(entry: Any) -> None:
    """Raise ValueError, KeyError or TypeError if a file's entry is invalid or of another folder."""
    if not isinstance(entry["name"], str) or Path(entry["name"]).name != entry["name"]:
        raise ValueError(f"invalid file name {entry['name']!r}")
    int(entry["bytes"]), str(entry["sha256"])


def compute_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest, except its checksum, as JSON: sorted keys, no spaces, ASCII."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _read_file(path: Path) -> bytes:
    """Return a model file's content. Raises ArtifactError, also for a pipe or device, which could block."""
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path} cannot be read: it is not a file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise ArtifactError(f"{path} cannot be read: ONNX files are limited to 2 GB")
            return file.read()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_verified(folder: Path, entry: Mapping[str, Any]) -> bytes:
    """Return the content of a file of the manifest. Raises ArtifactError if its size or checksum differ."""
    path = folder / entry["name"]
    try:
        content = _read_file(path)
    except ArtifactError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        fp32 = folder / "student.onnx"
        alternative = f", or use the fp32 file, {fp32.name}" if fp32.is_file() else ""
        raise ArtifactError(
            f"{path} is listed in {MANIFEST} but missing. Copy the artifact folder again{alternative}"
        ) from error
    if len(content) != entry["bytes"]:
        raise ArtifactError(
            f"{path} is damaged: it has {len(content)} bytes, {MANIFEST} lists {entry['bytes']}. "
            "Copy the artifact folder again"
        )
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ArtifactError(
            f"{path} is damaged: its sha256 differs from {MANIFEST}. Copy the artifact folder again"
        )
    return content


def _choose_file(
    files: Sequence[Mapping[str, Any]], folder: Path, name: str | None, precision: str
) -> Mapping[str, Any]:
    """Return the file named, or the first of the precision for this processor.

    If all int8 files are for other processors, the fp32 file is used.
    """
    for target in runnable_targets():
        for entry in files:
            matches = entry["precision"] == precision and entry["target"] == target
            if entry["name"] == name or (name is None and matches):
                return entry
    for entry in files:
        if name is None and precision == "int8" and entry["precision"] == "fp32":
            return entry
    available = ", ".join(f"{entry['name']} ({entry['precision']})" for entry in files) or "no files"
    raise ArtifactError(f"{folder} contains no {name or f'{precision} file'}. Its manifest lists {available}")
