"""What a page of the report shows, in reading order: made once, rendered as HTML and as Markdown."""

from dataclasses import dataclass

from ...runs.results import Example, Report
from ...tasks import task_of
from ..sections import calibration, int8, training, vocabulary as words
from ..sections.classes import classes as class_table
from .. import details, format, summary, pictures, tables
from ..charts import Lines, Rows
from ..format import png
from ..summary import KeyFigure
from ..sections.latency import Section as LatencySection
from ..sections.latency import section as latency_section
from ..pictures import Training
from ..networks import threads
from ..tables import Table
from ..tradeoff import Tradeoff

MOST_MATRIX_CLASSES = 20
"""A confusion matrix of more classes is unreadable: the most confused pairs are told instead."""
MOST_CLASSES = 40
MOST_EXAMPLES = 24


@dataclass(frozen=True)
class Cell:
    text: str
    kind: str
    share: int
    """Percent of its true class, whole numbers: how strongly the cell is coloured."""


@dataclass(frozen=True)
class MatrixRow:
    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class Matrix:
    names: list[str]
    rows: list[MatrixRow]


@dataclass(frozen=True)
class Picture:
    """A test image with both answers. ``png`` is empty where what was given is not a PNG in base64."""

    name: str
    label: str
    student: str
    student_probability: str
    student_right: bool
    teacher: str | None
    """None: it has no head, and so no answer."""
    teacher_probability: str
    teacher_right: bool
    png: str
    small: bool


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    notes: list[str]
    missing: list[str]
    key_figures: list[KeyFigure]
    machine: str | None
    timed: bool
    sections: list[tuple[str, str]]
    trade: Tradeoff | None
    side_by_side: list[Rows]
    comparison: Table
    speedups: Table
    latency: Table
    bench: LatencySection
    int8: int8.Section
    trainings: list[Training]
    epochs: Table
    examples: list[Picture]
    examples_note: str
    examples_table: Table
    classes: Table
    most_classes: int
    confusion: Matrix | None
    confusion_table: Table
    confused: Table
    calibration: calibration.Section
    words: words.Section
    watched: list[Lines]
    command: str
    details: list[Table]
    folded: list[Table]
    footer: str


def page(report: Report) -> Page:
    side_by_side, comparison = pictures.comparison(report), tables.comparison(report)
    trainings, watched = pictures.trainings(report), pictures.watched(report)
    confused, quest = tables.confused(report), words.section(report)
    classes = class_table(report)
    calibrated, quantized = calibration.section(report), int8.section(report)
    confusion, examples = _matrix(report), _examples(report)
    there = {
        ("comparison", "Comparison"): side_by_side or comparison.rows,
        ("latency", "Latency"): report.bench,
        ("int8", "Int8"): quantized.targets or quantized.recovery.rows,
        ("training", "Training"): trainings,
        ("images", "Test images"): examples,
        ("classes", "Classes"): classes.rows or confused.rows or confusion,
        ("calibration", "Calibration"): calibrated.diagrams,
        ("words", "Words" if quest.table.rows else "Watched"): quest.table.rows or watched,
        ("details", "Details"): True,
    }
    return Page(
        title=summary.title(report),
        lead=summary.lead(report),
        notes=summary.notes(report),
        missing=summary.missing(report),
        key_figures=summary.key_figures(report),
        machine=summary.machine(report),
        timed=bool(threads(report)),
        sections=[section for section, content in there.items() if content],
        trade=pictures.trade(report),
        side_by_side=side_by_side,
        comparison=comparison,
        speedups=tables.speedups(report),
        latency=tables.latency(report),
        bench=latency_section(report),
        int8=quantized,
        trainings=trainings,
        epochs=details.epochs(report),
        examples=examples,
        examples_note=_examples_note(report, len(examples)),
        examples_table=examples_table(examples),
        classes=classes,
        most_classes=MOST_CLASSES,
        confusion=confusion,
        confusion_table=matrix_table(confusion),
        confused=confused,
        calibration=calibrated,
        words=quest,
        watched=watched,
        command=report.command,
        details=[
            details.repeat(report),
            details.stages(report),
            details.training(report),
            training.rounds(report),
            training.reconstruction(report),
            details.store(report),
            details.roles(report),
            details.origins(report),
            details.files(report),
        ],
        folded=[
            details.skipped(report),
            details.duplicates(report),
            details.quantization(report),
            details.method(report),
            details.environment(report),
            details.config(report),
        ],
        footer=_footer(report),
    )


def _matrix(report: Report) -> Matrix | None:
    counts = report.confusion
    return matrix(counts, tables.class_names(report, len(counts))) if counts else None


def matrix(counts: list[list[int]], names: list[str]) -> Matrix | None:
    """None of more classes than can be read."""
    if len(counts) > MOST_MATRIX_CLASSES:
        return None
    rows = []
    for truth, row in enumerate(counts):
        total = sum(row)
        cells = [
            Cell(
                f"{count:,}" if count else "",
                "hit" if truth == answer else "miss" if count else "none",
                round(100 * count / total) if total else 0,
            )
            for answer, count in enumerate(row)
        ]
        rows.append(MatrixRow(names[truth], cells))
    return Matrix(names, rows)


def matrix_table(matrix: Matrix | None) -> Table:
    """The matrix where colours cannot be shown."""
    if matrix is None:
        return Table("Confusion", [], [])
    rows = [[row.name, *(cell.text or "0" for cell in row.cells)] for row in matrix.rows]
    return Table("Confusion: rows are the true classes, columns the answers", ["", *matrix.names], rows)


def _examples(report: Report) -> list[Picture]:
    """The student's mistakes first, the most confident ahead; then right answers, the least sure ahead."""

    def order(one: Example) -> tuple[bool, float, str]:
        right = one.student == one.label
        return right, one.student_probability if right else -one.student_probability, one.name

    return [picture(one) for one in sorted(report.examples, key=order)[:MOST_EXAMPLES]]


def picture(one: Example) -> Picture:
    content, side = png(one.png)
    return Picture(
        name=one.name,
        label=one.label,
        student=one.student,
        student_probability=format.percent(100 * one.student_probability),
        student_right=one.student == one.label,
        teacher=one.teacher,
        teacher_probability=(
            format.MISSING
            if one.teacher_probability is None
            else format.percent(100 * one.teacher_probability)
        ),
        teacher_right=one.teacher == one.label,
        png=content,
        small=side < 100,
    )


def examples_table(pictures: list[Picture]) -> Table:
    """The answers where the pictures cannot be shown."""
    rows = [
        [
            one.name,
            one.label,
            f"{one.student} ({one.student_probability}), {'right' if one.student_right else 'wrong'}",
            format.MISSING
            if one.teacher is None
            else f"{one.teacher} ({one.teacher_probability}), {'right' if one.teacher_right else 'wrong'}",
        ]
        for one in pictures
    ]
    return Table("Test images", ["image", "is", "student", "teacher"], rows, code=frozenset({0}), text=True)


def _examples_note(report: Report, shown: int) -> str:
    wrong = sum(one.student != one.label for one in report.examples)
    both = any(one.teacher is not None for one in report.examples)
    note = f"With the answers of the file that ships{' and of the teacher' if both else ''}, "
    note += "each with its probability. "
    if report.data is not None and task_of(report.data).prediction_note:
        note += f"{task_of(report.data).prediction_note} "
    note += "The student’s mistakes come first, the most confident at the head." if wrong else ""
    if shown < len(report.examples):
        note += f" {shown} of {len(report.examples):,}."
    return note.strip()


def _footer(report: Report) -> str:
    told = f"questpress, report schema {report.schema_version}. "
    told += "The same content is in report.html, report.md and report.json."
    if report.artifact:
        told += f" What ships is in {report.artifact}."
    return told
