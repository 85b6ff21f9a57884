"""From whom the student learned what: how well its translated map meets each teacher's."""

from ...runs.results import Report
from ...runs.scores import Score
from .. import format
from ..tables import Table


def rounds(report: Report) -> Table:
    """The students one after another; the last one ships."""

    def measured(score: Score | None) -> list[str]:
        if score is None:
            return [format.MISSING] * 2
        interval = format.percent_interval(score.low, score.high, score.n)
        return [format.percent(score.percent, score.n), interval]

    last = report.config.get("rounds", 1)
    rows = [
        [
            str(one.round) + (" (ships)" if one.round == last else ""),
            one.teacher,
            *measured(one.val_score),
            *measured(one.score),
        ]
        for one in report.rounds
    ]
    return Table(
        "Rounds",
        ["round", "taught by", "val images", "95 % interval", "test images", "95 % interval"],
        rows,
        note="The student of each round is the teacher of the next. Measured with the weights in torch, "
        "before export.",
        left=2,
    )


def reconstruction(report: Report) -> Table:
    """FEED's error of each teacher, in the first and in the last epoch."""
    several = len({one.stage for one in report.reconstruction}) > 1
    rows = [
        [
            *([one.stage] if several else []),
            one.teacher,
            format.number(one.first),
            format.number(one.error),
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
