"""What a distillation method is: readouts in, named losses out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor, distributed, nn

from ..config.limits import within

Features = Mapping[str, Tensor]
"""What a method sees of one network on one batch: ``map`` [B,C,H,W], ``vector`` [B,D], ``logits`` [B,N]."""


class Parameters(BaseModel):
    """A method's own parameters, set by ``--set METHOD.KEY=VALUE`` and checked by name and type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _within = field_validator("*")(within)

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
    """0: there is no head."""


@dataclass(frozen=True)
class PrepareContext:
    """What a method gets to prepare itself from: the frozen teachers over the training images.

    ``readouts(t, reads)`` runs teacher ``t`` (eval mode, fp32) once over all training images under the
    *test* transform, in a fixed order, and yields the features of one batch on the training device.
    ``shared(t, kind, key, write)`` returns a folder of the cache that runs share, filled by ``write(folder)``
    when it is not there yet; ``key`` is all it depends on besides teacher ``t``'s weights, the data and the
    geometry of the images.
    """

    student: Shapes
    teachers: Sequence[Shapes]
    teacher_names: Sequence[str]
    images: int
    readouts: Callable[[int, frozenset[str]], Iterable[Features]]
    classifier: Callable[[int], Tensor | None]
    """The weight [N,D] of a teacher's last linear layer; None without a head."""
    shared: Callable[[int, str, Mapping[str, Any], Callable[[Path], None]], Path]
    scratch: Path
    """A folder for what is too large for memory."""
    seed: int
    note: Callable[[str], None]
    seen: Callable[[int, frozenset[str], int], Iterable[tuple[np.ndarray, Features]]] | None = None
    """``seen(t, reads, most)``: a few images that the report may show pieces of, as teacher ``t`` gets them,
    uint8 [B,S,S,3], with its readouts."""


@dataclass(frozen=True)
class PrepareResult:
    """What ``prepare`` leaves behind: tensors for the run folder, facts for the report, a line to show."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """A part of the report (see ``results.Report``)."""
    summary: str


@dataclass(frozen=True, eq=False)
class CachedOutput:
    """A part of what a teacher says to a view, in the compact form in which a store keeps it."""

    key: Mapping[str, Any]
    """All it depends on besides the teacher and the view."""
    reads: frozenset[str]
    """The readouts it is made from."""
    arrays: Mapping[str, tuple[tuple[int, ...], str]]
    """Shape for one image and numpy's dtype of each array, by the name that ``forward`` finds it under."""
    compact: Callable[[Features], dict[str, Tensor]]
    """From the readouts of a batch to these arrays [B,…]."""

    @property
    def bytes_per_image(self) -> int:
        return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in self.arrays.values())


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
    weights: ClassVar[frozenset[str]] = frozenset()
    """Which of its parameters weigh its loss; who sets one of them needs no ``--balance auto``."""
    pull: ClassVar[tuple[float, float]] = (0.0, math.inf)
    """Least and most gradient of the loss, over that of the cross-entropy, on the student's last map in the
    first steps, at which the method was seen to do good: for ``gradient_balance.py``. Where nothing is known
    of that, its weight is left alone."""

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
    def not_multi_label(cls, parameters: Any) -> str | None:
        """Why the method cannot learn images of several labels; None where it can."""
        return None

    @classmethod
    def widens(cls, parameters: Any, student: Shapes, teachers: Sequence[Shapes]) -> int | None:
        """The width that the student's ``vector`` has while it learns, by a linear layer of its own that is
        merged into its classifier before anything ships (``models/projection.py``); None: its own.
        """
        return None

    @classmethod
    def stored_bytes(cls, parameters: Any, student: Shapes, teacher: Shapes) -> int:
        """Bytes that a store takes for one image's answer of a teacher, as far as is known ahead."""
        return sum(_half(read, teacher).bytes_per_image for read in cls.teacher_reads(parameters, teacher))

    @classmethod
    def prepare(cls, parameters: Any, preparation: PrepareContext) -> PrepareResult:
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
        self.of_student = self.reads(parameters, student)
        self.of_teachers = [(teacher, self.teacher_reads(parameters, teacher)) for teacher in teachers]

    def answers(self, t: int) -> Sequence[CachedOutput]:
        """What a store keeps of teacher ``t`` for this method: its readouts in half precision."""
        shapes, reads = self.of_teachers[t]
        return [_half(read, shapes) for read in sorted(reads)]

    def forward(
        self,
        student: Features,
        teachers: Sequence[Features],
        labels: Tensor,
        epoch: int,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Named scalar losses, already weighted.

        Args:
            student: the student's readouts of the batch, with gradients.
            teachers: each teacher's readouts of the same views, without; or its ``answers`` to them.
            labels: [B] class numbers; of a multi-label set float32 [B,N], 1 for each class of an image.
            epoch: the number of epochs done, for schedules such as a warm-up.
            keys: [B] int64, what random draws follow besides the epoch: the image and the run's seed.
        """
        raise NotImplementedError

    def embeds_alone(self, epoch: int) -> bool:
        """Whether after ``epoch`` epochs nothing learns yet but the layer that widens the student's vector,
        and from this method alone.
        """
        return False

    def strength(self, epoch: int) -> float:
        """The share of its full weight that the loss has after ``epoch`` epochs: less than 1 in a warm-up."""
        return 1.0

    def scales(self) -> list[nn.Parameter]:
        """Learned scales and temperatures, which travel far: see ``train.build_optimizer``."""
        return []

    def watched(self) -> dict[str, Tensor]:
        """Scalars worth seeing (means since the last call), on the device; the call starts them anew."""
        return {}


def _half(read: str, shapes: Shapes) -> CachedOutput:
    sizes = {"logits": (shapes.logits,), "vector": (shapes.vector or 0,)}
    shape = sizes[read] if read in sizes else shapes.maps[read]
    return CachedOutput(
        key={"readout": read},
        reads=frozenset({read}),
        arrays={read: (shape, "float16")},
        compact=lambda readout: {read: readout[read].half()},
    )


class RunningSums(nn.Module):
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
        """The sums since the last call, over all ranks of the job."""
        sums, self.sums = self.sums, {}
        if distributed.is_initialized():
            for value in sums.values():
                distributed.all_reduce(value)
        return sums

    def bring_together(self) -> None:
        """Leave the sums of all ranks to rank 0, and nothing to the others."""
        if distributed.is_initialized():
            for value in self.sums.values():
                distributed.all_reduce(value)
                if distributed.get_rank():
                    value.zero_()

    # A training that goes on in the middle of an epoch goes on with its sums.

    def get_extra_state(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.sums = dict(state)
