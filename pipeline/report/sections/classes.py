"""Test images with predictions, per-class results and the confusion matrix."""

from collections.abc import Mapping, Sequence

from ...evaluation.predictions import most_confused
from ...evaluation.results import Confused
from ...runs.results import Example, Report
from ...runs.scores import ClassScore, Score
from .. import format
from ..charts import Curve, lines
from ..networks import Column, all_networks, find_task, shipped_network
from ..page import (
    LARGE_IMAGE,
    SMALL_IMAGE,
    Gallery,
    Matrix,
    Picture,
    Prediction,
    Section,
    check_png,
    confusion_matrix,
)
from ..tables import CsvFile, Table

MAX_CLASSES = 40
"""Of more classes, those with the lowest scores are shown; the CSV file has all."""
MAX_WEAKEST = MAX_CONFUSED = 20
CLASSES_CSV, CONFUSION_CSV = "classes.csv", "confusion.csv"
MAX_EXAMPLES = 24
CAPTION = "Rows: true class. Columns: prediction of the shipped file. Numbers: test images."


def example_section(report: Report) -> Section:
    examples = sorted(report.examples, key=lambda example: example.student_correct)
    pictures = [picture(example) for example in examples[:MAX_EXAMPLES]]
    both = any(example.teacher is not None for example in report.examples)
    text = f"Predictions of the shipped file{' and the teacher' if both else ''} with their probabilities. "
    task = find_task(report)
    text += "".join(f"{note} " for note in (task.prediction_note, task.picture_note) if note)
    if not all(example.student_correct for example in report.examples):
        text += f"Errors of the student come first, {task.errors_order}. "
    if len(pictures) < len(report.examples):
        text += f"{len(pictures)} of {len(report.examples):,} are shown."
    figures = [Gallery("Test images", pictures)] if pictures else []
    return Section("Test images", "images", text=[text.strip()], figures=figures)


def picture(example: Example) -> Picture:
    png, side = check_png(example.png)

    def prediction(label: str, probability: float | None, correct: bool | None) -> Prediction:
        percent = format.percent(None if probability is None else 100 * probability)
        return Prediction(label, percent, bool(correct))

    student = prediction(example.student, example.student_probability, example.student_correct)
    teacher = None
    if example.teacher is not None:
        teacher = prediction(example.teacher, example.teacher_probability, example.teacher_correct)
    return Picture(example.name, example.label, student, teacher, png, side < SMALL_IMAGE, side > LARGE_IMAGE)


def section(report: Report) -> Section:
    names = report.data.classes if report.data else []
    confusion = [entry for entry in report.confusion or () if max(entry[:2]) < len(names)]
    matrix = confusion_matrix(confusion, names, CAPTION)
    pairs = confused_table(most_confused(confusion, names))
    shipped = shipped_network(report)
    return classes_section(matrix, shipped.subject.score if shipped else None, class_table(report), pairs)


def classes_section(
    matrix: Matrix | None, score: Score | None, classes: Table, pairs: Table, others: Sequence[Table] = ()
) -> Section:
    """Return the matrix, or the confused pairs without one, curves, the classes, and ``others`` folded."""
    tables = [classes, pairs] if matrix is None else [classes]
    curves = [Curve(name, range(101), values) for name, values in score.precision.items()] if score else []
    chart = lines("Precision, %", curves, top=100, x_name="recall, %")
    return Section("Classes", "classes", figures=[matrix, chart], tables=tables, folded=others)


def choose_classes(names: Sequence[str], percents: Mapping[str, float | None]) -> tuple[list[str], str]:
    """Return the classes that a table shows, and a sentence on the choice if these are not all."""
    if len(names) <= MAX_CLASSES:
        return list(names), ""
    measured = [(percent, name) for name in names if (percent := percents.get(name)) is not None]
    weakest = [name for _, name in sorted(measured)] or list(names)
    return weakest[:MAX_WEAKEST], f"The weakest {MAX_WEAKEST} of {len(names):,} classes; all:"


def class_table(report: Report) -> Table:
    """Return a row per class: the score of each network, thresholds, and images of each split."""
    splits = report.data.per_class if report.data else {}
    splits = {name: splits[name] for name in ("train", "val", "test") if name in splits}
    columns = [column for column in all_networks(report) if class_scores(column)]
    scores = [class_scores(column) for column in columns]
    names = dict.fromkeys([*(report.data.classes if report.data else []), *(n for s in scores for n in s)])
    shipped = shipped_network(report)
    decoded = class_scores(shipped) if shipped is not None else {}
    has_thresholds = any(score.threshold is not None for score in decoded.values())
    thresholds = 2 if has_thresholds else 0
    heads = ["class", *(column.role for column in columns)]
    shown, cut = choose_classes(list(names), {name: score.percent for name, score in decoded.items()})
    rows = [
        [
            name,
            *(_percent(by_class.get(name)) for by_class in scores),
            *(_threshold(decoded.get(name)) if has_thresholds else ()),
            *(format.count(counts.get(name, 0)) for counts in splits.values()),
        ]
        for name in shown
    ]
    note = f"{format.title(find_task(report).class_metric)} on the test images." if report.data else ""
    if has_thresholds and shipped is not None:
        heads += ["threshold", "F1"]
        note += f" An image counts for each of its classes. Threshold and F1: {shipped.role_in_sentence}."
    heads += splits
    csv = [
        [
            name,
            *(by_class[name].percent if name in by_class else None for by_class in scores),
            *([decoded[name].threshold, decoded[name].f1] if name in decoded else [None, None])[:thresholds],
            *(counts.get(name, 0) for counts in splits.values()),
        ]
        for name in (names if cut else ())
    ]
    return Table(
        "Results by class",
        heads,
        rows if splits or columns else [],
        note=f"{note} {cut}".strip(),
        csv=CsvFile(CLASSES_CSV, [heads, *csv]) if cut else None,
    )


def class_scores(column: Column) -> dict[str, ClassScore]:
    score = column.subject.score
    return {result.label: result for result in score.classes} if score is not None else {}


def _percent(result: ClassScore | None) -> str:
    return format.percent(result.percent, result.n) if result is not None else format.MISSING


def _threshold(result: ClassScore | None) -> tuple[str, str]:
    if result is None or result.threshold is None:
        return format.MISSING, format.MISSING
    return format.significant(result.threshold, 2), format.percent(result.f1, result.n)


def confused_table(pairs: Sequence[Confused]) -> Table:
    shown = pairs[:MAX_CONFUSED]
    rows = [[p.label, p.predicted, format.count(p.n), format.percent(p.percent)] for p in shown]
    columns = ["true class", "prediction", "images", "of the class"]
    note, csv = "", None
    if len(pairs) > MAX_CONFUSED:
        note = f"The first {MAX_CONFUSED} of {len(pairs):,} pairs; all:"
        csv = CsvFile(CONFUSION_CSV, [columns, *([p.label, p.predicted, p.n, p.percent] for p in pairs)])
    return Table("Most confused classes", columns, rows, note=note, left=2, csv=csv)
