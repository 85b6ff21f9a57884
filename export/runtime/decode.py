"""Decode image files as a viewer shows them."""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Callable, Tuple, Union

import numpy as np
from PIL import Image, ImageCms

from .errors import ImageError
from .preprocessing import Pixels

MAX_PIXELS = 89_478_485  # of an image file; the limit from which Pillow warns
NeededSize = Callable[[int, int], Tuple[int, int]]
"""Returns height and width in pixels that suffice of an image of (height, width)."""
ImageSource = Union[str, Path, bytes, Image.Image, np.ndarray]
"""Path of an image file, its content, a PIL image, or decoded pixels: uint8 [H, W, 3], RGB."""
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


def original_size(source: ImageSource, pixels: Pixels) -> tuple[int, int]:
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
