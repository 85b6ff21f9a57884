"""Images decoded once: for training in one canonical form, for testing as the runtime renders them."""

import base64
import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import PIL
import torch
from PIL import Image as PillowImage
from torch import Tensor

from ...export import runtime
from ...export.runtime import (
    ImageError,
    Preprocessing,
    allowed_cores,
    decode_image,
    no_pillow_warnings,
    render,
)
from ..errors import JobError
from ..runs.cache import Cache
from ..runs.files import digest, sha256
from .dataset import Image, ImageSet, Progress, Skipped


@dataclass(frozen=True)
class Pixels:
    """N images in one buffer.

    ``data`` is uint8 [P, 3], the RGB pixels of all images row by row, one image after the other (possibly
    memory-mapped, possibly on an accelerator). ``offsets`` (in pixels), ``heights`` and ``widths`` are
    int64 [N] and stay on the host, since what is computed from them is small.
    """

    data: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def same_size(self) -> bool:
        return len(self) > 0 and bool(
            (self.heights == self.heights[0]).all() and (self.widths == self.widths[0]).all()
        )

    def image(self, index: int) -> Tensor:
        """A view of one image: uint8 [H, W, 3]."""
        start, height, width = (int(x[index]) for x in (self.offsets, self.heights, self.widths))
        return self.data[start : start + height * width].view(height, width, 3)

    def stacked(self) -> Tensor:
        """A view of all images: uint8 [N, H, W, 3]. Raises ValueError where sizes differ."""
        if not self.same_size:
            raise ValueError("only images of one size can be stacked")
        return self.data.view(len(self), int(self.heights[0]), int(self.widths[0]), 3)

    def to(self, device: torch.device | str) -> "Pixels":
        return replace(self, data=self.data.to(device))


def pack_pixels(data: Tensor, sizes: Tensor) -> Pixels:
    """Pixels from a buffer (uint8 [P, 3]) and the images' sizes (int64 [N, 2]: height, width)."""
    areas = sizes[:, 0] * sizes[:, 1]
    return Pixels(data, areas.cumsum(0) - areas, sizes[:, 0].clone(), sizes[:, 1].clone())


T = TypeVar("T")
VERSION = 1
# A panorama is cut to this aspect at its centre, so that one image cannot take the memory of hundreds.
LONGEST_ASPECT = 4


@dataclass(frozen=True)
class Canonical:
    """The form an image is kept in for training: uint8 RGB, EXIF and colour mode applied by the runtime.

    - ``square``, for small images (pad-and-crop): the short side is resized to ``side`` and the centre
      ``side`` × ``side`` cut out, both as ``runtime.render`` does it for a test image.
    - ``short_side``, for photos (random-resized-crop): cut at the centre to an aspect of at most 4:1, then
      reduced so that the short side is at most ``side``; never enlarged, the aspect kept to a pixel.

    ``side`` in pixels; ``filter`` is one of Pillow's, antialiased: 'bilinear', 'bicubic', 'lanczos'.
    """

    kind: Literal["square", "short_side"]
    side: int
    filter: str = "bicubic"

    def of(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] of any size in this form."""
        if self.kind == "square":
            return render(image, Preprocessing.of(self.side, crop_fraction=1.0, interpolation=self.filter))
        height, width = image.shape[:2]
        tall, wide = _cut(height, width)
        top, left = (height - tall) // 2, (width - wide) // 2
        image = np.ascontiguousarray(image[top : top + tall, left : left + wide])
        height, width = self.size(height, width)
        if (height, width) == (tall, wide):
            return image
        reduced = PillowImage.fromarray(image).resize(
            (width, height), PillowImage.Resampling[self.filter.upper()]
        )
        return np.asarray(reduced)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in this form of an image of ``height`` × ``width`` pixels."""
        if self.kind == "square":
            return self.side, self.side
        tall, wide = _cut(height, width)
        short = min(tall, wide)
        if short <= self.side:
            return tall, wide
        tall, wide = (max(self.side, round(length * self.side / short)) for length in (tall, wide))
        return tall, wide


def _cut(height: int, width: int) -> tuple[int, int]:
    return min(height, LONGEST_ASPECT * width), min(width, LONGEST_ASPECT * height)


@dataclass(frozen=True)
class ReadableImages:
    """The readable images of a role, and those that were not."""

    images: tuple[Image, ...]
    skipped: tuple[Skipped, ...]

    @property
    def labels(self) -> Tensor:
        """int64 [N], of a single-label set."""
        return torch.tensor([image.label for image in self.images], dtype=torch.int64)

    def targets(self, data: ImageSet) -> Tensor:
        """What is learned of these images of ``data``: their class numbers int64 [N], or in a multi-label set
        1 for each of their classes and 0 for the others, float32 [N, classes].
        """
        if data.task == "classification":
            return self.labels
        targets = torch.zeros(len(self.images), len(data.classes))
        for row, image in enumerate(self.images):
            targets[row, list(image.labels)] = 1
        return targets

    @property
    def keys(self) -> Tensor:
        """int64 [N]: the first 63 bits of each content hash, which views are drawn from."""
        return torch.tensor([image.number for image in self.images], dtype=torch.int64)


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
    workers: int | None = None,
) -> DecodedImages:
    """Training images in their canonical form; memory-mapped where a cache keeps them.

    Raises:
        JobError: an image has changed since the data set was opened.
    """
    return _each_once(images, canonical.of, {"canonical": asdict(canonical)}, cache, progress, workers)


def canonical_key(images: Sequence[Image], canonical: Canonical) -> str:
    """The hash of what ``decode`` makes of these images: its entry ``images/KEY`` in the cache."""
    return _key(images, {"canonical": asdict(canonical)})


def render_images(
    images: Sequence[Image],
    preprocessing: Preprocessing,
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> DecodedImages:
    """Images as the shipped runtime renders them, from the original file: all S × S, so that
    ``pixels.stacked()`` is uint8 [N, S, S, 3].

    Raises:
        JobError: an image has changed since the data set was opened.
    """
    how = {"rendered": asdict(preprocessing)}
    return _each_once(images, lambda image: render(image, preprocessing), how, cache, progress, workers)


def check_unreadable(skipped: Sequence[Skipped], total: int, limit: float = 0.01) -> None:
    """Let a few unreadable images pass, but not many.

    ``skipped`` may hold other things left out; only unreadable images count. ``total`` counts all images,
    readable or not.

    Raises:
        JobError: more than ``limit`` of all images are unreadable; names the first five.
    """
    unreadable = sorted((one for one in skipped if one.unreadable), key=lambda one: one.name)
    if len(unreadable) <= limit * total:
        return
    first = "; ".join(f"{one.name} ({one.reason})" for one in unreadable[:5])
    more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    raise JobError(
        f"{len(unreadable)} of {total} images cannot be read, more than the {limit:.0%} that may be skipped: "
        f"{first}{more}; repair or remove them."
    )


def _each_once(
    images: Sequence[Image],
    form: Callable[[np.ndarray], np.ndarray],
    how: dict[str, Any],
    cache: Cache | None,
    progress: Progress | None,
    workers: int | None,
) -> DecodedImages:
    def results() -> Iterator[np.ndarray | str]:
        return decode_each(images, form, progress, workers)

    if cache is None or not images:
        return _kept(images, *_in_memory(list(results())))
    key = _key(images, how)
    entry = cache.get("images", key) or cache.put("images", key, lambda folder: _write(folder, results()))
    return _kept(images, *_load(entry))


def _key(images: Sequence[Image], how: dict[str, Any]) -> str:
    return digest({"images": [image.key for image in images], **how, "decoder": decoder_version()})


def decoder_version() -> dict[str, Any]:
    """What the pixels depend on besides the files: our code here, the runtime's, and Pillow's."""
    return {"version": VERSION, "runtime": sha256(Path(runtime.__file__)), "pillow": PIL.__version__}


def decode_each(
    images: Sequence[Image],
    form: Callable[[np.ndarray], T],
    progress: Progress | None = None,
    workers: int | None = None,
) -> Iterator[T | str]:
    """What ``form`` makes of each image's pixels, in their order, or why there are none.

    Few images are in memory at a time. Pillow works outside Python's lock: threads do.

    Raises:
        JobError: an image has changed since the data set was opened.
    """
    workers = workers or allowed_cores()

    # Few enough at a time that big photos don't fill the memory.
    with ThreadPoolExecutor(workers) as threads:
        waiting: deque[Any] = deque()
        try:
            for position, image in enumerate(images):
                waiting.append(threads.submit(read_pixels, image, form))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
                if progress:
                    progress(position + 1 - len(waiting), len(images))
            while waiting:
                yield waiting.popleft().result()
                if progress:
                    progress(len(images) - len(waiting), len(images))
        finally:
            threads.shutdown(cancel_futures=True)


def read_pixels(image: Image, form: Callable[[np.ndarray], T]) -> T | str:
    """An image's pixels in a form, or why there are none.

    Raises:
        JobError: the image has changed since the data set was opened.
    """
    try:
        return form(_original(image))
    except ImageError as error:
        return str(error).partition(": ")[2] or str(error)
    except OSError as error:
        return f"could not be read: {error.strerror or error}"


def _original(image: Image) -> np.ndarray:
    content = image.read()
    if isinstance(content, np.ndarray):
        return content
    if hashlib.sha256(content).hexdigest() != image.key:
        raise JobError(f"{image.name} has changed since the job started; start it again.")
    return decode_image(content)


def _in_memory(results: list[np.ndarray | str]) -> tuple[Pixels, dict[int, str]]:
    reasons = {position: result for position, result in enumerate(results) if isinstance(result, str)}
    arrays = [result for result in results if not isinstance(result, str)]
    results.clear()
    sizes = torch.tensor([array.shape[:2] for array in arrays], dtype=torch.int64).reshape(-1, 2)
    data = torch.empty(int(sizes.prod(1).sum()), 3, dtype=torch.uint8)
    start = 0
    for position, array in enumerate(arrays):
        end = start + array.shape[0] * array.shape[1]
        data[start:end] = torch.tensor(array).view(-1, 3)
        arrays[position], start = np.empty(0), end  # gone as it is copied: the set is in memory once
    return pack_pixels(data, sizes), reasons


def _write(folder: Path, results: Iterator[np.ndarray | str]) -> None:
    def sizes() -> Iterator[tuple[int, int] | str]:
        for result in results:
            if isinstance(result, str):
                yield result
            else:
                file.write(np.ascontiguousarray(result).data)
                yield result.shape[0], result.shape[1]

    with (folder / "pixels.bin").open("wb") as file:
        write_sizes(folder, sizes())


def write_sizes(folder: Path, results: Iterable[tuple[int, int] | str]) -> None:
    """Write the sizes (height, width) of the readable images and why the others are not."""
    sizes, reasons = [], {}
    for position, result in enumerate(results):
        if isinstance(result, str):
            reasons[position] = result
        else:
            sizes.append(result)
    np.save(folder / "sizes.npy", np.array(sizes, dtype=np.int64).reshape(-1, 2))
    (folder / "unreadable.json").write_text(json.dumps(list(reasons.items())), encoding="utf-8")


def read_sizes(entry: Path) -> tuple[Tensor, dict[int, str]]:
    """What ``write_sizes`` wrote: int64 [N, 2], and the reasons by position among all images."""
    sizes = torch.from_numpy(np.load(entry / "sizes.npy"))
    return sizes, dict(json.loads((entry / "unreadable.json").read_text(encoding="utf-8")))


def _load(entry: Path) -> tuple[Pixels, dict[int, str]]:
    sizes, reasons = read_sizes(entry)
    file = entry / "pixels.bin"
    # Copy on write: torch knows no read-only tensors, and nothing must ever change the file.
    flat = np.memmap(file, dtype=np.uint8, mode="c") if file.stat().st_size else np.empty(0, dtype=np.uint8)
    return pack_pixels(torch.from_numpy(flat).view(-1, 3), sizes), reasons


def _kept(images: Sequence[Image], pixels: Pixels, reasons: dict[int, str]) -> DecodedImages:
    return DecodedImages(*separate_unreadable(images, reasons), pixels)


def separate_unreadable(
    images: Sequence[Image], reasons: dict[int, str]
) -> tuple[tuple[Image, ...], tuple[Skipped, ...]]:
    """The readable images, and those that ``reasons`` (by position) says are not."""
    kept = tuple(image for position, image in enumerate(images) if position not in reasons)
    skipped = tuple(
        Skipped(images[position].name, reason, unreadable=True) for position, reason in reasons.items()
    )
    return kept, skipped


SAMPLE = 256
"""Images whose headers are read, evenly spread."""


def sample_sizes(images: Sequence[Image]) -> list[tuple[int, int]]:
    """Height and width of about ``SAMPLE`` of the images, or of all where they are fewer; what cannot be read
    is left out, since decoding will tell of it.
    """
    sizes = (_size(image) for image in images[:: max(1, len(images) // SAMPLE)])
    return [size for size in sizes if size is not None]


def _size(image: Image) -> tuple[int, int] | None:
    try:
        content = image.read()
        if not isinstance(content, bytes):
            return content.shape[0], content.shape[1]
        with no_pillow_warnings(), PillowImage.open(io.BytesIO(content)) as header:
            return header.height, header.width
    except Exception:  # a damaged file makes Pillow raise nearly anything; decoding will tell of it
        return None


def encode_thumbnail(image: np.ndarray, side: int) -> str:
    """Return an image uint8 [H, W, 3], resized to ``side`` × ``side`` pixels, as a base64-encoded PNG."""
    small = PillowImage.fromarray(np.ascontiguousarray(image)).resize((side, side), PillowImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
