"""The images of a run: training views, and each split as the runtime renders it for a network.

Decoded training images are kept in GPU memory, in host memory, or decoded on demand by workers.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ...export.runtime import Preprocessing, Size, height_width, make_size
from ...models.build import resolve
from ..config.network import NetworkSpec
from ..config.options import Options
from ..errors import JobError
from ..runs.cache import Cache
from ..runs.device import free_memory
from .dataset import SPLITS, Image, ImageSet, Placement, Split
from .decode import (
    Canonical,
    DecodedImages,
    ReadableImages,
    canonical_key,
    check_unreadable,
    decode_images,
    decoder_version,
    render_images,
    sample_sizes,
)
from .render import Views
from .streaming import SizedImages, StreamedViews, measure_images, rendered_batches
from .views import ViewPolicy
from .workers import Workers, worker_count

R = TypeVar("R", bound=ReadableImages)

MAX_FRACTION = 0.5
"""Fraction of free device memory, host memory or disk that decoded images may take."""

CANONICAL_SCALE = 1.5
"""Photos are kept with a short side of this many times the image size: room for random-resized-crops."""

BATCH = 128
"""Images of a batch without gradients."""


@dataclass
class TrainingData:
    """A dataset, decoded and rendered when it is first needed.

    ``show`` is called with (work, images done, images) while images are decoded. ``place`` decides on the
    placement of the training images, from the one that they fit in and the reason why it is not the device.
    """

    options: Options
    dataset: ImageSet
    cache: Cache
    device: str
    show: Callable[[str, int, int], None]
    place: Callable[[Placement, str | None], Placement] = lambda placement, _: placement
    skipped_names: frozenset[str] | None = None
    """Names of all files that the run has recorded as skipped; None before that."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    @property
    def image_size(self) -> Size:
        """Pixels of the views, and of the teachers' input."""
        assert self.options.image_size is not None
        return self.options.image_size

    @cached_property
    def policy(self) -> ViewPolicy:
        """How views are drawn."""
        o = self.options
        height, width = height_width(self.image_size)
        changes: dict[str, Any] = {
            "aspect": width / height,
            "flip": bool(o.flip),
            "color_jitter": o.color_jitter or 0.0,
            "randaugment": (o.randaugment[0], o.randaugment[1]) if o.randaugment else None,
            "erasing": o.erasing,
            "mixup": o.mixup,
            "cutmix": o.cutmix,
        }
        if o.crop == "pad":
            assert o.pad is not None and o.pad_mode is not None
            # A resized image that is larger than the crop leaves room to shift, besides the padding.
            changes |= {"side": self._student_preprocessing.resize, "crop": self.image_size}
            return ViewPolicy("pad_crop", pad=o.pad, mode=o.pad_mode, **changes)
        if o.crop == "resized":
            assert o.crop_scale is not None
            return ViewPolicy("resized_crop", scale=(o.crop_scale, 1.0), **changes)
        return ViewPolicy("center", **changes)

    @property
    def _student_preprocessing(self) -> Preprocessing:
        """The student's preprocessing at the size of the views."""
        student = resolve(self.options.student)
        spec = NetworkSpec(student, self.image_size, len(self.classes), "", resize=self.options.resize)
        return spec.preprocessing

    @cached_property
    def canonical(self) -> Canonical:
        """The form of training images from which views are cropped."""
        p = self._student_preprocessing
        height, width = (round(CANONICAL_SCALE * side) for side in height_width(self.image_size))
        side = self.policy.side if self.policy.kind == "pad_crop" else make_size(height, width)
        if self.options.resize in ("squash", "pad") or p.crop_mode == "border":
            return Canonical("fixed", side, p.interpolation, p.crop_mode, p.mean)
        return Canonical("fixed" if self.policy.kind == "pad_crop" else "short_side", side, p.interpolation)

    @property
    def form(self) -> dict[str, Any]:
        """All that a view's pixels depend on, besides the image and the view policy."""
        bits = self.dataset.gray_bits
        return {"canonical": asdict(self.canonical), "gray_bits": bits, "decoder": decoder_version()}

    @cached_property
    def placement(self) -> Placement:
        """Where training images are kept: as requested, or the first of the three that they fit in."""
        if self.options.resident != "auto":
            return self.options.resident
        return self.place(*choose_placement(self.dataset.learned, self.canonical, self.device, self.cache))

    @cached_property
    def workers(self) -> Workers:
        """The processes that decode images on the fly."""
        return Workers(worker_count(self.device), self.device)

    @cached_property
    def train(self) -> ReadableImages:
        """The readable training images, those without labels last.

        With their pixels, or with their sizes if workers decode them.
        """
        images = self.dataset.learned
        if self.placement == "workers":
            show = partial(self.show, "checking train")
            sized = measure_images(images, self.canonical, self.workers, cache=self.cache, progress=show)
            return self.check_kept(images, sized)
        show = partial(self.show, "decoding train")
        decoded = decode_images(images, self.canonical, cache=self.cache, progress=show)
        return self.check_kept(images, decoded)

    @cached_property
    def _views(self) -> Views | StreamedViews:
        train = self.train
        drawn = (train.targets(self.dataset), train.keys, self.policy, self.options.seed, self.image_size)
        if isinstance(train, SizedImages):
            return StreamedViews(*drawn, train, self.canonical, self.workers)
        assert isinstance(train, DecodedImages)
        pixels, free = train.pixels, free_memory(self.device)
        if self.placement == "device":
            if pixels.data.nbytes > free:
                raise JobError(
                    f"--resident device: the training images take {_gigabytes(pixels.data.nbytes)} and "
                    f"{self.device} has {_gigabytes(free)} free. Use --resident host."
                )
            pixels = pixels.to(self.device)
        return Views(*drawn, pixels)

    def views(self, seed: int, size: Size) -> Views | StreamedViews:
        """Return views of the training images, at ``size``, drawn with ``seed``.

        Raises:
            JobError: the images do not fit into the memory of the device.
        """
        return replace(self._views, seed=seed, size=size)

    def rendered(
        self, split: Split, spec: NetworkSpec, limit: int | None = None
    ) -> tuple[Tensor, Tensor, DecodedImages]:
        """Return a split as the runtime renders it for a network: uint8 [N,H,W,3], labels and images.

        At most ``limit`` images are taken, evenly over the classes.
        """
        images = self.dataset.split(split)
        chosen = images[:: max(1, math.ceil(len(images) / limit))] if limit else images
        pixels, decoded = self._render(chosen, spec, split)
        return pixels, decoded.targets(self.dataset), decoded

    def _render(
        self, images: Sequence[Image], spec: NetworkSpec, split: Split
    ) -> tuple[Tensor, DecodedImages]:
        show = partial(self.show, f"rendering {split}")
        decoded = render_images(images, spec.preprocessing, cache=self.cache, progress=show)
        self.check_kept(images, decoded)
        return decoded.pixels.data.view(len(decoded.images), *height_width(spec.image_size), 3), decoded

    def rendered_train(self, spec: NetworkSpec) -> Iterator[tuple[int, Tensor]]:
        """Yield training images as ``rendered`` does: (index of the first, uint8 [B,3,H,W] on the device).

        Those without labels are last. If workers decode them, they are neither kept in memory nor written to
        the cache.
        """
        if self.placement == "workers":
            batches = rendered_batches(self.train.images, spec.preprocessing, self.workers, BATCH)
        else:
            batches = iter(self._render(self.dataset.learned, spec, "train")[0].split(BATCH))
        for number, pixels in enumerate(batches):
            yield number * BATCH, pixels.to(self.device).permute(0, 3, 1, 2)

    def check_kept(self, images: Sequence[Image], decoded: R) -> R:
        """Return ``decoded`` if it skips the same ``images`` as the run has recorded.

        Raises:
            JobError: an image is now readable or unreadable that was not before.
        """
        if self.skipped_names is None:
            return decoded
        skipped = {file.name: file.reason for file in decoded.skipped}
        for image in images:
            if (image.name in skipped) != (image.name in self.skipped_names):
                now = f"unreadable ({skipped[image.name]})" if image.name in skipped else "readable"
                raise JobError(
                    f"{image.name} is {now}, which it was not when this run was started, so its stages would "
                    "use different images. Restore the file and the packages, or start over with --fresh."
                )
        return decoded

    def readable(self, spec: NetworkSpec) -> ImageSet:
        """Return the dataset without the images that cannot be decoded; they are among its skipped files.

        Every later decoding must skip the same images.

        Raises:
            JobError: more than one image in a hundred cannot be decoded.
        """
        train = self.train
        val, test = (self.rendered(split, spec)[2] for split in SPLITS[1:])
        skipped = (*self.dataset.skipped, *train.skipped, *val.skipped, *test.skipped)
        total = len(self.dataset) + len(self.dataset.unlabeled)
        check_unreadable(skipped, total + sum(file.unreadable for file in self.dataset.skipped))
        self.skipped_names = frozenset(file.name for file in skipped)
        labeled = train.labeled
        return replace(
            self.dataset,
            train=labeled,
            val=val.images,
            test=test.images,
            unlabeled=train.images[len(labeled) :],
            skipped=skipped,
        )


def choose_placement(
    images: Sequence[Image], canonical: Canonical, device: str, cache: Cache
) -> tuple[Placement, str | None]:
    """Return where the images' canonical pixels are kept, and the reason unless it is the device."""
    needed = canonical_bytes(images, canonical)
    size = f"decoded they take about {_gigabytes(needed)}"
    disk = free_disk(cache.root)
    # Images that are in the cache already need no further disk space.
    if needed > MAX_FRACTION * disk and not cache.has("images", canonical_key(images, canonical)):
        return "workers", f"{size}, more than half of the {_gigabytes(disk)} free at {cache.root}"
    memory = host_memory()
    # A memory-mapped file need not fit in memory, but a copy for a GPU that shares the host's memory must.
    available = memory if device == "mps" else free_memory(device)
    if needed <= MAX_FRACTION * available:
        return "device", None
    if needed > MAX_FRACTION * memory:
        return "workers", f"{size}, more than half of the {_gigabytes(memory)} of memory"
    return "host", f"{size}, more than half of the {_gigabytes(available)} free on {device}"


def canonical_bytes(images: Sequence[Image], canonical: Canonical) -> float:
    """Estimate the bytes of all images in canonical form from the headers of some of them."""
    pixels = [math.prod(canonical.size(*size)) for size in sample_sizes(images)]
    return 3 * len(images) * sum(pixels) / len(pixels) if pixels else 0.0


def host_memory() -> float:
    """Return the bytes of memory available to this process: free memory, or its cgroup's limit if lower."""
    limit = math.inf
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1, as seen by a container
        try:
            limit = min(limit, int((Path("/sys/fs/cgroup") / file).read_text()))
        except (OSError, ValueError):  # missing, or 'max'
            continue
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: assume that half of the memory is free
        if not hasattr(os, "sysconf"):
            return limit
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(limit, free)


def free_disk(folder: Path) -> float:
    """Return the free bytes at a folder that may not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
