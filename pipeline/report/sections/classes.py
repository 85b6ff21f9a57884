"""What the report tells of each class where images have several labels."""

from ...runs.results import Report
from ...runs.scores import ClassScore
from .. import format
from ..networks import Column, every, shipped
from ..tables import Table


def classes(report: Report) -> Table:
    """A row per class: images by role, each network's average precision, and the shipped file's threshold
    with the F1 that it gives.
    """
    roles = report.data.per_class if report.data else {}
    roles = {role: roles[role] for role in ("train", "val", "test") if role in roles}
    columns = [column for column in every(report) if column.subject.multi_label]
    ships = shipped(report)
    thresholds = _scores(ships) if ships is not None else {}
    scores = [_scores(column) for column in columns]
    names = report.data.classes if report.data else []
    rows = [
        [
            name,
            *(format.count(counts.get(name, 0)) for counts in roles.values()),
            *(_precision(of.get(name)) for of in scores),
            *(_threshold(thresholds.get(name)) if thresholds else ()),
        ]
        for name in names
    ]
    return Table(
        "By class",
        ["class", *roles, *(column.role for column in columns), *(("threshold", "F1") if thresholds else ())],
        rows,
        note="Average precision on the test images; an image counts under each of its classes."
        + (f" Threshold and F1: {ships.role.lower()}." if ships is not None and thresholds else ""),
    )


def _scores(column: Column) -> dict[str, ClassScore]:
    score = column.subject.multi_label
    return {one.label: one for one in score.classes} if score is not None else {}


def _precision(of: ClassScore | None) -> str:
    return format.percent(of.average_precision, of.n) if of is not None else format.MISSING


def _threshold(of: ClassScore | None) -> tuple[str, str]:
    if of is None:
        return format.MISSING, format.MISSING
    return format.significant(of.threshold, 2), format.percent(of.f1, of.n)
