"""Sizes of the readouts of a run's networks."""

from ..models.build import build
from ..models.readout import Readouts
from .job import Job
from .methods.base import Shapes


def student_shapes(job: Job, reads: frozenset[str]) -> Shapes:
    """Of the student at the run's image size."""
    return _shapes(job, job.student, reads)


def teacher_shapes(job: Job, t: int, reads: frozenset[str]) -> Shapes:
    """Of a teacher at the run's image size."""
    return _shapes(job, job.teachers[t], reads)


def _shapes(job: Job, name: str, reads: frozenset[str]) -> Shapes:
    network = build(name, num_classes=len(job.data.classes), image_size=job.image_size)
    readouts = Readouts(network, job.image_size)
    readouts.check(reads)
    found = readouts.shapes
    named = {"map": found.map, "map_pre": found.map_pre}
    maps = {read: size for read, size in named.items() if size is not None}
    levels = len(found.levels)
    maps |= {f"map@{i}": size for i, size in enumerate(found.levels)}
    maps |= {f"map@{i - levels}": size for i, size in enumerate(found.levels)}
    return Shapes(maps=maps, vector=found.vector, logits=found.logits)
