"""What a distillation method is: readouts in, named losses out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

Readout = Mapping[str, Tensor]
"""What a method sees of one network on one batch: ``map`` [B,C,H,W], ``vector`` [B,D], ``logits`` [B,N]."""


class Parameters(BaseModel):
    """A method's own parameters, set by ``--set METHOD.KEY=VALUE`` and checked by name and type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def for_epochs(self, epochs: int) -> Self:
        """With what was left open and depends on the length of the training."""
        return self


@dataclass(frozen=True)
class Shapes:
    """The sizes of a network's readouts, from a dry forward."""

    maps: Mapping[str, tuple[int, int, int]]
    """(C, H, W) of ``map`` and of every further level asked for, by readout name."""
    vector: int | None
    logits: int


@dataclass(frozen=True)
class Preparation:
    """What a method gets to prepare itself from: the frozen teachers over the training images.

    ``readouts(t, reads)`` runs teacher ``t`` (eval mode, fp32) once over all training images under the
    *test* transform, in a fixed order, and yields one :data:`Readout` per batch on the training device.
    ``shared(t, kind, key, write)`` returns a folder of the cache that runs share, filled by ``write(folder)``
    when it is not there yet; ``key`` is all it depends on besides teacher ``t``'s weights, the data and the
    geometry of the images.
    """

    student: Shapes
    teachers: Sequence[Shapes]
    teacher_names: Sequence[str]
    images: int
    readouts: Callable[[int, frozenset[str]], Iterable[Readout]]
    shared: Callable[[int, str, Mapping[str, Any], Callable[[Path], None]], Path]
    scratch: Path
    """A folder for what is too large for memory."""
    seed: int
    note: Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` leaves behind: tensors for the run folder, facts for the report, a line to show."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """A part of the report (see ``results.Report``)."""
    summary: str


class Method(nn.Module):
    """One way of learning from teachers. Its own heads are trained with the student and dropped afterwards.

    A subclass declares what it reads, may ``prepare`` in one pass over the data, builds its heads in
    ``__init__`` and returns its losses, already weighted, from ``forward``.
    """

    name: ClassVar[str]
    takes: ClassVar[type[Parameters]]
    """Its parameters, by name and type."""
    paper: ClassVar[str]
    cross_entropy: ClassVar[float] = 1.0
    """Weight of the cross-entropy on labels when the method stands alone (its paper's)."""
    prepares: ClassVar[bool] = False
    weights: ClassVar[frozenset[str]]
    """Which of its parameters weigh its loss; who sets one of them needs no ``--balance auto``."""
    pull: ClassVar[tuple[float, float]]
    """Least and most gradient of the loss, over that of the cross-entropy, on the student's last map in the
    first steps, at which the method was seen to do good: for ``pipeline/balance.py``."""

    @classmethod
    def reads(cls, parameters: Any, network: Shapes) -> frozenset[str]:
        """Readouts that ``forward`` looks at; a teacher's are the same unless ``teacher_reads`` differs."""
        raise NotImplementedError

    @classmethod
    def teacher_reads(cls, parameters: Any, teacher: Shapes) -> frozenset[str]:
        """Readouts of a teacher that ``forward`` looks at."""
        return cls.reads(parameters, teacher)

    @classmethod
    def check(cls, parameters: Any, student: Shapes, teachers: Sequence[Shapes], images: int) -> None:
        """Refuse what cannot work with these networks and so many training images, before anything starts.

        Raises:
            UsageError: a parameter asks for what there is not.
        """

    @classmethod
    def prepare(cls, parameters: Any, preparation: Preparation) -> Prepared:
        """What the method needs of the teachers before training starts."""
        raise NotImplementedError

    def __init__(
        self,
        parameters: Any,
        student: Shapes,
        teachers: Sequence[Shapes],
        prepared: Mapping[str, Tensor],
    ) -> None:
        super().__init__()

    def forward(
        self, student: Readout, teachers: Sequence[Readout], labels: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        """Named scalar losses, already weighted.

        Args:
            student: the student's readouts of the batch, with gradients.
            teachers: each teacher's readouts of the same views, without.
            labels: [B] class numbers.
            epoch: the number of epochs done, for schedules such as a warm-up.
        """
        raise NotImplementedError

    def strength(self, epoch: int) -> float:
        """The share of its full weight that the loss has after ``epoch`` epochs: less than 1 in a warm-up."""
        return 1.0

    def scales(self) -> list[nn.Parameter]:
        """Learned scales and temperatures, which travel far: see ``train.build_optimizer``."""
        return []

    def watched(self) -> dict[str, Tensor]:
        """Scalars worth seeing (means since the last call), on the device; the call starts them anew."""
        return {}


class Watch(nn.Module):
    """Running sums on the device, so that watching a training costs no synchronisation."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, **values: Tensor) -> None:
        for key, value in values.items():
            value = value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()

    def take(self) -> dict[str, Tensor]:
        """The sums since the last call."""
        sums, self.sums = self.sums, {}
        return sums
