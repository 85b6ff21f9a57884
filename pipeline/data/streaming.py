"""Views of training images that workers read and decode on demand: for data that no cache can hold.

The same code decodes and crops as for cached images (``decode.Canonical``, ``render.render_views``), so on a
CPU the views are bit-identical.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...export.runtime import Preprocessing, Size, height_width, needed_size, render
from ..runs.cache import Cache
from .augment import apply_changes, to_device
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
from .render import LabeledViews, Pixels, prefetch, render_views
from .views import ViewPolicy
from .workers import Task, Workers

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
    """Decode every image once, to find unreadable images and the sizes of the others, which are cached."""

    def measure() -> Iterator[tuple[int, int] | str]:
        starts = range(0, len(images), MEASURE_BATCH)
        tasks = (partial(_measure, images[start : start + MEASURE_BATCH], canonical) for start in starts)
        for done, sizes in enumerate(workers.map(tasks), 1):
            yield from sizes
            if progress:
                progress(min(done * MEASURE_BATCH, len(images)), len(images))

    key = canonical_key(images, canonical)
    folder = cache.get("sizes", key) or cache.put("sizes", key, lambda path: write_sizes(path, measure()))
    sizes, reasons = read_sizes(folder)
    heights, widths = sizes.T.contiguous()
    return SizedImages(*skip_unreadable(images, reasons), canonical.window, heights, widths)


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
        also: Size | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the same as ``Views.batches``, computed ahead by the workers."""
        sizes = (self.size,) if also is None else (self.size, also)
        return prefetch(self._compute(plan, device, sizes), device)

    def _compute(
        self, plan: Iterable[tuple[Tensor, Tensor]], device: torch.device | str, sizes: tuple[Size, ...]
    ) -> Iterator[tuple[Tensor, ...]]:
        images, labels = self.images, deque[Tensor]()

        def tasks() -> Iterator[Task]:
            for indices, view_numbers in plan:
                drawn = self.draw(indices, view_numbers, images.heights, images.widths)
                labels.append(drawn.labels)
                batch = [images.images[index] for index in drawn.indices.tolist()]
                # As arrays, since torch would share the memory of small tensors at a cost.
                box, flips, changes = (t.numpy() for t in (drawn.box, drawn.flips, drawn.changes))
                mixes = None if drawn.mixes is None else drawn.mixes.numpy()
                yield partial(_crop, batch, self.canonical, self.policy, box, flips, changes, mixes, sizes)

        for packed in self.workers.map(tasks()):
            views, *more = _unpack(to_device(packed, device), sizes)
            yield views, to_device(labels.popleft(), device), *more


def rendered_batches(
    images: Sequence[Image], preprocessing: Preprocessing, workers: Workers, size: int
) -> Iterator[Tensor]:
    """Yield all images in order as the runtime renders them: uint8 [B, H, W, 3], B = ``size`` at a time."""
    starts = range(0, len(images), size)
    return workers.map(partial(_render, images[start : start + size], preprocessing) for start in starts)


# Tasks of the workers.


def _measure(images: Sequence[Image], canonical: Canonical) -> list[tuple[int, int] | str]:
    """Return sizes in canonical form (height, width), or reasons why images are unreadable."""
    return [
        read_pixels(image, lambda pixels: canonical.size(*pixels.shape[:2]), canonical.needed_size)
        for image in images
    ]


def _render(images: Sequence[Image], preprocessing: Preprocessing) -> Tensor:
    form, needed = partial(render, p=preprocessing), partial(needed_size, p=preprocessing)
    return torch.from_numpy(np.stack([require_pixels(image, form, needed) for image in images]))


def _crop(
    images: Sequence[Image],
    canonical: Canonical,
    policy: ViewPolicy,
    box: np.ndarray,
    flips: np.ndarray,
    changes: np.ndarray,
    mixes: np.ndarray | None,
    sizes: tuple[Size, ...],
) -> Tensor:
    """Return views of ``render.Drawn``, uint8 [B, ΣH·W, 3], packed for all sizes; decode each image once."""
    boxes, mirrored, first = torch.from_numpy(box), torch.from_numpy(flips), torch.zeros(1).long()
    packed = torch.empty(len(images), sum(_areas(sizes)), 3, dtype=torch.uint8)
    unpacked = _unpack(packed, sizes)
    for n, image in enumerate(images):
        data = torch.tensor(require_pixels(image, canonical.convert, canonical.needed_size))
        height, width = (torch.tensor([length]) for length in data.shape[:2])
        pixels = Pixels(data.view(-1, 3), first, height, width)
        for size, views in zip(sizes, unpacked, strict=True):
            views[n] = render_views(pixels, first, boxes[n : n + 1], mirrored[n : n + 1], size, policy)[0]
    mixed = None if mixes is None else torch.from_numpy(mixes)
    for views in unpacked:
        changed = apply_changes(views, policy, torch.from_numpy(changes), mixed)
        if changed is not views:
            views[: len(changed)] = changed
    return packed if mixes is None else packed[: len(mixes)].clone()


def _unpack(packed: Tensor, sizes: tuple[Size, ...]) -> list[Tensor]:
    """Split the result of ``_crop`` into views uint8 [B, 3, H, W] of each size."""
    parts = zip(packed.split(_areas(sizes), 1), sizes, strict=True)
    return [part.unflatten(1, height_width(size)).permute(0, 3, 1, 2) for part, size in parts]


def _areas(sizes: tuple[Size, ...]) -> list[int]:
    return [math.prod(height_width(size)) for size in sizes]
