"""Sizes of networks' features, and a check that they have what the methods read."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from ...models.build import Size, build
from ...models.errors import ModelError
from ...models.readout import Readouts, read_network
from .. import methods
from ..errors import UsageError
from .base import Parameters, Setup, Shapes


@lru_cache(maxsize=16)
def _build(name: str, classes: int, image_size: Size) -> Readouts:
    # On the meta device a network of any size costs no memory and a fraction of a second.
    with torch.device("meta"):
        return read_network(build(name, num_classes=classes, image_size=image_size), image_size)


def compute_shapes(name: str, classes: int, image_size: Size) -> Shapes:
    """Return the sizes of a network's features; levels are indexed from both ends (``map@0``, ``map@-1``)."""
    readouts = _build(name, classes, image_size)
    sizes = readouts.shapes
    maps = {name: size for name, size in (("map", sizes.map), ("map_pre", sizes.map_pre)) if size is not None}
    for kind, levels in (("map", sizes.levels), ("tower", sizes.towers)):
        for i, size in enumerate(levels):
            maps[f"{kind}@{i}"] = maps[f"{kind}@{i - len(levels)}"] = size
    pyramid = len(sizes.levels) if "anchors" in readouts.offers else 0
    return Shapes(
        maps=maps,
        vector=sizes.vector,
        logits=sizes.logits,
        levels=pyramid,
        region_vector=sizes.region_vector,
        region_levels=sizes.region_levels,
        cells=sizes.cells,
    )


@lru_cache(maxsize=16)
def _build_with_values(name: str, image_size: Size) -> Readouts:
    # Shapes alone do not show what a classifier computes.
    return Readouts(build(name, num_classes=2, image_size=image_size, seed=0))


def count_parameters(name: str, classes: int, image_size: Size) -> int:
    """Return the number of trainable parameters of a network."""
    return sum(parameter.numel() for parameter in _build(name, classes, image_size).parameters())


def check_methods(
    parameters: Mapping[str, Parameters],
    teachers: Sequence[str],
    student: str,
    *,
    classes: int,
    image_size: Size,
    images: int,
    student_size: Size | None = None,
    heads: Sequence[str] | None = None,
) -> None:
    """Check that the methods work with these networks and this number of training images.

    ``image_size`` is that of the teachers' input, and of the student's without ``student_size``;
    ``heads`` are the values of ``--teacher-head``.

    Raises:
        ModelError: a network lacks a feature that a method reads, or cannot be widened for it.
        UsageError: a method's parameter does not fit.
    """
    logits = [0 if head == "none" else classes for head in heads or ["auto"] * len(teachers)]
    student_size = student_size or image_size
    setup = Setup(
        compute_shapes(student, classes, student_size),
        [compute_shapes(name, count, image_size) for name, count in zip(teachers, logits, strict=True)],
    )
    readouts = _build(student, classes, student_size)
    for method, chosen in parameters.items():
        cls = methods.load(method)
        for name, count, shapes in zip(teachers, logits, setup.teachers, strict=True):
            reads = cls.teacher_reads(chosen, shapes)
            if not count and "logits" in reads:
                raise UsageError(
                    f"--method {method} with these parameters reads the logits of {name}, which has none "
                    "with --teacher-head none. Use a feature method (quest, feed, or mimic with "
                    "variant l2, lsh or lshl2) or another --teacher-head."
                )
            _check_reads(method, _build(name, count, image_size), reads, image_size)
        _check_reads(method, readouts, cls.reads(chosen, setup.student), student_size)
        cls.check(chosen, setup, images)
        if cls.student_width(chosen, setup) is not None:
            _build_with_values(student, student_size).check_widening()


def _check_reads(method: str, readouts: Readouts, reads: frozenset[str], image_size: Size) -> None:
    try:
        readouts.check(reads)
        if "cells" in reads:
            _build_with_values(readouts.name, image_size).check(frozenset({"cells"}))
    except ModelError as error:
        raise ModelError(f"--method {method} does not suit these networks: {error}") from error
