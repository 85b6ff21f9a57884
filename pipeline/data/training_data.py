"""The images of a run: training views, and each split as the runtime renders it for a network."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...export.runtime import Preprocessing
from ...models.names import resolve
from ..config.network import NetworkSpec
from ..config.options import Options
from ..errors import JobError
from ..runs.cache import Cache
from ..runs.device import free_memory
from .dataset import SPLITS, ImageSet, Progress, Split
from .decode import Canonical, DecodedImages, ReadableImages, decode_images, decoder_version, render_images
from .placement import Placement, choose_placement
from .render import Views
from .streaming import SizedImages, StreamedViews, measure_images, rendered_batches
from .unreadable import check_unreadable
from .views import ViewPolicy
from .workers import Workers, worker_count

CANONICAL_SCALE = 1.5
"""Photos are kept with a short side of this many times the image size: room for random-resized-crops."""

BATCH = 128
"""Images of a batch without gradients."""


@dataclass
class TrainingData:
    """A dataset, decoded and rendered when it is first needed.

    Args:
        options: resolved.
        show: called with (work, images done, images) while images are decoded.
        place: decides on the placement of the training images, given the one that they fit in and the reason
            why it is not the device.
    """

    options: Options
    dataset: ImageSet
    cache: Cache
    device: str
    show: Callable[[str, int, int], None]
    place: Callable[[Placement, str | None], Placement] = lambda placement, _: placement

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    @property
    def image_size(self) -> int:
        """Side in pixels of the views, and of the teachers' input."""
        assert self.options.image_size is not None
        return self.options.image_size

    @cached_property
    def policy(self) -> ViewPolicy:
        """How views are drawn."""
        o = self.options
        flip, jitter = bool(o.flip), o.color_jitter or 0.0
        if o.crop == "pad":
            assert o.pad is not None and o.pad_mode is not None
            return ViewPolicy(
                "pad_crop",
                # A resized image that is larger than the crop leaves room to shift, besides the padding.
                side=self._student_preprocessing.resize,
                crop=self.image_size,
                pad=o.pad,
                mode=o.pad_mode,
                flip=flip,
                color_jitter=jitter,
            )
        if o.crop == "resized":
            assert o.crop_scale is not None
            return ViewPolicy("resized_crop", scale=(o.crop_scale, 1.0), flip=flip, color_jitter=jitter)
        return ViewPolicy("center", flip=flip, color_jitter=jitter)

    @property
    def _student_preprocessing(self) -> Preprocessing:
        """The student's preprocessing at the size of the views."""
        student = resolve(self.options.student)
        return NetworkSpec(student, self.image_size, len(self.classes), "").preprocessing

    @cached_property
    def canonical(self) -> Canonical:
        """The form of training images from which views are cropped."""
        interpolation = self._student_preprocessing.interpolation
        if self.policy.kind == "pad_crop":
            return Canonical("square", self.policy.side, interpolation)
        return Canonical("short_side", round(CANONICAL_SCALE * self.image_size), interpolation)

    @property
    def form(self) -> dict[str, Any]:
        """All that a view's pixels depend on, besides the image and the view policy."""
        return {"canonical": asdict(self.canonical), "decoder": decoder_version()}

    @cached_property
    def placement(self) -> Placement:
        """Where training images are kept: as requested, or the first of the three that they fit in."""
        if self.options.resident != "auto":
            return self.options.resident
        return self.place(*choose_placement(self.dataset.train, self.canonical, self.device, self.cache))

    @cached_property
    def workers(self) -> Workers:
        """The processes that decode images on the fly."""
        return Workers(worker_count(self.device), self.device)

    @cached_property
    def train(self) -> ReadableImages:
        """The readable training images: with their pixels, or with their sizes if workers decode them."""
        images = self.dataset.train
        if self.placement == "workers":
            show = self._progress("checking train")
            return measure_images(images, self.canonical, self.workers, cache=self.cache, progress=show)
        return decode_images(
            images, self.canonical, cache=self.cache, progress=self._progress("decoding train")
        )

    @cached_property
    def _views(self) -> Views | StreamedViews:
        train = self.train
        drawn = (train.targets(self.dataset), train.keys, self.policy, self.options.seed, self.image_size)
        if isinstance(train, SizedImages):
            return StreamedViews(*drawn, train, self.canonical, self.workers)
        assert isinstance(train, DecodedImages)
        pixels, free = train.pixels, free_memory(self.device)
        if self.placement == "device":
            if pixels.nbytes > free:
                raise JobError(
                    f"--resident device: the training images take {pixels.nbytes / 1e9:.1f} GB and "
                    f"{self.device} has {free / 1e9:.1f} GB free. Use --resident host."
                )
            pixels = pixels.to(self.device)
        return Views(*drawn, pixels)

    def views(self, seed: int, size: int) -> Views | StreamedViews:
        """Return views of the training images, of ``size`` pixels, drawn with ``seed``.

        Raises:
            JobError: the images do not fit into the memory of the device.
        """
        return replace(self._views, seed=seed, size=size)

    def rendered(
        self, split: Split, spec: NetworkSpec, limit: int | None = None
    ) -> tuple[Tensor, Tensor, DecodedImages]:
        """Return a split as the runtime renders it for a network: uint8 [N,S,S,3], labels and images.

        Args:
            limit: largest number of images, taken evenly over the classes.
        """
        images = self.dataset.split(split)
        decoded = render_images(
            images[:: max(1, math.ceil(len(images) / limit))] if limit else images,
            spec.preprocessing,
            cache=self.cache,
            progress=self._progress(f"rendering {split}"),
        )
        labels = decoded.targets(self.dataset)
        if not decoded.images:
            empty = torch.empty(0, spec.image_size, spec.image_size, 3, dtype=torch.uint8)
            return empty, labels, decoded
        return decoded.pixels.stack(), labels, decoded

    def rendered_train(self, spec: NetworkSpec) -> Iterator[tuple[int, Tensor]]:
        """Yield training images as ``rendered`` does: (index of the first, uint8 [B,3,S,S] on the device).

        If workers decode them, they are neither kept in memory nor written to the cache.
        """
        if self.placement == "workers":
            batches = rendered_batches(self.train.images, spec.preprocessing, self.workers, BATCH)
        else:
            batches = iter(self.rendered("train", spec)[0].split(BATCH))
        first = 0
        for pixels in batches:
            yield first, pixels.to(self.device).permute(0, 3, 1, 2)
            first += len(pixels)

    def readable(self, spec: NetworkSpec) -> ImageSet:
        """Return the dataset without the images that cannot be decoded; they are among its skipped files.

        Raises:
            JobError: more than one image in a hundred cannot be decoded.
        """
        train = self.train
        val, test = (self.rendered(split, spec)[2] for split in SPLITS[1:])
        skipped = (*self.dataset.skipped, *train.skipped, *val.skipped, *test.skipped)
        opened = len(self.dataset) + sum(file.unreadable for file in self.dataset.skipped)
        check_unreadable(skipped, opened)
        return replace(self.dataset, train=train.images, val=val.images, test=test.images, skipped=skipped)

    def _progress(self, work: str) -> Progress:
        return lambda done, total: self.show(work, done, total)
