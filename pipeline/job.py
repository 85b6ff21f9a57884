"""What the stages of one run share: options, data, folder, cache and display."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..export.runtime import Preprocessing
from ..models.build import Geometry, geometry
from ..models.names import resolve as resolve_name
from . import evaluate
from .cache import Cache
from .data.decode import Canonical, Decoded, Readable, check_unreadable, decode, decoder, rendered
from .data.image_set import ImageSet, Role, Skipped
from .data.render import Views
from .data.room import Resident, choose
from .data.streamed import Sized, StreamedViews, measured, rendered_batches
from .data.views import ViewPolicy
from .data.workers import Workers, worker_count
from .device import free_memory
from .errors import JobError
from .methods.base import Shapes
from .options import Options
from .progress import Display, Stage
from .ranks import Ranks
from .run_folder import RunFolder
from .shapes import shapes

RESIZED_CROPS_FROM = 1.5
"""Photos are kept with a short side of this many times the image size: room for random-resized-crops."""


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

    @property
    def image_size(self) -> int:
        assert self.options.image_size is not None
        return self.options.image_size

    @property
    def student(self) -> str:
        """timm's full name of the student."""
        return resolve_name(self.options.student)

    @property
    def teachers(self) -> list[str]:
        return [resolve_name(name) for name in self.options.teacher]

    def teacher_file(self, t: int) -> str:
        """The teacher's weights in the run folder."""
        return "teacher.safetensors" if len(self.teachers) == 1 else f"teacher.{t}.safetensors"

    def shapes(self, name: str) -> Shapes:
        """Sizes of a network's readouts."""
        return shapes(name, len(self.data.classes), self.image_size)

    def geometry(self, name: str) -> Geometry:
        return geometry(name, self.image_size)

    def preprocessing(self, name: str) -> Preprocessing:
        """The runtime's path from an image to the input of a network."""
        g = self.geometry(name)
        return Preprocessing.of(g.image_size, g.crop_fraction, g.interpolation, g.crop_mode, g.mean, g.std)

    @cached_property
    def policy(self) -> ViewPolicy:
        o = self.options
        flip, jitter = bool(o.flip), o.color_jitter or 0.0
        if o.crop == "pad":
            assert o.pad is not None and o.pad_mode is not None
            side = self.preprocessing(self.student).resize
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

    @cached_property
    def canonical(self) -> Canonical:
        """The form of training images that views are cut from."""
        interpolation = self.preprocessing(self.student).interpolation
        if self.policy.kind == "pad_crop":
            return Canonical("square", self.policy.side, interpolation)
        return Canonical("short_side", round(RESIZED_CROPS_FROM * self.image_size), interpolation)

    @property
    def form(self) -> dict[str, Any]:
        """All that the pixels of a view depend on besides the image and how it is drawn."""
        return {"canonical": asdict(self.canonical), "decoder": decoder()}

    @cached_property
    def resident(self) -> Resident:
        """Where training pixels are: what was asked for, or the first of the three that they fit in.

        Once workers decode, or don't, a run keeps to it: on a GPU views may differ by a level between the
        two, and a run that goes on repeats exactly.
        """
        if self.options.resident != "auto":
            return self.options.resident
        kept = self.folder.record.get("resident")
        way, why = choose(self.data.train, self.canonical, self.device, self.cache)
        if kept is not None and (kept == "workers") != (way == "workers"):
            way, why = ("workers" if kept == "workers" else "host"), "as this run was begun"
        if why:
            self.display.note(f"{_WAYS[way]}: {why}")
        self.folder.record["resident"] = way
        self.folder.save()
        return way

    @cached_property
    def workers(self) -> Workers:
        """The processes that decode what is not decoded ahead."""
        return Workers(worker_count(self.device), self.device)

    @cached_property
    def train(self) -> Readable:
        """The readable training images: with their pixels, or with their sizes where workers decode them."""
        if self.resident == "workers":
            progress = self._progress("checking train")
            return measured(
                self.data.train, self.canonical, self.workers, cache=self.cache, progress=progress
            )
        progress = self._progress("decoding train")
        return decode(self.data.train, self.canonical, cache=self.cache, progress=progress)

    @cached_property
    def views(self) -> Views | StreamedViews:
        """
        Raises:
            JobError: the pixels were to be on the device, and it has no room for them.
        """
        train, seed, size = self.train, self.options.seed, self.image_size
        if isinstance(train, Sized):
            return StreamedViews(
                train, train.labels, train.keys, self.canonical, self.policy, seed, size, self.workers
            )
        assert isinstance(train, Decoded)
        pixels, room = train.pixels, free_memory(self.device)
        if self.resident == "device":
            if pixels.nbytes > room:
                raise JobError(
                    f"The training images take {pixels.nbytes / 1e9:.1f} GB and {self.device} has "
                    f"{room / 1e9:.1f} GB free; --resident host leaves them where they are."
                )
            pixels = pixels.to(self.device)
        return Views(pixels, train.labels, train.keys, self.policy, seed, size)

    def views_drawn_with(self, seed: int) -> Views | StreamedViews:
        """The same images' views, drawn with another seed."""
        return replace(self.views, seed=seed)

    def rendered(self, role: Role, name: str, most: int | None = None) -> tuple[Tensor, Tensor, Decoded]:
        """A role as the runtime renders it for a network: uint8 [N,S,S,3], labels [N], and its images.

        ``most`` images at most, spread evenly over the classes.
        """
        images = self.data.role(role)
        decoded = rendered(
            images[:: max(1, math.ceil(len(images) / most))] if most else images,
            self.preprocessing(name),
            cache=self.cache,
            progress=self._progress(f"rendering {role}"),
        )
        if not decoded.images:
            empty = torch.empty(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
            return empty, decoded.labels, decoded
        return decoded.pixels.stacked(), decoded.labels, decoded

    def rendered_batches(self, role: Role, name: str) -> Iterator[tuple[int, Tensor]]:
        """As ``rendered``, a batch at a time: (index of the first, uint8 [B,3,S,S] on the device). Training
        images are neither decoded ahead nor written anywhere where workers decode them.
        """
        if role == "train" and self.resident == "workers":
            images, first = self.train.images, 0
            for pixels in rendered_batches(images, self.preprocessing(name), self.workers, evaluate.BATCH):
                yield first, pixels.to(self.device).permute(0, 3, 1, 2)
                first += len(pixels)
        else:
            yield from evaluate.batches(self.rendered(role, name)[0], self.device)

    def unreadable(self) -> list[Skipped]:
        """The images that cannot be read, in any role.

        Raises:
            JobError: they are more than one in a hundred.
        """
        skipped = [*self.data.skipped, *self.train.skipped]
        for role in ("select", "test"):
            skipped += self.rendered(role, self.student)[2].skipped
        opened = len(self.data) + sum(one.unreadable for one in self.data.skipped)
        check_unreadable(skipped, opened)
        return skipped

    def _progress(self, work: str) -> Callable[[int, int], None]:
        return lambda done, total: self.stage.update(work, done, total, "images")


_WAYS = {
    "host": "training images stay in host memory",
    "workers": "training images are decoded by workers, each time they are wanted",
}
