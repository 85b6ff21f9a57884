"""What the stages of one run share: options, data, folder, cache and display."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..export.runtime import Preprocessing
from ..models.build import Geometry, geometry
from ..models.names import resolve as resolve_name
from .cache import Cache
from .data.decode import Canonical, Decoded, check_unreadable, decode, decoder, rendered
from .data.image_set import ImageSet, Role, Skipped
from .data.render import Views
from .data.views import ViewPolicy
from .device import free_memory
from .methods.base import Shapes
from .options import Options
from .progress import Display, Stage
from .ranks import Ranks
from .run_folder import RunFolder
from .shapes import shapes

RESIZED_CROPS_FROM = 1.5
"""Photos are kept with a short side of this many times the image size: room for random-resized-crops."""

RESIDENT = 0.5
"""Share of the device's free memory that training images may take; more of them stay on the host."""


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
        """The form that views are cut from."""
        interpolation = self.preprocessing(self.student).interpolation
        if self.policy.kind == "pad_crop":
            return Canonical("square", self.policy.side, interpolation)
        return Canonical("short_side", round(RESIZED_CROPS_FROM * self.image_size), interpolation)

    @property
    def form(self) -> dict[str, Any]:
        """All that the pixels of a view depend on besides the image and how it is drawn."""
        return {"canonical": asdict(self.canonical), "decoder": decoder()}

    @cached_property
    def train(self) -> Decoded:
        """The training images in the form that views are cut from."""
        progress = self._progress("decoding train")
        return decode(self.data.train, self.canonical, cache=self.cache, progress=progress)

    @cached_property
    def views(self) -> Views:
        """The training images' views, drawn with the run's seed."""
        pixels = self.train.pixels
        if pixels.data.nbytes < RESIDENT * free_memory(self.device):
            pixels = pixels.to(self.device)
        return Views(
            pixels, self.train.labels, self.train.keys, self.policy, self.options.seed, self.image_size
        )

    def views_drawn_with(self, seed: int) -> Views:
        """The same images' views, drawn with another seed."""
        return replace(self.views, seed=seed)

    def rendered(self, role: Role, name: str) -> tuple[Tensor, Tensor, Decoded]:
        """A role as the runtime renders it for a network: uint8 [N,S,S,3], labels [N], and its images."""
        decoded = rendered(
            self.data.role(role),
            self.preprocessing(name),
            cache=self.cache,
            progress=self._progress(f"rendering {role}"),
        )
        if not decoded.images:
            empty = torch.empty(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
            return empty, decoded.labels, decoded
        return decoded.pixels.stacked(), decoded.labels, decoded

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
