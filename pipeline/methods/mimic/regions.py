"""Feature mimicking in a two-stage detector: the vectors of regions match the teacher's.

Wang, Ge, Wu (see ``mimic.py``), section on Faster R-CNN, and the authors' code. The vector f of a region is
the output of the box head after its last ReLU. The regions are those that the student's head is trained on,
after sampling, with the boxes of the labels among them, foreground and background. The teacher computes the
vectors of the student's regions:

    L = mean over all regions of the batch of L_l2, L_lsh, or both

The teacher's features are the maps that regions are pooled from, so they can be cached as those of other
methods. Its box head is frozen and part of what the method prepares. The authors' b is 0 and their M 4,096
for vectors of 1,024 numbers. If ``hashes`` is not set, M is 4·D.
"""

from collections.abc import Sequence

from torch import Tensor

from ....models.detection.regions import BoxHead
from .. import base

HASHES_PER_NUMBER = 4
READS = frozenset({"regions", "region_vectors"})
"""Features of the student."""


def teacher_maps(teacher: base.Shapes) -> tuple[str, ...]:
    """Return the names of the maps that regions are pooled from, finest first."""
    return teacher.pyramid[: teacher.region_levels]


def pair_vectors(
    student: base.Features, maps: Sequence[Tensor], head: BoxHead
) -> tuple[Tensor, base.Features]:
    """Return the student's vectors [n,D] and the teacher's, as ``vector``, of the student's regions."""
    regions = student["regions"].detach()
    is_used = (regions[..., 2:] > regions[..., :2]).all(2)
    listed = [boxes[used] for boxes, used in zip(regions, is_used, strict=True)]
    return student["region_vectors"][is_used], {"vector": head(maps, listed)}
