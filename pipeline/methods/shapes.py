"""Sizes of the readouts of a run's networks, and whether its methods find what they read."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from ...models.build import build
from ...models.readout import Readouts
from .. import methods
from ..errors import UsageError
from .base import Parameters, Shapes


@lru_cache(maxsize=16)
def _readouts(name: str, classes: int, image_size: int) -> Readouts:
    # Shapes alone: on the meta device a network of any size costs no memory and a fraction of a second.
    with torch.device("meta"):
        return Readouts(build(name, num_classes=classes, image_size=image_size), image_size)


def shapes(name: str, classes: int, image_size: int) -> Shapes:
    """Of a network with a head for so many classes; a level may be counted from the end, too."""
    found = _readouts(name, classes, image_size).shapes
    named = {"map": found.map, "map_pre": found.map_pre}
    maps = {read: size for read, size in named.items() if size is not None}
    for i, size in enumerate(found.levels):
        maps[f"map@{i}"] = maps[f"map@{i - len(found.levels)}"] = size
    return Shapes(maps=maps, vector=found.vector, logits=found.logits)


def parameters(name: str, classes: int, image_size: int) -> int:
    """How many numbers a network with a head for so many classes learns."""
    return sum(one.numel() for one in _readouts(name, classes, image_size).parameters())


def check_methods(
    chosen: Mapping[str, Parameters],
    teachers: Sequence[str],
    student: str,
    *,
    classes: int,
    image_size: int,
    images: int,
    student_size: int | None = None,
    heads: Sequence[str] | None = None,
) -> None:
    """Whether the methods can work with these networks and so many training images.

    Args:
        heads: ``--teacher-head`` of each teacher, where one may have none.
        image_size: side in pixels of the teachers' input, and of the student's where that is not another.

    Raises:
        ModelError: a network lacks a readout that one of the methods needs.
        UsageError: a method's parameter asks for what there is not.
    """
    logits = [0 if head == "none" else classes for head in heads or ["auto"] * len(teachers)]
    for method, parameters in chosen.items():
        cls = methods.load(method)
        of_teachers = [shapes(name, count, image_size) for name, count in zip(teachers, logits, strict=True)]
        for name, count, of_teacher in zip(teachers, logits, of_teachers, strict=True):
            reads = cls.teacher_reads(parameters, of_teacher)
            if not count and "logits" in reads:
                raise UsageError(
                    f"With these parameters {method} reads the logits of {name}, which has none by "
                    "--teacher-head none; take a method of features (quest, feed, or mimic as l2, lsh or "
                    "lshl2) or another --teacher-head."
                )
            _readouts(name, count, image_size).check(reads)
        looks_at = student_size or image_size
        of_student = shapes(student, classes, looks_at)
        _readouts(student, classes, looks_at).check(cls.reads(parameters, of_student))
        cls.check(parameters, of_student, of_teachers, images)
        if cls.widens(parameters, of_student, of_teachers) is not None:
            _readouts(student, classes, looks_at).check_widening()
