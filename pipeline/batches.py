"""A training's batches: which images a step takes, which of their views, what the teachers say to them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data.ahead import one_ahead, sent
from .data.render import Views
from .data.schedule import Schedule
from .data.streaming import StreamedViews
from .data.views import draw_keys, permutation
from .methods.base import Readout
from .plan import Plan
from .training.compute.distributed import Ranks
from .training.teacher_cache import Store

Ask = Callable[[Tensor], Sequence[Readout]]
"""Teachers: views, uint8 [B,3,S,S], to each one's readouts."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a step, uint8 views [B,3,S,S] and their labels, or a part of that part."""

    pixels: Tensor
    labels: Tensor
    keys: Tensor
    """int64 [B]: what the methods' random draws follow."""
    answers: Sequence[Readout] | None
    """Each teacher's, from the store or asked ahead; None where the step asks."""
    full: Tensor | None = None
    """The same views as teachers see them that the step asks; None: as the student does."""

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Tensor]:
        """Its tensors."""
        yield from (self.pixels, self.labels, self.keys)
        if self.full is not None:
            yield self.full
        for one in self.answers or ():
            yield from one.values()

    def split(self, size: int | None) -> Iterator["Batch"]:
        """In parts of at most ``size`` images, as even as can be; none of a single one, where BatchNorm has
        nothing to compare (so of three images, when a part may have two).
        """
        if size is None or size >= len(self):
            yield self
            return
        parts = max(1, min(math.ceil(len(self) / size), len(self) // 2))
        for part in range(parts):
            rows = slice(len(self) * part // parts, len(self) * (part + 1) // parts)
            answers: list[Readout] | None = None
            if self.answers is not None:
                answers = [{name: part[rows] for name, part in one.items()} for one in self.answers]
            full = None if self.full is None else self.full[rows]
            yield Batch(self.pixels[rows], self.labels[rows], self.keys[rows], answers, full)


@dataclass(frozen=True)
class Batches:
    """An epoch's batches in the epoch's order: all of it follows from seed, image and epoch alone."""

    views: Views | StreamedViews
    views_of: Schedule
    store: Store | None
    plan: Plan
    ranks: Ranks
    device: torch.device
    teachers_size: int | None = None
    """Side in pixels of what teachers see that are asked; None: there are none."""
    ask: Ask | None = None
    """Asks the teachers about a batch ahead of its step; None leaves that to the step."""

    def open(self, epoch: int) -> None:
        """Have the store's answers at hand."""
        if self.store is not None:
            self.store.open(self.views_of.needed(epoch))
            self.store.make_resident(self.views_of.needed(epoch), self.device)

    def first(self) -> Batch:
        """The first step's."""
        self.open(0)
        return next(self.of(0, 1, 0))

    def of(self, epoch: int, steps: int, begun: int) -> Iterator[Batch]:
        """This rank's batches from step ``begun`` on."""
        keys = self.views.keys
        order = permutation(self.plan.seed, epoch, keys)
        numbers = self.views_of.numbers(keys, epoch)
        draws = draw_keys(self.plan.seed, keys)
        parts = [
            order[step * self.plan.batch_size : (step + 1) * self.plan.batch_size]
            for step in range(begun, steps)
        ]
        parts = [part[self.ranks.mine(len(part))] for part in parts]
        also = self.teachers_size if self.teachers_size != self.views.size else None
        pixels_of = self.views.batches(((indices, numbers[indices]) for indices in parts), self.device, also)

        def made() -> Iterator[Batch]:
            for indices, (pixels, labels, *more) in zip(parts, pixels_of, strict=True):
                answers: Sequence[Readout] | None = None
                if self.store is not None:
                    answers = self.store.batch(indices, numbers[indices], self.device)
                elif self.ask is not None:
                    answers, more = self.ask(*more or [pixels]), []
                yield Batch(pixels, labels, sent(draws[indices], self.device), answers, *more)

        yield from one_ahead(made(), self.device)
