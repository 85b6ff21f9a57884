"""What the stages of one run share: options, data, folder, cache and display."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...export.runtime import UINT8, Preprocessing
from ...models.build import Geometry, geometry
from ...models.names import resolve as resolve_name
from ..config.options import Options
from ..config.stages import ROUND
from ..data.dataset import SPLITS, ImageSet, Split
from ..data.decode import Canonical, DecodedImages, ReadableImages, check_unreadable, decode_images, decoder_version, render_images
from ..data.render import Views
from ..data.streaming import Placement, SizedImages, StreamedViews, choose_placement, measure_images, rendered_batches
from ..data.views import ViewPolicy
from ..data.workers import Workers, worker_count
from ..errors import JobError
from ..evaluation import inference
from ..methods.base import Shapes
from ..methods.shapes import compute_shapes
from ..runs.cache import Cache
from ..runs.console import Display, Stage
from ..runs.device import free_memory
from ..runs.folder import RunFolder
from .compute.distributed import Ranks

STUDENT = "student.safetensors"
"""The finished student's weights in the run folder."""

RESIZED_CROPS_FROM = 1.5
"""Photos are kept with a short side of this many times the image size: room for random-resized-crops."""


@dataclass(frozen=True)
class NetworkSpec:
    """One of a run's networks."""

    name: str
    """timm's full name."""
    image_size: int
    """Side of its input in pixels."""
    classes: int
    """Logits it gives; 0: it has no head."""
    file: str
    """Its weights in the run folder."""
    activation: str | None = None
    """What stands in for its own activation."""


@dataclass
class Job:
    """One run. ``options`` are resolved: nothing in them is open."""

    options: Options
    given: frozenset[str]
    """Names of the options the user gave himself."""
    data: ImageSet
    folder: RunFolder
    cache: Cache
    display: Display
    device: str
    stage: Stage
    key: str = ""
    """The hash of the stage that runs: what its checkpoint belongs to."""
    ranks: Ranks = field(default_factory=Ranks)
    left_aside: set[str] = field(default_factory=set)
    """Trackers that failed and are asked no more; see ``trackers``."""
    round: int | None = None
    """Which of the students before the last is being made, from 1; None: the last one, which ships."""

    @property
    def image_size(self) -> int:
        """Side in pixels of the views, and of the teachers' input."""
        assert self.options.image_size is not None
        return self.options.image_size

    @property
    def student(self) -> NetworkSpec:
        """The one of the current round."""
        return self._student(self.round)

    def _student(self, of_round: int | None) -> NetworkSpec:
        size = self.options.student_size or self.image_size
        file = STUDENT if of_round is None else f"round.{of_round}.safetensors"
        name, activation = resolve_name(self.options.student), self.options.activation
        return NetworkSpec(name, size, len(self.data.classes), file, activation)

    @property
    def place(self) -> int:
        """The current round's, from 0."""
        return (self.round or self.options.rounds) - 1

    @property
    def training(self) -> str:
        """The name of the student's training: of its checkpoint and its curves."""
        return "student" if self.round is None else f"{ROUND} {self.round}"

    @property
    def seed(self) -> int:
        """Of the student's weights, order and views."""
        return self.options.seed + self.place

    @property
    def prepared(self) -> str:
        """What the methods have prepared for the student, in the run folder."""
        return "prepared.safetensors" if self.round is None else f"prepared.round.{self.round}.safetensors"

    @property
    def teachers(self) -> list[NetworkSpec]:
        """Those that were named."""
        several = len(self.options.teacher) > 1
        return [
            NetworkSpec(
                resolve_name(name),
                self.image_size,
                0 if head == "none" else len(self.data.classes),
                f"teacher.{t}.safetensors" if several else "teacher.safetensors",
            )
            for t, (name, head) in enumerate(
                zip(self.options.teacher, self.options.teacher_head, strict=True)
            )
        ]

    @property
    def current_teachers(self) -> list[NetworkSpec]:
        """Those that the student learns from: those that were named, or the student of the round before."""
        return [self._student(self.place)] if self.place else self.teachers

    def shapes(self, member: NetworkSpec) -> Shapes:
        """Sizes of a network's readouts."""
        return compute_shapes(member.name, member.classes, member.image_size)

    def geometry(self, member: NetworkSpec) -> Geometry:
        return geometry(member.name, member.image_size)

    def preprocessing(self, member: NetworkSpec) -> Preprocessing:
        """The runtime's path from an image to the input of a network."""
        g = self.geometry(member)
        return Preprocessing.of(g.image_size, g.crop_fraction, g.interpolation, g.crop_mode, g.mean, g.std)

    @cached_property
    def policy(self) -> ViewPolicy:
        o = self.options
        flip, jitter = bool(o.flip), o.color_jitter or 0.0
        if o.crop == "pad":
            assert o.pad is not None and o.pad_mode is not None
            side = self._full_size.resize
            # Room to shift is needed at the crop's size; what the resized image already has more counts too.
            return ViewPolicy(
                "pad_crop",
                side=side,
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
    def _full_size(self) -> Preprocessing:
        """The student's way of preprocessing, at the views' size."""
        return self.preprocessing(replace(self.student, image_size=self.image_size))

    @cached_property
    def canonical(self) -> Canonical:
        """The form of training images that views are cut from."""
        interpolation = self._full_size.interpolation
        if self.policy.kind == "pad_crop":
            return Canonical("square", self.policy.side, interpolation)
        return Canonical("short_side", round(RESIZED_CROPS_FROM * self.image_size), interpolation)

    @property
    def form(self) -> dict[str, Any]:
        """All that the pixels of a view depend on besides the image and how it is drawn."""
        return {"canonical": asdict(self.canonical), "decoder": decoder_version()}

    @cached_property
    def resident(self) -> Placement:
        """Where training pixels are: what was asked for, or the first of the three that they fit in.

        Once workers decode, or don't, a run keeps to it: on a GPU views may differ by a level between the
        two, and a run that goes on repeats exactly.
        """
        if self.options.resident != "auto":
            return self.options.resident
        kept = self.folder.record.placement
        way, why = choose_placement(self.data.train, self.canonical, self.device, self.cache)
        if kept is not None and (kept == "workers") != (way == "workers"):
            way, why = ("workers" if kept == "workers" else "host"), "as this run was begun"
        if why:
            self.display.note(f"{_WAYS[way]}: {why}")
        self.folder.record.placement = way
        self.folder.save()
        return way

    @cached_property
    def workers(self) -> Workers:
        """The processes that decode what is not decoded ahead."""
        return Workers(worker_count(self.device), self.device)

    @cached_property
    def train(self) -> ReadableImages:
        """The readable training images: with their pixels, or with their sizes where workers decode them."""
        if self.resident == "workers":
            progress = self._progress("checking train")
            return measure_images(
                self.data.train, self.canonical, self.workers, cache=self.cache, progress=progress
            )
        progress = self._progress("decoding train")
        return decode_images(self.data.train, self.canonical, cache=self.cache, progress=progress)

    @cached_property
    def views(self) -> Views | StreamedViews:
        """
        Raises:
            JobError: the pixels were to be on the device, and it has no room for them.
        """
        train, seed, size = self.train, self.options.seed, self.image_size
        labels = train.targets(self.data)
        if isinstance(train, SizedImages):
            return StreamedViews(
                train, labels, train.keys, self.canonical, self.policy, seed, size, self.workers
            )
        assert isinstance(train, DecodedImages)
        pixels, room = train.pixels, free_memory(self.device)
        if self.resident == "device":
            if pixels.nbytes > room:
                raise JobError(
                    f"The training images take {pixels.nbytes / 1e9:.1f} GB and {self.device} has "
                    f"{room / 1e9:.1f} GB free; --resident host leaves them where they are."
                )
            pixels = pixels.to(self.device)
        return Views(pixels, labels, train.keys, self.policy, seed, size)

    def views_drawn_with(self, seed: int, size: int) -> Views | StreamedViews:
        """The same images' views, drawn with another seed and at another size."""
        return replace(self.views, seed=seed, size=size)

    def rendered(
        self, role: Split, member: NetworkSpec, most: int | None = None
    ) -> tuple[Tensor, Tensor, DecodedImages]:
        """A role as the runtime renders it for a network: uint8 [N,S,S,3], its labels (see
        ``decode.Readable.targets``), and its images.

        ``most`` images at most, spread evenly over the classes.
        """
        images = self.data.split(role)
        decoded = render_images(
            images[:: max(1, math.ceil(len(images) / most))] if most else images,
            self.preprocessing(member),
            cache=self.cache,
            progress=self._progress(f"rendering {role}"),
        )
        labels = decoded.targets(self.data)
        if not decoded.images:
            empty = torch.empty(0, member.image_size, member.image_size, 3, dtype=torch.uint8)
            return empty, labels, decoded
        return decoded.pixels.stacked(), labels, decoded

    def rendered_batches(self, role: Split, member: NetworkSpec) -> Iterator[tuple[int, Tensor]]:
        """As ``rendered``, a batch at a time: (index of the first, uint8 [B,3,S,S] on the device). Training
        images are neither decoded ahead nor written anywhere where workers decode them.
        """
        if role == "train" and self.resident == "workers":
            images, first = self.train.images, 0
            preprocessing = self.preprocessing(member)
            for pixels in rendered_batches(images, preprocessing, self.workers, inference.BATCH):
                yield first, pixels.to(self.device).permute(0, 3, 1, 2)
                first += len(pixels)
        else:
            yield from inference.batches(self.rendered(role, member)[0], self.device)

    def readable(self) -> ImageSet:
        """The data without the images that cannot be read; these are among its skipped files.

        Raises:
            JobError: they are more than one in a hundred.
        """
        train = self.train
        val, test = (self.rendered(role, self.student)[2] for role in SPLITS[1:])
        skipped = (*self.data.skipped, *train.skipped, *val.skipped, *test.skipped)
        opened = len(self.data) + sum(one.unreadable for one in self.data.skipped)
        check_unreadable(skipped, opened)
        return replace(self.data, train=train.images, val=val.images, test=test.images, skipped=skipped)

    def _progress(self, work: str) -> Callable[[int, int], None]:
        return lambda done, total: self.stage.update(work, done, total, "images")


_WAYS = {
    "host": "training images stay in host memory",
    "workers": "training images are decoded by workers, each time they are wanted",
}


def takes_pixels(job: Job) -> bool:
    """Whether the files that ship normalise by themselves."""
    return job.options.input == UINT8
