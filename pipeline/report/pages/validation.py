"""The page of a validation: what each file made of the images, against each other, and what it has wrong."""

from dataclasses import dataclass

from ...evaluation.results import Network, Validation
from ...runs.results import Report, Subject
from ...tasks import TASKS
from ..sections import calibration
from .. import format, validation_tables
from ..charts import Mark, Rows, dots
from ..summary import KeyFigure, machine, score_in_words
from .run import MOST_CLASSES, MOST_MATRIX_CLASSES, Matrix, Picture, examples_table, matrix, matrix_table, picture
from ..networks import Column
from ..tables import Table
from ..render import as_html, as_markdown

ROLES = {
    "train": "training images",
    "val": "val images",
    "test": "test images",
    "all": "images",
}


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    notes: list[str]
    remarks: list[str]
    key_figures: list[KeyFigure]
    machine: str | None
    sections: list[tuple[str, str]]
    charts: list[Rows]
    networks: Table
    pairs: Table
    examples: list[Picture]
    examples_note: str
    examples_table: Table
    classes: Table
    other_classes: list[Table]
    most_classes: int
    confusion: Matrix | None
    confusion_caption: str
    confusion_table: Table
    confused: Table
    calibration: calibration.Section
    command: str
    files: Table
    skipped: Table
    footer: str


def pages(found: Validation) -> dict[str, str]:
    """File name -> the page, as HTML and as Markdown; every text is escaped."""
    shown = page(found)
    return {
        "validation.html": as_html("validation.html.j2", shown),
        "validation.md": as_markdown("validation.md.j2", shown),
    }


def page(found: Validation) -> Page:
    """What the page shows, in reading order."""
    first = found.first
    pictures = [picture(one) for one in found.examples]
    confusion = matrix(first.confusion, first.classes) if first.confusion else None
    tables = [validation_tables.classes(one) for one in found.networks]
    calibrated = _calibration(found)
    there = {
        ("files", "Files"): True,
        ("mistakes", "Mistakes"): pictures,
        ("classes", "Classes"): True,
        ("calibration", "Calibration"): calibrated.diagrams,
        ("details", "Details"): True,
    }
    return Page(
        title=found.title,
        lead=_lead(found),
        notes=found.warnings,
        remarks=found.notes,
        key_figures=_key_figures(found),
        machine=machine_line(found.environment),
        sections=[section for section, content in there.items() if content],
        charts=[chart for chart in (_scores(found), _recall(first)) if chart is not None],
        networks=validation_tables.networks(found),
        pairs=validation_tables.pairs(found),
        examples=pictures,
        examples_note=_mistakes(found),
        examples_table=examples_table(pictures),
        classes=tables[0],
        other_classes=tables[1:],
        most_classes=MOST_CLASSES,
        confusion=confusion,
        confusion_caption=f"Rows: true class. Columns: answer of {first.name}. Numbers: images.",
        confusion_table=matrix_table(confusion),
        confused=validation_tables.confused(first),
        calibration=calibrated,
        command=found.command,
        files=validation_tables.files(found),
        skipped=validation_tables.skipped(found),
        footer="questpress. The same content is in validation.html, validation.md and validation.json; "
        "every mistake is in mistakes.csv"
        + (
            ", and every image on which a file and its teacher differ in differences.csv."
            if _taught(found)
            else "."
        ),
    )


def machine_line(environment: dict[str, str]) -> str | None:
    """The machine in one line."""
    told = machine(Report(title="", command="", method="", image_size=1, environment=environment))
    threads = environment.get("threads")
    return f"{told} · {format.threads(threads)}" if told and threads else told


def measure(found: Validation) -> str:
    return TASKS[found.task].metric


def _taught(found: Validation) -> bool:
    return any(one.teacher is not None for one in found.networks)


def _lead(found: Validation) -> str:
    students = sum(one.role == "student" for one in found.networks)
    told = f"{format.counted(students, 'file')} asked about {format.count(found.n)} {ROLES[found.role]} "
    told += f"of {found.data}, {format.counted(len(found.per_class), 'class', 'classes')}"
    told += TASKS[found.task].labels_note
    return f"{told}, in ONNX Runtime with the options that ship."


def _key_figures(found: Validation) -> list[KeyFigure]:
    first, score = found.first, found.first.score
    known = []
    if score is not None:
        lines = [f"95 % interval {format.percent_interval(score.low, score.high, score.n)}"]
        if score.correct is not None:
            lines.append(f"{score.correct:,} of {format.counted(score.n, 'image')}")
        lines += [f"{one.name} {score_in_words(one.score)}" for one in found.networks[1:]]
        known.append(
            KeyFigure(format.percent(score.percent, score.n), f"{measure(found)} of {first.name}", lines)
        )
    if first.agreement is not None:
        one = first.agreement
        known.append(
            KeyFigure(
                format.percent(one.percent, one.n),
                "agreement with the teacher",
                [
                    f"95 % interval {format.percent_interval(one.low, one.high, one.n)}",
                    f"different on {format.counted(one.n - one.correct, 'image')}",
                ],
            )
        )
    if first.calibration is not None:
        measured = first.calibration
        known.append(
            KeyFigure(
                format.percent(measured.ece, measured.n),
                "expected calibration error",
                [
                    "95 % interval "
                    f"{format.percent_interval(measured.ece_low, measured.ece_high, measured.n)}",
                    calibration.verdict(measured),
                ],
            )
        )
    return known


def _key(one: Network) -> str:
    """Names its colour in the style sheet."""
    if one.role == "teacher":
        return "teacher"
    return "student" if one.precision == "fp32" else "student_int8"


def _scores(found: Validation) -> Rows | None:
    marks = [
        Mark(
            _cut(one.name, 14),
            _key(one),
            score.percent,
            format.percent(score.percent, score.n),
            score.low,
            score.high,
        )
        for one in found.networks
        if (score := one.score) is not None
    ]
    return dots(format.title(measure(found)), marks, "line: 95 % interval")


def _recall(network: Network) -> Rows | None:
    """Of a few classes, each with its interval."""
    if len(network.per_class) > MOST_MATRIX_CLASSES:
        return None
    marks = [
        Mark(
            _cut(one.label, 14), _key(network), share.percent, format.percent(share.percent), share.low, share.high
        )
        for one in network.per_class
        if (share := one.recall) is not None
    ]
    return dots("Recall by class", marks, f"{network.name}; line: 95 % interval")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _mistakes(found: Validation) -> str:
    first, shown = found.first, len(found.examples)
    told = f"The file {first.name} has {format.counted(first.mistakes, 'image')} wrong"
    told += ", the surest answers first" if first.mistakes > 1 else ""
    told += f"; here are {shown}, all are in mistakes.csv" if shown < first.mistakes else ""
    return f"{told}. Each with its probability. {TASKS[found.task].prediction_note}".rstrip()


def _calibration(found: Validation) -> calibration.Section:
    columns = [
        Column(_key(one), f"File {one.name}", Subject(name=one.name, weights="", calibration=one.calibration))
        for one in found.networks
    ]
    measured = [(column, one) for column in columns if (one := column.subject.calibration) is not None]
    diagrams = [calibration.diagram(column, one) for column, one in measured]
    told = " ".join(calibration.reading(column, one) for column, one in measured)
    caption = calibration.caption(diagrams).replace("the test images’ answers", "the answers")
    return calibration.Section(told, diagrams, caption, calibration.table_of(columns))
