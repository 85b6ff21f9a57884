"""Training images that are decoded when they are wanted, by workers: for what no cache can hold.

The code that decodes and cuts is the one that decodes ahead (``decode.Canonical``, ``render.render_views``),
so on a CPU the views are equal to the bit.
"""

import math
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...export.runtime import Preprocessing, render
from ..errors import JobError
from ..runs.cache import Cache
from ..runs.device import free_memory
from .dataset import Image, Progress
from .decode import (
    Canonical,
    Pixels,
    Readable,
    canonical_key,
    pixels_or_reason,
    read_sizes,
    sampled_sizes,
    split_off,
    write_sizes,
)
from .render import colour_jittered, prefetch, render_views, to_device
from .views import ViewPolicy, boxes, jitter
from .workers import Workers

MEASURED_AT_ONCE = 64
"""Images of one task of the pass that finds sizes and unreadable images."""


@dataclass(frozen=True)
class Sized(Readable):
    """Readable images and their sizes in canonical form: int64 [N] each, in pixels."""

    heights: Tensor
    widths: Tensor


def measured(
    images: Sequence[Image],
    canonical: Canonical,
    workers: Workers,
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Sized:
    """Decode every image once, to know which cannot be read and how large the others are; a cache remembers.

    Raises:
        JobError: an image has changed since the data set was opened.
    """

    def results() -> Iterator[tuple[int, int] | str]:
        tasks = (
            Measure(tuple(images[start : start + MEASURED_AT_ONCE]), canonical)
            for start in range(0, len(images), MEASURED_AT_ONCE)
        )
        for done, found in enumerate(workers.map(tasks), 1):
            yield from found
            if progress:
                progress(min(done * MEASURED_AT_ONCE, len(images)), len(images))

    if cache is None:
        every = list(results())
        reasons = {position: found for position, found in enumerate(every) if isinstance(found, str)}
        known = [found for found in every if not isinstance(found, str)]
        sizes = torch.tensor(known, dtype=torch.int64).reshape(-1, 2)
    else:
        key = canonical_key(images, canonical)

        def write(folder: Path) -> None:
            write_sizes(folder, results())

        sizes, reasons = read_sizes(cache.get("sizes", key) or cache.put("sizes", key, write))
    return Sized(*split_off(images, reasons), sizes[:, 0].clone(), sizes[:, 1].clone())


@dataclass(frozen=True)
class StreamedViews:
    """As ``render.Views``, of images that no memory holds: workers read, decode and cut each batch."""

    images: Sized
    labels: Tensor
    keys: Tensor
    canonical: Canonical
    policy: ViewPolicy
    seed: int
    size: int
    workers: Workers

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self,
        indices: Tensor,
        view_numbers: Tensor,
        device: torch.device | str = "cpu",
        size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``Views.batch``; made in this process.

        Raises:
            JobError: an image can no longer be read.
        """
        size = size or self.size
        [views] = _apart(self._cut(indices, view_numbers, (size,))(), (size,))
        return to_device(views, device), to_device(self.labels[indices], device)

    def batches(
        self,
        plan: Iterable[tuple[Tensor, Tensor]],
        device: torch.device | str = "cpu",
        also: int | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """As ``Views.batches``; the workers are as many batches ahead as they have at hand.

        Raises:
            JobError: an image can no longer be read, or a worker died.
        """
        sizes = (self.size,) if also is None else (self.size, also)
        return prefetch(self._made(plan, device, sizes), device)

    def _made(
        self, plan: Iterable[tuple[Tensor, Tensor]], device: torch.device | str, sizes: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, ...]]:
        begun: deque[Tensor] = deque()

        def tasks() -> Iterator[Cut]:
            for indices, view_numbers in plan:
                begun.append(self.labels[indices])
                yield self._cut(indices, view_numbers, sizes)

        for together in self.workers.map(tasks()):
            views, *more = _apart(to_device(together, device), sizes)
            yield views, to_device(begun.popleft(), device), *more

    def _cut(self, indices: Tensor, view_numbers: Tensor, sizes: tuple[int, ...]) -> "Cut":
        keys, height, width = self.keys[indices], self.images.heights[indices], self.images.widths[indices]
        box, flips = boxes(self.policy, self.seed, keys, view_numbers, height, width)
        factors = jitter(self.policy, self.seed, keys, view_numbers) if self.policy.color_jitter else None
        return Cut(
            tuple(self.images.images[index] for index in indices.tolist()),
            self.canonical,
            self.policy,
            box.numpy(),
            flips.numpy(),
            None if factors is None else factors.numpy(),
            sizes,
        )


def _apart(together: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """What ``Cut`` gives as views uint8 [B, 3, S, S] of each size S."""
    parts = together.split([size**2 for size in sizes], 1)
    return [
        part.unflatten(1, (size, size)).permute(0, 3, 1, 2) for part, size in zip(parts, sizes, strict=True)
    ]


def rendered_batches(
    images: Sequence[Image], preprocessing: Preprocessing, workers: Workers, size: int
) -> Iterator[Tensor]:
    """All images, in order, as the runtime renders them: uint8 [B, S, S, 3] for B = ``size`` at a time.

    Raises:
        JobError: an image can no longer be read, or a worker died.
    """
    tasks = (
        Render(tuple(images[start : start + size]), preprocessing) for start in range(0, len(images), size)
    )
    return workers.map(tasks)


# ---------------------------------------------------------------------------------------------------------
# What workers do. Arrays, not tensors: torch would share their memory, which is dear for a few numbers.


@dataclass(frozen=True)
class Measure:
    """Sizes in canonical form (height, width), or why there is none."""

    images: tuple[Image, ...]
    canonical: Canonical

    def __call__(self) -> list[tuple[int, int] | str]:
        found = (pixels_or_reason(image, self.canonical.of) for image in self.images)
        return [one if isinstance(one, str) else (one.shape[0], one.shape[1]) for one in found]


@dataclass(frozen=True)
class Render:
    """uint8 [B, S, S, 3] as the runtime renders the images."""

    images: tuple[Image, ...]
    preprocessing: Preprocessing

    def __call__(self) -> Tensor:
        form = partial(render, p=self.preprocessing)
        return torch.from_numpy(
            np.stack([_readable(pixels_or_reason(one, form), one) for one in self.images])
        )


@dataclass(frozen=True)
class Cut:
    """Views uint8 [B, ΣS², 3], at each of the sizes S one after the other, from one decoding: crops ``box``
    int32 [B, 4], mirrored where ``flips``, with the factors of the colour jitter float32 [B, 3].
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
        together = torch.empty(len(self.images), sum(size**2 for size in self.sizes), 3, dtype=torch.uint8)
        for n, image in enumerate(self.images):
            pixels = torch.tensor(_readable(pixels_or_reason(image, self.canonical.of), image))
            height, width = (torch.tensor([length]) for length in pixels.shape[:2])
            alone = Pixels(pixels.view(-1, 3), first, height, width)
            for size, views in zip(self.sizes, _apart(together, self.sizes), strict=True):
                view = render_views(alone, first, box[n : n + 1], flips[n : n + 1], size, self.policy)
                views[n] = view[0]
        if self.factors is not None:
            for views in _apart(together, self.sizes):
                views.copy_(colour_jittered(views, torch.from_numpy(self.factors)))
        return together


def _readable(found: np.ndarray | str, image: Image) -> np.ndarray:
    if isinstance(found, str):
        raise JobError(f"{image.name} could be read when the job began and no longer can ({found}).")
    return found


Resident = Literal["device", "host", "workers"]

SHARE = 0.5
"""Of the device's free memory, the host's memory and the free disk at the cache: what pixels may take."""


def choose(
    images: Sequence[Image], canonical: Canonical, device: str, cache: Cache
) -> tuple[Resident, str | None]:
    """Where these images' canonical pixels go, and where that isn't the device, why."""
    needed = canonical_bytes(images, canonical)
    size = f"decoded they take about {_gigabytes(needed)}"
    disk = free_disk(cache.root)
    # What is in the cache already needs no room on its disk.
    if needed > SHARE * disk and not cache.has("images", canonical_key(images, canonical)):
        return "workers", f"{size}, more than half of the {_gigabytes(disk)} free at {cache.root}"
    memory = host_memory()
    # A mapped file need not fit into memory, but a GPU that shares the host's wants a copy of it there.
    there = memory if device == "mps" else free_memory(device)
    if needed <= SHARE * there:
        return "device", None
    if needed > SHARE * memory:
        return "workers", f"{size}, more than half of the {_gigabytes(memory)} of memory"
    return "host", f"{size}, more than half of the {_gigabytes(there)} free on {device}"


def canonical_bytes(images: Sequence[Image], canonical: Canonical) -> float:
    """Bytes of all images in canonical form, from the headers of some of them."""
    pixels = [math.prod(canonical.size(*size)) for size in sampled_sizes(images)]
    return 3 * len(images) * sum(pixels) / len(pixels) if pixels else 0.0


def host_memory() -> float:
    """Bytes of memory this process may have: what the machine has free, or its cgroup allows where that is
    less.
    """
    limit = math.inf
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1, as a container sees them
        try:
            limit = min(limit, int((Path("/sys/fs/cgroup") / file).read_text()))
        except (OSError, ValueError):  # there is none, or it says 'max'
            continue
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of the memory is taken as free
        if not hasattr(os, "sysconf"):
            return limit
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(limit, free)


def free_disk(folder: Path) -> float:
    """Bytes free where a folder is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
