"""Views of training images that workers read and decode on demand: for data that no cache can hold.

The same code decodes and crops as for cached images (``decode.Canonical``, ``render.render_views``), so on a
CPU the views are bit-identical.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...export.runtime import Preprocessing, render
from ..runs.cache import Cache
from .dataset import Image, Progress
from .decode import (
    Canonical,
    ReadableImages,
    canonical_key,
    read_pixels,
    read_sizes,
    require_pixels,
    skip_unreadable,
    write_sizes,
)
from .render import LabeledViews, Pixels, jitter_colors, prefetch, render_views, to_device
from .views import ViewPolicy
from .workers import Workers

MEASURE_BATCH = 64
"""Images per task of the pass that measures sizes."""


@dataclass(frozen=True)
class SizedImages(ReadableImages):
    """Readable images and their sizes in canonical form, int64 [N] each, in pixels."""

    heights: Tensor
    widths: Tensor


def measure_images(
    images: Sequence[Image],
    canonical: Canonical,
    workers: Workers,
    cache: Cache,
    progress: Progress | None = None,
) -> SizedImages:
    """Decode every image once, to find unreadable images and the sizes of the others, which are cached.

    Raises:
        JobError: an image has changed since the data set was opened.
    """

    def measure() -> Iterator[tuple[int, int] | str]:
        tasks = (
            MeasureTask(tuple(images[start : start + MEASURE_BATCH]), canonical)
            for start in range(0, len(images), MEASURE_BATCH)
        )
        for done, sizes in enumerate(workers.map(tasks), 1):
            yield from sizes
            if progress:
                progress(min(done * MEASURE_BATCH, len(images)), len(images))

    def write(folder: Path) -> None:
        write_sizes(folder, measure())

    key = canonical_key(images, canonical)
    sizes, reasons = read_sizes(cache.get("sizes", key) or cache.put("sizes", key, write))
    return SizedImages(*skip_unreadable(images, reasons), sizes[:, 0].clone(), sizes[:, 1].clone())


@dataclass(frozen=True)
class StreamedViews(LabeledViews):
    """Views of images that workers read, decode and crop for each batch."""

    images: SizedImages
    canonical: Canonical
    workers: Workers

    def batches(
        self,
        plan: Iterable[tuple[Tensor, Tensor]],
        device: torch.device | str = "cpu",
        also: int | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the same as ``Views.batches``, computed ahead by the workers.

        Raises:
            JobError: an image can no longer be read, or a worker died.
        """
        sizes = (self.size,) if also is None else (self.size, also)
        return prefetch(self._compute(plan, device, sizes), device)

    def _compute(
        self, plan: Iterable[tuple[Tensor, Tensor]], device: torch.device | str, sizes: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, ...]]:
        labels: deque[Tensor] = deque()

        def tasks() -> Iterator[ViewTask]:
            for indices, view_numbers in plan:
                labels.append(self.labels[indices])
                yield self._task(indices, view_numbers, sizes)

        for packed in self.workers.map(tasks()):
            views, *more = _unpack(to_device(packed, device), sizes)
            yield views, to_device(labels.popleft(), device), *more

    def _task(self, indices: Tensor, view_numbers: Tensor, sizes: tuple[int, ...]) -> "ViewTask":
        box, flips, factors = self.draw(indices, view_numbers, self.images.heights, self.images.widths)
        images = tuple(self.images.images[index] for index in indices.tolist())
        arrays = box.numpy(), flips.numpy(), None if factors is None else factors.numpy()
        return ViewTask(images, self.canonical, self.policy, *arrays, sizes)


def _unpack(packed: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Split the result of a ``ViewTask`` into views uint8 [B, 3, S, S] of each size S."""
    parts = packed.split([size**2 for size in sizes], 1)
    return [
        part.unflatten(1, (size, size)).permute(0, 3, 1, 2) for part, size in zip(parts, sizes, strict=True)
    ]


def rendered_batches(
    images: Sequence[Image], preprocessing: Preprocessing, workers: Workers, size: int
) -> Iterator[Tensor]:
    """Yield all images in order as the runtime renders them: uint8 [B, S, S, 3], B = ``size`` at a time.

    Raises:
        JobError: an image can no longer be read, or a worker died.
    """
    tasks = (
        RenderTask(tuple(images[start : start + size]), preprocessing)
        for start in range(0, len(images), size)
    )
    return workers.map(tasks)


# Tasks of the workers. They hold numpy arrays, since torch would share the memory of small tensors at a cost.


@dataclass(frozen=True)
class MeasureTask:
    """Sizes in canonical form (height, width), or reasons why images are unreadable."""

    images: tuple[Image, ...]
    canonical: Canonical

    def __call__(self) -> list[tuple[int, int] | str]:
        return [
            read_pixels(image, lambda pixels: self.canonical.size(*pixels.shape[:2])) for image in self.images
        ]


@dataclass(frozen=True)
class RenderTask:
    """Images as the runtime renders them: uint8 [B, S, S, 3]."""

    images: tuple[Image, ...]
    preprocessing: Preprocessing

    def __call__(self) -> Tensor:
        form = partial(render, p=self.preprocessing)
        return torch.from_numpy(np.stack([require_pixels(image, form) for image in self.images]))


@dataclass(frozen=True)
class ViewTask:
    """Views uint8 [B, ΣS², 3], packed for all sizes S, from one decoding of each image.

    ``box`` is int32 [B, 4], ``flips`` bool [B], ``factors`` of the color jitter float32 [B, 3].
    """

    images: tuple[Image, ...]
    canonical: Canonical
    policy: ViewPolicy
    box: np.ndarray
    flips: np.ndarray
    factors: np.ndarray | None
    sizes: tuple[int, ...]

    def __call__(self) -> Tensor:
        box, flips, first = torch.from_numpy(self.box), torch.from_numpy(self.flips), torch.zeros(1).long()
        packed = torch.empty(len(self.images), sum(size**2 for size in self.sizes), 3, dtype=torch.uint8)
        unpacked = _unpack(packed, self.sizes)
        for n, image in enumerate(self.images):
            data = torch.tensor(require_pixels(image, self.canonical.convert))
            height, width = (torch.tensor([length]) for length in data.shape[:2])
            pixels = Pixels(data.view(-1, 3), first, height, width)
            for size, views in zip(self.sizes, unpacked, strict=True):
                view = render_views(pixels, first, box[n : n + 1], flips[n : n + 1], size, self.policy)
                views[n] = view[0]
        if self.factors is not None:
            for views in unpacked:
                views.copy_(jitter_colors(views, torch.from_numpy(self.factors)))
        return packed
