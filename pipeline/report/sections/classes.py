"""The classes of the data: number of images and scores."""

from ...runs.results import Report
from ...runs.scores import ClassScore
from ...tasks import task_of
from .. import format
from ..networks import Column, every, shipped
from ..tables import Table


def classes(report: Report) -> Table:
    """Return a row per class: images by split, each network's score, and the shipped file's threshold and F1."""
    columns = [column for column in every(report) if _scores(column)]
    data, ships = report.data, shipped(report)
    if data is None:
        return Table("Classes", [], [])
    splits = {split: data.per_class[split] for split in ("train", "val", "test") if split in data.per_class}
    shipped_scores = _scores(ships) if ships is not None else {}
    thresholds = {label: one for label, one in shipped_scores.items() if one.threshold is not None}
    scores = [_scores(column) for column in columns]
    rows = [
        [
            name,
            *(format.count(counts.get(name, 0)) for counts in splits.values()),
            *(_percent(one.get(name)) for one in scores),
            *(_threshold(thresholds.get(name)) if thresholds else ()),
        ]
        for name in data.classes
    ]
    names = ["class", *splits, *(column.role for column in columns)]
    note = f"{format.title(task_of(data).class_metric)} on the test images." if columns else ""
    if ships is not None and thresholds:
        names += ["threshold", "F1"]
        note += f" Threshold and F1: {ships.role.lower()}."
    return Table("By class", names, rows, note=note)


def _scores(column: Column) -> dict[str, ClassScore]:
    score = column.subject.score
    return {one.label: one for one in score.classes} if score is not None else {}


def _percent(score: ClassScore | None) -> str:
    return format.percent(score.percent, score.n) if score is not None else format.MISSING


def _threshold(score: ClassScore | None) -> tuple[str, str]:
    if score is None or score.threshold is None:
        return format.MISSING, format.MISSING
    return format.significant(score.threshold, 2), format.percent(score.f1, score.n)
