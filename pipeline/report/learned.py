"""From whom the student learned what: how well its translated map meets each teacher's."""

from ..results import Report
from . import figures
from .tables import Table


def reconstruction(report: Report) -> Table:
    """FEED's error of each teacher, in the first and in the last epoch."""
    several = len({one.stage for one in report.reconstruction}) > 1
    rows = [
        [
            *([one.stage] if several else []),
            one.teacher,
            figures.number(one.first),
            figures.number(one.error),
        ]
        for one in report.reconstruction
    ]
    return Table(
        "Reconstruction of the teachers’ maps",
        [*(["training"] if several else []), "teacher", "error, first epoch", "last epoch"],
        rows,
        note="The student’s translated map against the teacher’s, both scaled to length 1: mean absolute "
        "difference over √n, for training images. 0 is the same direction, about 1.1 a random one.",
        left=2 if several else 1,
    )
