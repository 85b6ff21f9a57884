"""Decode images once: into a canonical form for training, as the runtime renders them for evaluation.

Unreadable images are skipped and shown in the report's table "Skipped files"; too many of them stop a run.
"""

import base64
import hashlib
import inspect
import io
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import PIL
import torch
from PIL import ExifTags
from PIL import Image as PillowImage
from torch import Tensor

from ...export.runtime import (
    ImageError,
    NeededSize,
    Preprocessing,
    Size,
    allowed_cores,
    decode_image,
    height_width,
    needed_size,
    render,
    resized_size,
    suppress_pillow_warnings,
)
from ..errors import JobError, is_system_fault
from ..runs.cache import Cache
from ..runs.hashes import digest, sha256
from .boxes import Header, Window, place_boxes, shown_window
from .dataset import Image, ImageSet, Progress, Skipped, fail_to_read
from .render import Pixels, pack_pixels

T = TypeVar("T")
VERSION = 1

MAX_ASPECT = 4
"""Longer images are cropped, so that a panorama does not take the memory of hundreds of images."""

SAMPLE = 256
"""Approximate number of images whose headers are read to estimate sizes."""

MAX_UNREADABLE_FRACTION = 0.01
"""Fraction of all images that may be unreadable."""


@dataclass(frozen=True)
class Canonical:
    """The form in which a training image is kept: uint8 RGB, EXIF and color mode applied by the runtime.

    - ``fixed``, for small images (pad-and-crop) and those that are not cropped: ``side`` pixels, as
      ``runtime.render`` does for a test image by ``crop_mode``; a border has the color ``mean``.
    - ``short_side``, for photos (random-resized-crop): center-cropped to an aspect of at most 4:1, then
      reduced so that it still covers ``side``; never enlarged, the aspect kept to a pixel.

    ``filter`` is one of Pillow's, antialiased: 'bilinear', 'bicubic', 'lanczos'.
    """

    kind: Literal["fixed", "short_side"]
    side: Size
    filter: str = "bicubic"
    crop_mode: str = "center"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def convert(self, image: np.ndarray) -> np.ndarray:
        """Return an image, uint8 [H, W, 3], in this form."""
        if self.kind == "fixed":
            return render(image, Preprocessing.create(self.side, 1.0, self.filter, self.crop_mode, self.mean))
        height, width = image.shape[:2]
        tall, wide = self._limit_aspect(height, width)
        top, left = (height - tall) // 2, (width - wide) // 2
        image = np.ascontiguousarray(image[top : top + tall, left : left + wide])
        height, width = self.size(height, width)
        if (height, width) == (tall, wide):
            return image
        filter = PillowImage.Resampling[self.filter.upper()]
        return np.asarray(PillowImage.fromarray(image).resize((width, height), filter))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width in this form of an image of ``height`` × ``width`` pixels."""
        down, across = height_width(self.side)
        if self.kind == "fixed":
            return down, across
        tall, wide = self._limit_aspect(height, width)
        # The side that is shorter in proportion.
        target, short = (down, tall) if tall * across <= wide * down else (across, wide)
        if short <= target:
            return tall, wide
        return max(down, round(tall * target / short)), max(across, round(wide * target / short))

    def needed_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width at which an image may be decoded, see ``runtime.needed_size``."""
        if self.kind == "fixed":
            form = Preprocessing.create(self.side, 1.0, self.filter, self.crop_mode, self.mean)
            return needed_size(height, width, form)
        tall, wide = self._limit_aspect(height, width)
        new_tall, new_wide = self.size(height, width)
        return math.ceil(2 * height * new_tall / tall), math.ceil(2 * width * new_wide / wide)

    def window(self, height: int, width: int) -> Window:
        """Return what this form shows of an image of ``height`` × ``width`` pixels."""
        if self.kind == "fixed":
            form = Preprocessing.create(self.side, 1.0, self.filter, self.crop_mode, self.mean)
            return shown_window(height, width, form)
        tall, wide = self._limit_aspect(height, width)
        return (height - tall) // 2 / height, (width - wide) // 2 / width, tall / height, wide / width

    def _limit_aspect(self, height: int, width: int) -> tuple[int, int]:
        down, across = height_width(self.side)
        tallest = MAX_ASPECT * width * max(down, across) // across
        return min(height, tallest), min(width, MAX_ASPECT * height * max(down, across) // down)


@dataclass(frozen=True)
class ReadableImages:
    """The readable images of a split, labeled ones first, and the unreadable ones."""

    images: tuple[Image, ...]
    skipped: tuple[Skipped, ...]
    window: Callable[[int, int], Window]
    """Returns what is shown of an image of (height, width)."""

    @property
    def keys(self) -> Tensor:
        """int64 [N]: the first 63 bits of each content hash, from which views are drawn."""
        return torch.tensor([image.number for image in self.images], dtype=torch.int64)

    @property
    def labeled(self) -> tuple[Image, ...]:
        return tuple(image for image in self.images if image.is_labeled)

    @property
    def labels(self) -> Tensor:
        """Class numbers int64 [N] of the N labeled images of a classification set."""
        return torch.tensor([image.label for image in self.labeled], dtype=torch.int64)

    def targets(self, data: ImageSet) -> Tensor:
        """Return the labels of the N labeled ones of these images of ``data`` for training.

        Class numbers int64 [N]; for a multi-label set float32 [N, classes], 1 for each class of an image; for
        a detection set the boxes in what is shown, see ``boxes``.
        """
        labeled = self.labeled
        if data.task == "classification":
            return self.labels
        if data.task == "detection":
            sizes = [image.size or (1, 1) for image in labeled]
            return place_boxes([image.boxes or () for image in labeled], sizes, self.window)
        targets = torch.zeros(len(labeled), len(data.classes))
        for row, image in enumerate(labeled):
            targets[row, list(image.labels)] = 1
        return targets


@dataclass(frozen=True)
class DecodedImages(ReadableImages):
    """Readable images and their pixels: ``images[i]`` is ``pixels.image(i)``."""

    pixels: Pixels


def decode_images(
    images: Sequence[Image],
    canonical: Canonical,
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> DecodedImages:
    """Decode training images into their canonical form; memory-mapped if there is a cache."""
    key = canonical_key(images, canonical)
    return _decode_once(
        images, canonical.convert, canonical.needed_size, canonical.window, key, cache, progress
    )


def canonical_key(images: Sequence[Image], canonical: Canonical) -> str:
    """Return the cache key ``images/KEY`` of what ``decode_images`` returns."""
    return _key(images, {"canonical": asdict(canonical)})


def render_images(
    images: Sequence[Image],
    preprocessing: Preprocessing,
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> DecodedImages:
    """Render images from their files as the shipped runtime does, all of one size."""
    key = _key(images, {"rendered": asdict(preprocessing)})
    form, needed = partial(render, p=preprocessing), partial(needed_size, p=preprocessing)
    window = partial(shown_window, p=preprocessing)
    return _decode_once(images, form, needed, window, key, cache, progress)


def _key(images: Sequence[Image], form: dict[str, Any]) -> str:
    bits = sorted({image.gray_bits for image in images})
    keys = [image.key for image in images]
    return digest({"images": keys, "gray_bits": bits, **form, "decoder": decoder_version()})


def decoder_version() -> dict[str, Any]:
    """Return what the pixels depend on besides the files: the versions of this code and of Pillow."""
    runtime = [sha256(Path(inspect.getfile(step))) for step in (decode_image, render)]
    return {"version": VERSION, "runtime": runtime, "pillow": PIL.__version__}


def _decode_once(
    images: Sequence[Image],
    form: Callable[[np.ndarray], np.ndarray],
    needed: NeededSize,
    window: Callable[[int, int], Window],
    key: str,
    cache: Cache | None,
    progress: Progress | None,
) -> DecodedImages:
    def write(folder: Path) -> None:
        with (folder / "pixels.bin").open("wb") as file:
            write_sizes(
                folder, (_write(file, result) for result in decode_each(images, form, progress, needed))
            )

    if cache is None or not images:
        pixels, reasons = _collect(list(decode_each(images, form, progress, needed)))
    else:
        pixels, reasons = _read(cache.get("images", key) or cache.put("images", key, write))
    return DecodedImages(*skip_unreadable(images, reasons), window, pixels)


def decode_each(
    images: Sequence[Image],
    form: Callable[[np.ndarray], T],
    progress: Progress | None = None,
    needed: NeededSize | None = None,
) -> Iterator[T | str]:
    """Yield ``read_pixels`` of each image in order, computed by threads: Pillow releases the GIL.

    Few images are in memory at a time.
    """
    workers = allowed_cores()
    with ThreadPoolExecutor(workers) as threads:
        pending: deque[Any] = deque()
        try:
            for position, image in enumerate(images):
                pending.append(threads.submit(read_pixels, image, form, needed))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
                if progress:
                    progress(position + 1 - len(pending), len(images))
            while pending:
                yield pending.popleft().result()
                if progress:
                    progress(len(images) - len(pending), len(images))
        finally:
            threads.shutdown(cancel_futures=True)


def read_pixels(image: Image, form: Callable[[np.ndarray], T], needed: NeededSize | None = None) -> T | str:
    """Return ``form`` of an image's pixels (uint8 [H, W, 3]), or the reason why it is unreadable.

    A JPEG is decoded at the least fraction of its size that has the ``needed`` pixels.

    Raises:
        JobError: the image has changed since the data set was opened, or the machine cannot read it.
    """
    try:
        content = image.read()
        if isinstance(content, np.ndarray):
            return form(content)
        if hashlib.sha256(content).hexdigest() != image.key:
            raise JobError(f"{image.name} was changed during the run. Start the run again.")
        return form(decode_image(content, gray_bits=image.gray_bits, needed=needed))
    except ImageError as error:
        if is_system_fault(error.__cause__):
            raise fail_to_read(image.name, error.reason) from error
        return error.reason
    except (OSError, MemoryError) as error:
        raise fail_to_read(image.name, error) from error


def require_pixels(
    image: Image, form: Callable[[np.ndarray], np.ndarray], needed: NeededSize | None = None
) -> np.ndarray:
    """Return ``form`` of the pixels of an image that was readable before; otherwise raise JobError."""
    pixels = read_pixels(image, form, needed)
    if isinstance(pixels, str):
        raise JobError(f"{image.name} became unreadable during the run ({pixels}). Start the run again.")
    return pixels


def skip_unreadable(
    images: Sequence[Image], reasons: Mapping[int, str]
) -> tuple[tuple[Image, ...], tuple[Skipped, ...]]:
    """Separate the readable images from those that have a reason, given by position."""
    readable = tuple(image for position, image in enumerate(images) if position not in reasons)
    return readable, tuple(Skipped(images[n].name, reason, unreadable=True) for n, reason in reasons.items())


def check_unreadable(skipped: Sequence[Skipped], total: int) -> None:
    """Raise JobError if more than ``MAX_UNREADABLE_FRACTION`` of all images are skipped as unreadable."""
    unreadable = sorted((entry for entry in skipped if entry.unreadable), key=lambda entry: entry.name)
    if len(unreadable) <= MAX_UNREADABLE_FRACTION * total:
        return
    first = "; ".join(f"{entry.name} ({entry.reason})" for entry in unreadable[:5])
    more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    raise JobError(
        f"{len(unreadable)} of {total} images are unreadable, more than {MAX_UNREADABLE_FRACTION:.0%}: "
        f"{first}{more}. Repair or remove them."
    )


def _collect(results: list[np.ndarray | str]) -> tuple[Pixels, dict[int, str]]:
    reasons = {position: result for position, result in enumerate(results) if isinstance(result, str)}
    arrays = [result for result in results if not isinstance(result, str)]
    results.clear()
    sizes = torch.tensor([array.shape[:2] for array in arrays], dtype=torch.int64).reshape(-1, 2)
    data = torch.empty(int(sizes.prod(1).sum()), 3, dtype=torch.uint8)
    start = 0
    for position, array in enumerate(arrays):
        end = start + array.shape[0] * array.shape[1]
        data[start:end] = torch.tensor(array).view(-1, 3)
        arrays[position], start = np.empty(0), end  # freed, so that the data are in memory only once
    return pack_pixels(data, sizes), reasons


def _write(file: BinaryIO, result: np.ndarray | str) -> tuple[int, int] | str:
    if isinstance(result, str):
        return result
    file.write(np.ascontiguousarray(result).data)
    return result.shape[0], result.shape[1]


def write_sizes(folder: Path, results: Iterable[tuple[int, int] | str]) -> None:
    """Write the sizes (height, width) of readable images, and the reasons of unreadable ones."""
    sizes, reasons = [], {}
    for position, result in enumerate(results):
        if isinstance(result, str):
            reasons[position] = result
        else:
            sizes.append(result)
    np.save(folder / "sizes.npy", np.array(sizes, dtype=np.int64).reshape(-1, 2))
    (folder / "unreadable.json").write_text(json.dumps(list(reasons.items())), encoding="utf-8")


def read_sizes(folder: Path) -> tuple[Tensor, dict[int, str]]:
    """Read what ``write_sizes`` wrote: sizes int64 [N, 2], and reasons by position among all images."""
    sizes = torch.from_numpy(np.load(folder / "sizes.npy"))
    return sizes, dict(json.loads((folder / "unreadable.json").read_text(encoding="utf-8")))


def _read(folder: Path) -> tuple[Pixels, dict[int, str]]:
    sizes, reasons = read_sizes(folder)
    file = folder / "pixels.bin"
    # Copy on write: torch has no read-only tensors, and nothing may change the file.
    flat = np.memmap(file, dtype=np.uint8, mode="c") if file.stat().st_size else np.empty(0, dtype=np.uint8)
    return pack_pixels(torch.from_numpy(flat).view(-1, 3), sizes), reasons


def sample_sizes(images: Sequence[Image]) -> list[tuple[int, int]]:
    """Return height and width of about ``SAMPLE`` readable images, from their headers."""
    sizes = (_read_size(image) for image in images[:: max(1, len(images) // SAMPLE)])
    return [size for size in sizes if size is not None]


def shown_fractions(sizes: Sequence[tuple[int, int]], preprocessing: Preprocessing) -> list[float]:
    """Return the fraction of each image, of (height, width), that a network's input shows."""
    resized = (resized_size(height, width, preprocessing) for height, width in sizes)
    input_size = height_width(preprocessing.size)
    return [math.prod(map(min, size, input_size)) / math.prod(size) for size in resized]


def _read_size(image: Image) -> tuple[int, int] | None:
    header = read_header(image.source if isinstance(image.source, Path) else image.read())
    return header and header[:2]


def read_header(source: Path | bytes | np.ndarray) -> Header | None:
    """Return an image's upright size and its EXIF orientation; None if its header is unreadable."""
    if isinstance(source, np.ndarray):
        return Header(*source.shape[:2])
    try:
        file = source if isinstance(source, Path) else io.BytesIO(source)
        with suppress_pillow_warnings(), PillowImage.open(file) as header:
            has_exif = "exif" in header.info and header.format != "TIFF"  # whose size is upright
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1) if has_exif else 1
            size = (header.width, header.height) if orientation in (5, 6, 7, 8) else header.size[::-1]
            return Header(*size, orientation if orientation in (5, 6, 7, 8) else 1)
    except Exception:  # a damaged file makes Pillow raise almost anything; decoding reports it
        return None


def encode_thumbnail(image: np.ndarray, side: int) -> str:
    """Return an image uint8 [H, W, 3], its longer side resized to ``side``, as a base64-encoded PNG."""
    picture, buffer = PillowImage.fromarray(np.ascontiguousarray(image)), io.BytesIO()
    width, height = (max(1, round(length * side / max(picture.size))) for length in picture.size)
    picture.resize((width, height), PillowImage.Resampling.LANCZOS).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
