"""What runs on the device: read an image, render it, classify it. One file; numpy, Pillow and onnxruntime
only.

Copy this file beside an artifact folder and nothing else is needed:

    classifier = Classifier.load("runs/shop")
    classifier.predict(["photo.jpg"])[0].label

The training side takes its test images through the same functions, so the accuracy it reports is the
device's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

# ONNX Runtime of 1.31 and later tells its makers of the machine it runs on, and keeps a number for it in the
# user's cache, unless this is said before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageCms

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 26
"""Bytes. That of 21,000 classes has a third of a million."""
LARGEST_FILE = (1 << 31) - 1
"""Bytes of an ONNX file; protobuf holds no more."""
MOST_THREADS = 1024
METADATA_PREFIX = "questpress."
MULTI_LABEL = "multi-label"
UINT8 = "uint8"

Pixels = np.ndarray
"""uint8 [H, W, 3], RGB."""


class ImageError(Exception):
    """An image that cannot be read: one sentence naming the file and the reason."""

    exit_code = 1


class ArtifactError(Exception):
    """A model file or artifact folder that is missing, damaged or not ours, in one sentence."""

    exit_code = 1


# ---------------------------------------------------------------------------------------------------------
# Reading an image

# Raster formats that Pillow decodes itself. EPS and WMF are left out: they run other programs.
_FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF", "HEIF", "JXL"),
    *("ICO", "DIB", "PCX", "SGI", "QOI", "PSD", "DDS", "ICNS", "TGA"),
)
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


def decode_image(source: str | Path | bytes, *, max_pixels: int = 89_478_485) -> Pixels:
    """The picture in a file, or in the bytes of one, as a viewer would show it: uint8 [H, W, 3], RGB.

    EXIF orientation is applied, transparency is laid on white, 16-bit and float pictures are scaled to 8
    bits, and of an animation the first frame is taken. Raises ImageError for whatever isn't a whole, readable
    picture of at most `max_pixels` pixels (read from the header, before anything is decoded).
    """
    if isinstance(source, bytes):
        name = "an image given as bytes"
        if not source:
            raise ImageError(f"cannot read {name}: there are none")
        return _decode(BytesIO(source), name, max_pixels)
    path = Path(source)
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    try:
        if path.exists() and not path.is_file():
            raise ImageError(f"cannot read {name}: it is not a file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ImageError(f"cannot read {name}: the file is empty")
            return _decode(file, name, max_pixels)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot read {name}: {reason}") from error


def _decode(file: BinaryIO, name: str, max_pixels: int) -> Pixels:
    try:
        with no_pillow_warnings():
            Image.init()
            with Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN]) as image:
                _refuse_large(name, image, max_pixels)
                _refuse_gaps(name, image)
                image.load()
                _refuse_large(name, image, max_pixels)  # an icon's header may lie of the picture inside it
                return _rgb(_upright(image))
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"cannot read {name}: it is not an image, or of an unknown format") from error
    except MemoryError as error:
        raise ImageError(f"cannot read {name}: there is not enough memory for it") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"cannot read {name}: {reason}") from error


def _refuse_large(name: str, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"cannot read {name}: {width}×{height} pixels are more than the {max_pixels} allowed"
        )


def _refuse_gaps(name: str, image: Image.Image) -> None:
    """A TIFF may say that it is larger than all of its parts: Pillow would fill the rest with black."""
    tiles = getattr(image, "tile", None)
    if image.format != "TIFF" or not tiles:
        return
    covered = sum((right - left) * (lower - upper) for _, (left, upper, right, lower), *_ in tiles)
    if covered < image.width * image.height:
        raise ImageError(f"cannot read {name}: parts of the picture are missing")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing of orientation; the pixels are whole
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Pixels:
    if image.mode == "F" or image.mode.startswith("I"):
        grey, shown = _eight_bits(image)
        return np.repeat(np.where(shown, grey, np.uint8(255))[:, :, None], 3, axis=2)
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    if image.has_transparency_data:
        key = image.info.get("transparency")
        if isinstance(key, tuple) and max(key) > 255:  # a 16-bit key beside pixels read as 8 bits
            image.info["transparency"] = tuple(value >> 8 for value in key)
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _eight_bits(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures of more than 8 bits as uint8 [H, W], and where they are opaque (bool [H, W]).

    A known bit depth is scaled by that depth, whatever the content: 16 bits to 8 by dropping the low byte, as
    Pillow does for 16-bit RGB. Float and 32-bit pictures carry no depth; theirs is the smallest usual range
    that holds them.
    """
    values = np.asarray(image)
    key = image.info.get("transparency")
    shown = values != key if isinstance(key, int) else np.ones(values.shape, dtype=bool)
    tags = getattr(image, "tag_v2", {})
    bits = _first(tags.get(258), 16) if tags else 16
    if bits == 32 and image.mode == "I" and _first(tags.get(339), 1) == 1:
        values = values.view(np.uint32)  # TIFF's unsigned samples, which Pillow has signed ones for only
    grey = np.empty(values.shape, dtype=np.uint8)
    blocks = _blocks(values)
    if image.mode != "F" and bits <= 16:
        for rows in blocks:
            grey[rows] = (values[rows].astype(np.int64) >> (bits - 8)).clip(0, 255)
    else:
        ends = [(finite.min(), finite.max()) for rows in blocks if (finite := _finite(values[rows])).size]
        low, high = float(min(one for one, _ in ends)), float(max(one for _, one in ends))
        usual = [bound for bound in ((1, 255, 65535) if image.mode == "F" else (255, 65535)) if high <= bound]
        if low < 0 or not usual:
            low, span = low, (high - low) or 1.0
        else:
            low, span = 0.0, float(usual[0])
        for rows in blocks:
            grey[rows] = np.round((_finite(values[rows]) - low) * (255 / span))
    if tags and _first(tags.get(262), 1) == 0:  # TIFF's WhiteIsZero, which Pillow undoes for 8 bits only
        grey = 255 - grey
    return grey, shown


def _blocks(values: np.ndarray) -> list[slice]:
    """Rows of an array a million numbers at a time: wider copies of a whole picture would be many times its
    size.
    """
    height, width = values.shape
    rows = max(1, (1 << 20) // max(1, width))
    return [slice(start, start + rows) for start in range(0, height, rows)]


def _finite(values: np.ndarray) -> np.ndarray:
    """As float64, with zero for what is no number and the ends of float32 for what has no end."""
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
        raise ImageError("its LAB colours cannot be converted")
    return converted


_warnings_lock = threading.Lock()
_warnings_depth = 0
_warnings_saved: warnings.catch_warnings | None = None


@contextmanager
def no_pillow_warnings() -> Iterator[None]:
    """Keep Pillow's remarks about odd files quiet. Python's own context manager alone isn't safe among
    threads.
    """
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
# Rendering it for a network

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_CROP_MODES = ("center", "squash", "border")
_FARTHEST = 1e6
"""Of means and deviations, in units of the lightest pixel: beyond it, float32 has no room for them."""
LARGEST_SIDE = 1 << 13
"""Of a network's input, in pixels: one image of it takes 800 MB. What asks for more is no artifact."""
_MAX_RESIZED = 1 << 25  # pixels; an image much longer than wide is resized only where the crop will be


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input, in timm's terms (`timm.data.transforms_factory`).

    `size` S is the input's side and `resize` the side before the crop, floor(S / crop_fraction), both in
    pixels. `crop_mode`: 'center' resizes the short side and cuts, 'squash' ignores the aspect ratio, 'border'
    fits the long side and fills with the mean. Filters are Pillow's, antialiased. `mean` and `std` are for
    pixels in [0, 1].
    """

    size: int
    resize: int
    crop_fraction: float
    interpolation: str
    crop_mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        """Raises ValueError for values no image could be rendered with."""
        if self.size < 1 or self.resize < 1 or not 0 < self.crop_fraction < math.inf:
            raise ValueError(
                f"preprocessing needs positive sizes, not size={self.size}, resize={self.resize}, "
                f"crop_fraction={self.crop_fraction}"
            )
        if self.size > LARGEST_SIDE or self.resize > 16 * LARGEST_SIDE:
            raise ValueError(f"no network takes images of {self.size} pixels cut from {self.resize}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"no filter {self.interpolation!r}; there are {', '.join(_FILTERS)}")
        if self.crop_mode not in _CROP_MODES:
            raise ValueError(f"no crop mode {self.crop_mode!r}; there are {', '.join(_CROP_MODES)}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(
                f"preprocessing needs three means and deviations, not {self.mean} and {self.std}"
            )
        if not all(abs(value) <= _FARTHEST for value in self.mean):
            raise ValueError(f"no image of pixels in [0, 1] has means of {self.mean}")
        if not all(1 / _FARTHEST <= value <= _FARTHEST for value in self.std):
            raise ValueError(f"preprocessing needs positive deviations, not {self.std}")

    @classmethod
    def of(
        cls,
        size: int,
        crop_fraction: float = 0.875,
        interpolation: str = "bicubic",
        crop_mode: str = "center",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> Preprocessing:
        """The preprocessing of a timm `pretrained_cfg`; `resize` follows from the crop fraction."""
        r, g, b = (float(value) for value in mean)
        sr, sg, sb = (float(value) for value in std)
        return cls(
            size=int(size),
            resize=math.floor(size / crop_fraction),
            crop_fraction=float(crop_fraction),
            interpolation=interpolation,
            crop_mode=crop_mode,
            mean=(r, g, b),
            std=(sr, sg, sb),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": SCHEMA_VERSION,
            "library": "Pillow",
            "antialias": True,
            "colour": "RGB",
            "size": self.size,
            "resize": self.resize,
            "crop_fraction": self.crop_fraction,
            "interpolation": self.interpolation,
            "crop_mode": self.crop_mode,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Raises ValueError where `to_dict` of this version could not have written `values`."""
        if not isinstance(values, Mapping):
            raise ValueError(f"preprocessing is {type(values).__name__} and no table")
        if values.get("version") != SCHEMA_VERSION or values.get("library") != "Pillow":
            raise ValueError(
                f"no preprocessing of version {values.get('version')!r} with {values.get('library')!r} here"
            )
        try:
            r, g, b = (float(value) for value in values["mean"])
            sr, sg, sb = (float(value) for value in values["std"])
            found = cls(
                size=int(values["size"]),
                resize=int(values["resize"]),
                crop_fraction=float(values["crop_fraction"]),
                interpolation=str(values["interpolation"]),
                crop_mode=str(values["crop_mode"]),
                mean=(r, g, b),
                std=(sr, sg, sb),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"preprocessing lacks or garbles {error}") from error
        for key, value in found.to_dict().items():
            if values.get(key) != value:
                raise ValueError(f"no preprocessing with {key} {values.get(key)!r} here")
        return found


def render(image: Pixels, p: Preprocessing) -> Pixels:
    """Resize and crop uint8 [H, W, 3] to uint8 [S, S, 3], pixel for pixel as timm's evaluation transform
    does.
    """
    height, width = image.shape[:2]
    fill = (0, 0, 0)
    if p.crop_mode == "squash":
        new = (p.resize, p.resize)
    elif p.crop_mode == "border":
        ratio = max(height / p.resize, width / p.resize)
        new = (max(1, round(height / ratio)), max(1, round(width / ratio)))
        fill = tuple(round(255 * value) for value in p.mean)  # type: ignore[assignment]
    elif width <= height:
        new = (int(p.resize * height / width), p.resize)
    else:
        new = (p.resize, int(p.resize * width / height))
    top, left = (round((side - p.size) / 2) if side >= p.size else -((p.size - side) // 2) for side in new)
    picture = Image.fromarray(np.ascontiguousarray(image))
    resample = _FILTERS[p.interpolation]
    if new[0] * new[1] > _MAX_RESIZED:
        scale_y, scale_x = height / new[0], width / new[1]
        bottom, right = min(new[0], top + p.size), min(new[1], left + p.size)
        top, left = max(0, top), max(0, left)
        box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
        picture = picture.resize((right - left, bottom - top), resample, box=box)
        top, left = (
            -((p.size - side) // 2) if side < p.size else 0 for side in (picture.height, picture.width)
        )
    elif new != (height, width):
        picture = picture.resize((new[1], new[0]), resample)
    canvas = Image.new("RGB", (p.size, p.size), fill)
    canvas.paste(picture, (-left, -top))
    return np.array(canvas, dtype=np.uint8)


def normalise(pixels: np.ndarray, p: Preprocessing) -> np.ndarray:
    """uint8 [B, S, S, 3] to the network's float32 [B, 3, S, S]: (pixels / 255 - mean) / std."""
    grey = np.arange(256, dtype=np.float32) / np.float32(255)
    batch = np.empty((len(pixels), 3, *pixels.shape[1:3]), dtype=np.float32)
    for channel in range(3):
        table = (grey - np.float32(p.mean[channel])) / np.float32(p.std[channel])
        batch[:, channel] = table[pixels[..., channel]]
    return batch


def preprocess(images: Iterable[Pixels], p: Preprocessing) -> np.ndarray:
    """Decoded images uint8 [H, W, 3] of any sizes to the network's input, float32 [B, 3, S, S]."""
    rendered = [render(image, p) for image in images]
    shape = (0, p.size, p.size, 3)
    return normalise(np.stack(rendered) if rendered else np.empty(shape, dtype=np.uint8), p)


# ---------------------------------------------------------------------------------------------------------
# Running the network


def allowed_cores() -> int:
    """Cores this process may use: those of its affinity, or its cgroup's CPU quota where that is less."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # Windows, macOS
        cores = os.cpu_count() or 1
    return max(1, int(min(cores, _cgroup_quota())))


def _cgroup_quota(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs the tightest enclosing cgroup (v2 or v1) grants; at least 1, inf without a limit or off Linux."""
    folders = cgroup_folders(proc, root)
    quotas = [_v1_quota(folder) if first else _v2_quota(folder) for folder, first in folders]
    return max(1.0, min(quotas, default=math.inf))


def cgroup_folders(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[Path, bool]]:
    """The folders of the cgroups that limit this process's CPU time, and whether each is of version 1."""
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
        # Inside a container the path of the host may be named while only the root is mounted.
        inner = mount / group.lstrip("/")
        for folder in (inner, *inner.parents):
            yield folder, bool(controllers)
            if folder == mount:
                break


def _v2_quota(folder: Path) -> float:
    try:
        granted, period = (folder / "cpu.max").read_text().split()
        return math.inf if granted == "max" else int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _v1_quota(folder: Path) -> float:
    try:
        granted = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return math.inf if granted <= 0 else granted / period
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def default_threads() -> int:
    """min(cores allowed, 4): more seldom helps a small network, and more than allowed slows it several times
    over.
    """
    return min(allowed_cores(), 4)


_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def int8_flags() -> tuple[str, ...]:
    """Which of the instruction sets that decide int8's speed the processor has, by Linux's names for them;
    empty where the system does not tell.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ()
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), [])
    return tuple(flag for flag in _FLAGS if flag in flags)


def target_of_this_machine() -> str:
    """The target whose int8 files are fastest here: 'arm64', 'x86-vnni', or 'x86', which is right on every
    x86 and the answer where nothing is known.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "arm64"
    return "x86" if {"avx512_vnni", "avx_vnni"}.isdisjoint(int8_flags()) else "x86-vnni"


def session(
    model: str | Path | bytes,
    threads: int,
    *,
    fuse: bool = True,
    optimised: str | Path | None = None,
    name: str = "a model given as bytes",
) -> ort.InferenceSession:
    """The one way questpress runs a model file: measured, validated and shipped with these options.

    `name` is what bytes are called where they cannot be loaded; `optimised` names a file to write the graph
    to as it runs on this machine. Without `fuse` an int8 file computes in float between quantizing and
    dequantizing: what it means, without the integer kernels of this processor. Raises ArtifactError where
    onnxruntime cannot load the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fuse else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    # Threads wait busily within a run, where microseconds count, and give the cores back between runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Or else bytes that look like ONNX Runtime's own format are read as that, by another parser.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    name = name if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
            # It takes zeros padded before a max-pool for minus infinity: BiT comes out 3 % wrong.
            disabled_optimizers=["Pad_Fusion"],
        )
    except Exception as error:  # onnxruntime's exceptions have no common public class
        reason = " ".join(str(error).split())
        raise ArtifactError(f"onnxruntime cannot load {name}: {reason}") from error


# ONNX's messages as far as they lead to tensors (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto):
# the number of a field, and the message in it.
_WAYS_TO_TENSORS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL = (13, 14)  # a tensor's external_data and data_location
_VARINT, _EIGHT_BYTES, _COUNTED, _FOUR_BYTES = 0, 1, 2, 5  # of protobuf's fields
_MOST_FIELDS = 10_000_000  # a network of a thousand nodes has some thirty thousand


def refuse_outside(model: bytes, name: str) -> None:
    """Refuse a model that takes weights from other files: what ships is one file, and whoever made it is not
    to choose what is read on this machine. Nothing but the messages' frames is read, and no runtime is asked.

    Raises ArtifactError, also where the bytes are no ONNX model.
    """
    content = memoryview(model)
    waiting, fields = [("model", 0, len(content))], 0
    try:
        while waiting:
            kind, place, end = waiting.pop()
            ways = _WAYS_TO_TENSORS.get(kind, {})
            while place < end:
                key, place = _varint(content, place)
                number, wire = key >> 3, key & 7
                fields += 1
                if fields > _MOST_FIELDS:
                    raise ValueError(f"more than {_MOST_FIELDS:,} fields")
                value = size = 0
                if wire == _VARINT:
                    value, place = _varint(content, place)
                elif wire == _COUNTED:
                    size, place = _varint(content, place)
                elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
                    size = 8 if wire == _EIGHT_BYTES else 4
                else:
                    raise ValueError(f"a field of kind {wire}")
                if place + size > end:
                    raise ValueError("a field that ends beyond its message")
                if kind == "tensor" and number in _EXTERNAL and (value or wire == _COUNTED):
                    raise ArtifactError(f"{name} keeps data in another file, which is refused")
                if wire == _COUNTED and number in ways:
                    waiting.append((ways[number], place, place + size))
                place += size
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{name} is no ONNX file, or a damaged one: {error}") from error


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """Protobuf's number of 7 bits a byte at a place, and the place behind it."""
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


@dataclass(frozen=True)
class Prediction:
    """The answer to one image: the likeliest label, its probability, and the `top` likeliest with theirs.

    `labels` is what the image is said to show, with probabilities: the one label; of a network for images of
    several labels those whose probability reaches their threshold, the likeliest first, perhaps none.
    """

    label: str
    probability: float
    top: list[tuple[str, float]]
    labels: list[tuple[str, float]]


class Classifier:
    """A shipped network: images in, labels and probabilities out."""

    def __init__(
        self,
        model: bytes,
        name: str,
        *,
        threads: int | None = None,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        """What isn't given is read from the model's own metadata; ArtifactError where that lacks it, and
        where the model is none that takes images and answers with a number for each label.

        `thresholds`, one for each label, are those of a network for images of several labels; then each label
        has a probability of its own.
        """
        self.name = name
        self.threads = default_threads() if threads is None else threads
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"a classifier has 1 to {MOST_THREADS} threads, not {threads}")
        refuse_outside(model, name)
        self.session = session(model, self.threads, name=name)
        own_preprocessing, own_labels, own_thresholds = _read_metadata(
            self.session.get_modelmeta().custom_metadata_map, name, needed=not (preprocessing and labels)
        )
        if not (preprocessing and labels) and thresholds is None:
            thresholds = own_thresholds
        self.preprocessing: Preprocessing = preprocessing or own_preprocessing  # type: ignore[assignment]
        self.labels: tuple[str, ...] = tuple(labels or own_labels)
        given, answers = self.session.get_inputs(), self.session.get_outputs()
        if len(given) != 1 or not answers or given[0].type not in ("tensor(uint8)", "tensor(float)"):
            kinds = ", ".join(one.type for one in given) or "nothing"
            raise ArtifactError(f"{name} takes {kinds}, and not images alone")
        self._input = given[0].name
        self.takes_pixels: bool = given[0].type == "tensor(uint8)"
        classes = answers[0].shape[-1] if answers[0].shape else None
        if isinstance(classes, int) and classes != len(self.labels):
            raise ArtifactError(f"{name} answers with {classes} classes but names {len(self.labels)}")
        self.thresholds = None if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        if self.thresholds is not None and self.thresholds.shape != (len(self.labels),):
            raise ArtifactError(f"{name} has {self.thresholds.size} thresholds for {len(self.labels)} labels")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        file: str | None = None,
        threads: int | None = None,
        precision: str = "int8",
    ) -> Classifier:
        """Load from a run folder, an artifact folder, or one .onnx file.

        In a folder, `file` names the model file, or else the first of `precision` ('int8', 'fp32') is taken;
        its size and sha256 must be the manifest's. Raises ArtifactError.
        """
        path = Path(path)
        if path.is_file():
            return cls(_whole_file(path), path.name, threads=threads)
        folder, manifest = read_manifest(path)
        entry = _choose(manifest["files"], folder, file, precision)
        return cls(
            read_verified(folder, entry),
            entry["name"],
            threads=threads,
            preprocessing=Preprocessing.from_dict(manifest["preprocessing"]),
            labels=manifest["labels"],
            thresholds=_thresholds(manifest),
        )

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """float64 [B, classes]: together 1, or where images have several labels each for itself."""
        return softmax(logits) if self.thresholds is None else sigmoid(logits)

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """Rendered images, uint8 [B, S, S, 3], as the file takes them: so, or normalised."""
        return pixels if self.takes_pixels else normalise(pixels, self.preprocessing)

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """What `feed` gives, float32 [B, 3, S, S] or of a file that takes pixels uint8 [B, S, S, 3], to
        logits float32 [B, classes]. Raises ValueError where such a file is given anything else, and
        ArtifactError where onnxruntime fails or the answer has another shape.
        """
        if self.takes_pixels and batch.dtype != np.uint8:
            raise ValueError(f"{self.name} takes pixels, uint8 [B, S, S, 3], not {batch.dtype}")
        if len(batch) == 0:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        fed = np.ascontiguousarray(batch, dtype=np.uint8 if self.takes_pixels else np.float32)
        try:
            answer = self.session.run(None, {self._input: fed})[0]
        except Exception as error:  # onnxruntime's exceptions have no common public class
            reason = " ".join(str(error).split())
            raise ArtifactError(f"onnxruntime cannot run {self.name}: {reason}") from error
        shape, expected = getattr(answer, "shape", None), (len(batch), len(self.labels))
        if shape != expected:
            raise ArtifactError(f"{self.name} answers with {shape} where {expected} was due")
        if answer.dtype.kind not in "fiu":
            raise ArtifactError(f"{self.name} answers with {answer.dtype}, and not with numbers")
        return answer

    def answers(self, pixels: np.ndarray) -> np.ndarray:
        """Rendered images, uint8 [B, S, S, 3], to logits float32 [B, classes] of which the largest of each
        image is a finite number. Raises ArtifactError where it is none.
        """
        logits = self.logits(self.feed(pixels))
        if not np.isfinite(logits.max(axis=-1)).all():
            raise ArtifactError(f"{self.name} answers with numbers that are not finite")
        return logits

    def predict(
        self, images: Iterable[Pixels | str | Path | bytes], top: int = 5, *, batch_size: int = 16
    ) -> list[Prediction]:
        """Classify images, each decoded (uint8 [H, W, 3]), a path, or a file's bytes. Raises ImageError."""
        answers = []
        queue = iter(images)
        while chunk := list(islice(queue, batch_size)):
            decoded = [image if isinstance(image, np.ndarray) else decode_image(image) for image in chunk]
            pixels = np.stack([render(image, self.preprocessing) for image in decoded])
            for row in self.probabilities(self.answers(pixels)):
                order = np.argsort(-row, kind="stable")
                likeliest = [(self.labels[index], float(row[index])) for index in order[: max(1, top)]]
                given = order[:1] if self.thresholds is None else order[(row >= self.thresholds)[order]]
                labels = [(self.labels[index], float(row[index])) for index in given]
                answers.append(Prediction(*likeliest[0], top=likeliest, labels=labels))
        return answers


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, computed in float64 from the largest logit downwards."""
    shifted = logits.astype(np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Each class's own probability, computed in float64 without overflow."""
    small = np.exp(-np.abs(logits.astype(np.float64)))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


# ---------------------------------------------------------------------------------------------------------
# What a model file and an artifact folder say of themselves


def metadata(
    preprocessing: Preprocessing,
    labels: Sequence[str],
    origin: Mapping[str, Any],
    thresholds: Sequence[float] | None = None,
    *,
    takes_pixels: bool = False,
) -> dict[str, str]:
    """The entries that make one .onnx file enough to predict with, for the model's `metadata_props`.

    `origin` says where the network comes from (teachers, student, method, licences): anything JSON can hold.
    `thresholds`, one for each label, make it a network for images of several labels. With `takes_pixels` its
    input is uint8 [batch, S, S, 3]: rendered images that are not to be normalised.
    """
    several = {
        METADATA_PREFIX + "task": MULTI_LABEL,
        METADATA_PREFIX + "thresholds": json.dumps([float(one) for one in thresholds or ()]),
    }
    return {
        **({} if thresholds is None else several),
        **({METADATA_PREFIX + "input": UINT8} if takes_pixels else {}),
        METADATA_PREFIX + "version": str(SCHEMA_VERSION),
        METADATA_PREFIX + "preprocessing": json.dumps(preprocessing.to_dict(), sort_keys=True),
        METADATA_PREFIX + "labels": json.dumps(list(labels), ensure_ascii=False),
        METADATA_PREFIX + "origin": json.dumps(dict(origin), sort_keys=True, ensure_ascii=False),
    }


_UNREADABLE = (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading JSON of another form than ours may raise: numbers too large and brackets too deep, too."""


def _labels(stated: Any) -> list[str]:
    """Raises ValueError where they are no list of texts, or an empty one."""
    if not isinstance(stated, list) or not stated or not all(isinstance(label, str) for label in stated):
        raise ValueError("labels must be strings")
    return stated


def _read_metadata(
    entries: Mapping[str, str], name: str, *, needed: bool
) -> tuple[Preprocessing | None, list[str], list[float] | None]:
    version = entries.get(METADATA_PREFIX + "version")
    if version is None:
        if needed:
            raise ArtifactError(f"{name} carries no questpress metadata: load the folder it came in instead")
        return None, [], None
    if version != str(SCHEMA_VERSION):
        raise ArtifactError(f"{name} is of version {version}; this runtime reads version {SCHEMA_VERSION}")
    try:
        preprocessing = Preprocessing.from_dict(json.loads(entries[METADATA_PREFIX + "preprocessing"]))
        labels = _labels(json.loads(entries[METADATA_PREFIX + "labels"]))
        stated = json.loads(entries.get(METADATA_PREFIX + "thresholds", "null"))
        thresholds = _thresholds({"task": entries.get(METADATA_PREFIX + "task"), "thresholds": stated})
    except _UNREADABLE as error:
        raise ArtifactError(f"the questpress metadata of {name} cannot be read: {error}") from error
    return preprocessing, labels, thresholds


def _thresholds(said: Mapping[str, Any]) -> list[float] | None:
    """Of a network for images of several labels; None of any other, and where nothing is said of a task.

    Raises ValueError where they are no probabilities, or the task is none that is known here.
    """
    task = said.get("task")
    if task is None:
        return None
    if task != MULTI_LABEL:
        raise ValueError(f"this runtime knows no task {task!r}")
    thresholds = said["thresholds"]
    numbers = isinstance(thresholds, list) and all(isinstance(one, int | float) for one in thresholds)
    if not numbers or not all(0 <= one <= 1 for one in thresholds):
        raise ValueError("thresholds must be probabilities")
    return [float(one) for one in thresholds]


def read_manifest(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The artifact folder at `path` (or in the run folder there) and its manifest, checked for what is needed
    here.

    Files aren't read: `read_verified` does that. Raises ArtifactError.
    """
    path = Path(path)
    folder = next((f for f in (path, path / "artifact") if (f / MANIFEST).is_file()), None)
    if folder is None:
        held = [f.name for f in sorted(path.glob("student*.onnx"))] if path.is_dir() else []
        if held:
            raise ArtifactError(
                f"{path} holds {held[0]} but no {MANIFEST} to it: copy the artifact folder anew"
            )
        problem = f"holds no {MANIFEST}" if path.is_dir() else "does not exist"
        raise ArtifactError(f"{path} {problem}: name a run folder, an artifact folder or an .onnx file")
    where = folder / MANIFEST
    try:
        if where.stat().st_size > LARGEST_MANIFEST:
            raise ValueError(f"no manifest has {where.stat().st_size:,} bytes")
        manifest = json.loads(where.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        if version != SCHEMA_VERSION or isinstance(version, bool | float):
            raise ArtifactError(
                f"{where} is of version {version!r}; this runtime reads version {SCHEMA_VERSION}"
            )
        stated = manifest.get("checksum", checksum(manifest))  # older ones have none
        if stated != checksum(manifest):
            raise ArtifactError(
                f"{where} was changed after it was written: its checksum is not that of its content; make "
                "the artifact anew, or take it from where it came"
            )
        Preprocessing.from_dict(manifest["preprocessing"])
        _labels(manifest["labels"])
        thresholds = _thresholds(manifest)
        if thresholds is not None and len(thresholds) != len(manifest["labels"]):
            raise ValueError("each label needs a threshold")
        for entry in manifest["files"]:
            if not isinstance(entry["name"], str) or Path(entry["name"]).name != entry["name"]:
                raise ValueError(f"a file may not be named {entry['name']!r}")
            int(entry["bytes"]), str(entry["sha256"]), str(entry["precision"])
            if not isinstance(entry.setdefault("target", None), str | None):
                raise ValueError(f"a file may not be for {entry['target']!r}")
    except _UNREADABLE as error:
        raise ArtifactError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
    return folder, manifest


def checksum(manifest: Mapping[str, Any]) -> str:
    """The sha256 of all that a manifest says beside its checksum, as JSON written the one way: keys in order,
    no spaces, ASCII.
    """
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _whole_file(path: Path) -> bytes:
    """A model file's bytes. Raises ArtifactError; a pipe or a device is not waited for."""
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path} cannot be read: it is not a file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > LARGEST_FILE:
                raise ArtifactError(f"{path} cannot be read: it is larger than 2 GB, which no ONNX file is")
            return file.read()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_verified(folder: Path, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file of the manifest, after checking its size and sha256. Raises ArtifactError."""
    path = folder / entry["name"]
    try:
        content = _whole_file(path)
    except ArtifactError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        fp32 = folder / "student.onnx"
        instead = f", or name the fp32 file, {fp32.name}" if fp32.is_file() else ""
        raise ArtifactError(
            f"{path} is missing, which {MANIFEST} names: copy the artifact folder anew{instead}"
        ) from error
    if len(content) != entry["bytes"]:
        raise ArtifactError(
            f"{path} is damaged: {len(content)} bytes where {MANIFEST} says {entry['bytes']}; "
            "copy the artifact folder anew"
        )
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ArtifactError(
            f"{path} is damaged: its sha256 is not the one {MANIFEST} names; copy the artifact folder anew"
        )
    return content


def _choose(
    files: Sequence[Mapping[str, Any]], folder: Path, name: str | None, precision: str
) -> Mapping[str, Any]:
    """The file named, or the first of the precision that is made for this processor; the fp32 file where
    int8 is for others alone."""
    here = target_of_this_machine()
    able = (here, "x86", None) if here == "x86-vnni" else (here, None)
    for target in able:
        for entry in files:
            of_precision = entry["precision"] == precision and entry["target"] == target
            if entry["name"] == name or (name is None and of_precision):
                return entry
    for entry in files:
        if name is None and precision == "int8" and entry["precision"] == "fp32":
            return entry
    held = ", ".join(f"{entry['name']} ({entry['precision']})" for entry in files) or "no file"
    wanted = name if name is not None else f"{precision} file"
    raise ArtifactError(f"{folder} holds no {wanted}: its manifest lists {held}")
