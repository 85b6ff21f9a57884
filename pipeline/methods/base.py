"""The contract of a distillation method: features in, named losses out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor, distributed, nn

from ...models.pooling import average_pool
from ..config import TaskName
from ..config.limits import check_limits

Features = Mapping[str, Tensor]
"""One network's features of a batch: ``map`` [B,C,H,W], ``vector`` [B,D], ``logits`` [B,N], ``map@LEVEL``,
``cells`` [B,21,N]; see ``models/readout.py``."""


class Parameters(BaseModel):
    """Parameters of one method, set by ``--set METHOD.KEY=VALUE`` and validated by name and type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _within = field_validator("*")(check_limits)

    def for_epochs(self, epochs: int) -> Self:
        """Return the parameters with defaults that depend on the number of epochs filled in."""
        return self


@dataclass(frozen=True)
class Shapes:
    """Sizes of a network's features for one image."""

    maps: Mapping[str, tuple[int, int, int]]
    """(C, H, W) of ``map`` and of every further level, by name."""
    vector: int | None
    logits: int
    """0 for a network without a head."""
    levels: int = 0
    """Number of levels of a detector's feature pyramid, ``map@0`` the finest; 0 for a classifier."""
    region_vector: int | None = None
    """Numbers in the vector of a two-stage detector's region; None for other networks."""
    cells: int = 0
    """Number of cells of the map, at all grids, that have logits; 0 if the classifier is not linear on it."""
    region_levels: int = 0
    """Number of levels, from the finest, that regions are pooled from."""

    @property
    def pyramid(self) -> tuple[str, ...]:
        """Names of the levels of a detector's feature pyramid, the finest first."""
        return tuple(f"map@{level}" for level in range(self.levels))

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the maps that a detector's class scores are computed from, in the order of the levels."""
        names = (f"tower@{level}" for level in range(self.levels))
        return tuple(name for name in names if name in self.maps)


@dataclass(frozen=True)
class Setup:
    """The networks that a method is built for, and the tensors that its ``prepare`` returned."""

    student: Shapes
    teachers: Sequence[Shapes]
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    from_scratch: bool = False
    """True if the student has no pretrained weights."""


@dataclass(frozen=True)
class Batch:
    """The features, labels and position in training of one batch."""

    student: Features
    """With gradients."""
    teachers: Sequence[Features]
    """Without gradients, of the same views: each teacher's features, or the arrays of ``cached_outputs``."""
    labels: Tensor
    """Class numbers [L], or float32 [L,N] with 1 for each class of a multi-label image, of the first L
    images. The others have no labels: a method treats them by its teachers' outputs alone. The class of a
    mixed view is that of the image of which it shows more; multi-label ones have the weighted mean."""
    epoch: int = 0
    """Number of completed epochs."""
    keys: Tensor | None = None
    """int64 [B] derived from image and seed, for random draws that do not depend on the batch."""

    def complete_labels(self, logits: Tensor) -> Tensor:
        """Return class numbers [B]: the label, or the prediction of ``logits`` [B,N] without one."""
        return torch.cat([self.labels, logits[len(self.labels) :].argmax(1)])


@dataclass(frozen=True)
class PrepareContext:
    """Input of ``Method.prepare``: the frozen teachers and the training images.

    ``features(t, reads)`` runs teacher ``t`` (eval mode, fp32) once over all training images under the *test*
    transform, in a fixed order, and yields the features of one batch at a time on the training device.
    ``cached(t, kind, key, write)`` returns a folder of the cache that all runs share. If it does not exist,
    ``write(folder)`` fills it. ``key`` holds everything that it depends on besides teacher ``t``'s weights,
    the data and the image geometry.
    """

    student: Shapes
    teachers: Sequence[Shapes]
    teacher_names: Sequence[str]
    images: int
    features: Callable[[int, frozenset[str]], Iterable[Features]]
    classifier: Callable[[int], Tensor | None]
    """Weight [N,D] of a teacher's last linear layer; None without a head."""
    cached: Callable[[int, str, Mapping[str, Any], Callable[[Path], None]], Path]
    scratch: Path
    """A folder for data that does not fit in memory."""
    seed: int
    note: Callable[[str], None]
    sample: Callable[[int, frozenset[str], int], Iterable[tuple[np.ndarray, Features]]] | None = None
    """``sample(t, reads, limit)``: up to ``limit`` images for the report, uint8 [B,H,W,3] as teacher ``t``
    receives them, with its features."""
    weights: Callable[[int], Mapping[str, Tensor]] | None = None
    """A teacher's weights by name."""


@dataclass(frozen=True)
class PrepareResult:
    """Output of ``Method.prepare``: tensors for the run folder, facts for the report, a line to display."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """A part of the report (see ``results.Report``)."""
    summary: str


@dataclass(frozen=True, eq=False)
class CachedOutput:
    """A compact form of a teacher's features, as the teacher cache stores them for each view."""

    key: Mapping[str, Any]
    """Everything that it depends on besides the teacher and the view."""
    reads: frozenset[str]
    """The features that it is computed from."""
    arrays: Mapping[str, tuple[tuple[int, ...], str]]
    """Shape for one image and numpy dtype of each array, by its name in ``Batch.teachers``."""
    compact: Callable[[Features], dict[str, Tensor]]
    """Computes these arrays [B,…] from the features of a batch."""

    @property
    def bytes_per_image(self) -> int:
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.arrays.values())


class Method(nn.Module):
    """A distillation loss. Its own heads are trained with the student and dropped afterwards.

    A subclass declares what it reads, may ``prepare`` in one pass over the data, builds its heads in
    ``__init__`` and returns its weighted losses from ``forward``.
    """

    name: ClassVar[str]
    parameters_class: ClassVar[type[Parameters]]
    paper: ClassVar[str]
    cross_entropy: ClassVar[float] = 1.0
    """The paper's weight of the cross-entropy on labels, used if the method is the only one."""
    prepares: ClassVar[bool] = False
    weights: ClassVar[frozenset[str]] = frozenset()
    """Parameters that weight the loss. ``--balance auto`` is off if the user sets one of them."""
    gradient_ratio: tuple[float, float] = (0.0, math.inf)
    """Range in which the method is known to work: the norm of the loss gradient divided by that of the
    cross-entropy, at the student's last map in the first steps (see ``gradient_balance.py``). By default it
    is unknown and the weight is never adjusted."""

    @classmethod
    def reads(cls, parameters: Any, network: Shapes) -> frozenset[str]:
        """Return the names of the features that ``forward`` reads of the student."""
        raise NotImplementedError

    @classmethod
    def teacher_reads(cls, parameters: Any, teacher: Shapes) -> frozenset[str]:
        """Return the names of the features that ``forward`` reads of a teacher."""
        return cls.reads(parameters, teacher)

    @classmethod
    def check(cls, parameters: Any, setup: Setup, images: int) -> None:
        """Raise UsageError if a parameter does not fit the networks or the number of training images."""

    @classmethod
    def unsupported(cls, parameters: Any, task: TaskName) -> str | None:
        """Return why the method does not support a task, or None if it does."""
        return None

    @classmethod
    def needs_labels(cls, parameters: Any, task: TaskName) -> str | None:
        """Return why the method cannot learn from images without labels, or None if it can."""
        return None

    @classmethod
    def student_width(cls, parameters: Any, setup: Setup) -> int | None:
        """Return the width D to which the student's ``vector`` is projected during training, or None.

        The linear projection is merged into the classifier before export (``models/readout.py``).
        """
        return None

    @classmethod
    def cached_bytes(cls, parameters: Any, student: Shapes, teacher: Shapes) -> int:
        """Estimate the bytes that the teacher cache needs for one view of one image."""
        return sum(_half(read, teacher).bytes_per_image for read in cls.teacher_reads(parameters, teacher))

    @classmethod
    def prepare(cls, parameters: Any, context: PrepareContext) -> PrepareResult:
        """Compute what the method needs of the teachers before training."""
        raise NotImplementedError

    def __init__(self, parameters: Any, setup: Setup) -> None:
        super().__init__()
        self.student_shapes, self.teacher_shapes = setup.student, setup.teachers
        self.reads_of_student = self.reads(parameters, setup.student)
        self.reads_of_teachers = [self.teacher_reads(parameters, teacher) for teacher in setup.teachers]

    def cached_outputs(self, t: int) -> Sequence[CachedOutput]:
        """Return what the teacher cache stores of teacher ``t``; by default its features in fp16."""
        return [_half(read, self.teacher_shapes[t]) for read in sorted(self.reads_of_teachers[t])]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalar losses by name, already weighted."""
        raise NotImplementedError

    def trains_projection_only(self, epoch: int) -> bool:
        """Return True if only the projection of ``student_width`` is trained, by this method alone."""
        return False

    def warmup_factor(self, epoch: int) -> float:
        """Return the factor in (0, 1] that ``forward`` applies to the loss after ``epoch`` epochs."""
        return 1.0

    def scales(self) -> list[nn.Parameter]:
        """Return learned scales and temperatures; see ``training.optimizer.build_optimizer``."""
        return []

    def metrics(self) -> dict[str, Tensor]:
        """Return scalars to log, as means since the last call, on the device."""
        return {}


def _half(read: str, shapes: Shapes) -> CachedOutput:
    cells = (shapes.cells, shapes.logits)
    shape = {"logits": (shapes.logits,), "cells": cells, "vector": (shapes.vector or 0,), **shapes.maps}[read]
    return CachedOutput(
        key={"readout": read},
        reads=frozenset({read}),
        arrays={read: (shape, "float16")},
        compact=lambda features: {read: features[read][:, : shape[0]].half()},  # of cells the first ones
    )


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors with names ``prefix.NAME``, by NAME."""
    start = f"{prefix}."
    return {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}


def to_fp32(x: Tensor) -> Tensor:
    """Return a tensor in fp32 or wider; sums, softmax and divergences lose too much in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def standardize(f: Tensor, *dims: int) -> Tensor:
    """Return ``f`` in fp32 or wider with mean 0 and std 1 over these dimensions; 0 if it is constant."""
    f, count = to_fp32(f), math.prod(f.shape[dim] for dim in dims)
    std, mean = torch.std_mean(f, dim=dims, keepdim=True, correction=min(1, count - 1))
    return (f - mean) / (std + 1e-6)


def shared_grid(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> tuple[int, int]:
    """Return the grid (H, W) at which two maps (C, H, W) are compared: the coarser of the two."""
    return min(student[1], teacher[1]), min(student[2], teacher[2])


def pool(f: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pool a map [B,C,H,W] to ``grid`` (h, w): [B,C,h,w]."""
    return f if f.shape[-2:] == grid else average_pool(f, grid)


def positions(f: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pool a map [B,C,H,W] to ``grid`` (h, w) and return one feature per position, [B·h·w,C]."""
    f = pool(f, grid)
    return f.permute(0, 2, 3, 1).reshape(-1, f.shape[1])


class RunningSums(nn.Module):
    """Sums for metrics, kept on the device so that they cost no synchronization.

    They are part of the module's state, so that a run resumed in the middle of an epoch continues them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, **values: Tensor) -> None:
        for key, value in values.items():
            value = value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()

    def take(self) -> dict[str, Tensor]:
        """Return the sums over all ranks since the last call, and reset them."""
        sums, self.sums = self.sums, {}
        if distributed.is_initialized():
            for value in sums.values():
                distributed.all_reduce(value)
        return sums

    def reduce_to_main(self) -> None:
        """Add up the sums of all ranks on rank 0, and set those of the other ranks to zero."""
        if distributed.is_initialized():
            for value in self.sums.values():
                distributed.all_reduce(value)
                if distributed.get_rank():
                    value.zero_()

    def get_extra_state(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.sums = dict(state)
