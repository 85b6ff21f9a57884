"""The page of a validation: what each file made of the images, against each other, and what it has wrong."""

from collections.abc import Callable
from dataclasses import dataclass

from ..results import Report, Subject
from ..scores import Accuracy, Score
from ..validation.results import ClassMeasure, Network, Pair, Validation
from . import calibration, figures
from .charts import Mark, Rows, dots
from .headline import KeyFigure, machine, score_in_words
from .page import (
    MOST_CLASSES,
    MOST_MATRIX_CLASSES,
    Matrix,
    Picture,
    examples_table,
    matrix,
    matrix_table,
    picture,
)
from .subjects import Column
from .tables import Table
from .write import as_html, as_markdown

MOST_CONFUSED = 20
ROLES = {
    "train": "training images",
    "select": "select images",
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
    tables = [classes(one) for one in found.networks]
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
        networks=networks(found),
        pairs=pairs(found),
        examples=pictures,
        examples_note=_mistakes(found),
        examples_table=examples_table(pictures),
        classes=tables[0],
        other_classes=tables[1:],
        most_classes=MOST_CLASSES,
        confusion=confusion,
        confusion_caption=f"Rows: true class. Columns: answer of {first.name}. Numbers: images.",
        confusion_table=matrix_table(confusion),
        confused=confused(first),
        calibration=calibrated,
        command=found.command,
        files=_files(found),
        skipped=_skipped(found),
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
    return f"{told} · {figures.threads(threads)}" if told and threads else told


def measure(found: Validation) -> str:
    return "mAP" if found.multi_label else "accuracy"


def _taught(found: Validation) -> bool:
    return any(one.teacher is not None for one in found.networks)


def _lead(found: Validation) -> str:
    students = sum(one.role == "student" for one in found.networks)
    told = f"{figures.counted(students, 'file')} asked about {figures.count(found.n)} {ROLES[found.role]} "
    told += f"of {found.data}, {figures.counted(len(found.per_class), 'class', 'classes')}"
    told += ", several of which an image may show" if found.multi_label else ""
    return f"{told}, in ONNX Runtime with the options that ship."


def _key_figures(found: Validation) -> list[KeyFigure]:
    first, score = found.first, found.first.score
    known = []
    if score is not None:
        lines = [f"95 % interval {figures.percent_interval(score.low, score.high, score.n)}"]
        if isinstance(score, Accuracy):
            lines.append(f"{score.correct:,} of {figures.counted(score.n, 'image')}")
        lines += [f"{one.name} {score_in_words(one.score)}" for one in found.networks[1:]]
        known.append(
            KeyFigure(figures.percent(score.percent, score.n), f"{measure(found)} of {first.name}", lines)
        )
    if first.agreement is not None:
        one = first.agreement
        known.append(
            KeyFigure(
                figures.percent(one.top1, one.n),
                f"{'the same labels' if found.multi_label else 'the same answer'} as the teacher",
                [
                    f"95 % interval {figures.percent_interval(one.low, one.high, one.n)}",
                    f"different on {figures.counted(one.n - one.correct, 'image')}",
                ],
            )
        )
    if first.calibration is not None:
        measured = first.calibration
        known.append(
            KeyFigure(
                figures.percent(measured.ece, measured.n),
                "expected calibration error",
                [
                    "95 % interval "
                    f"{figures.percent_interval(measured.ece_low, measured.ece_high, measured.n)}",
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
            figures.percent(score.percent, score.n),
            score.low,
            score.high,
        )
        for one in found.networks
        if (score := one.score) is not None
    ]
    title = "mAP" if found.multi_label else "Accuracy"
    return dots(title, marks, "line: 95 % interval; the axis does not start at 0")


def _recall(network: Network) -> Rows | None:
    """Of a few classes, each with its interval."""
    if len(network.per_class) > MOST_MATRIX_CLASSES:
        return None
    marks = [
        Mark(
            _cut(one.label, 14), _key(network), share.top1, figures.percent(share.top1), share.low, share.high
        )
        for one in network.per_class
        if (share := one.recall) is not None
    ]
    return dots("Recall by class", marks, f"{network.name}; line: 95 % interval")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def networks(found: Validation) -> Table:
    """Measures down, files across; a measure nobody has is left out."""
    every = found.networks

    def row(name: str, value: Callable[[Network], str | None]) -> list[list[str]]:
        values = [value(one) for one in every]
        return [[name, *(one or figures.MISSING for one in values)]] if any(values) else []

    rows = row("mAP" if found.multi_label else "Accuracy", lambda one: _percent(one.score))
    rows += row("95 % interval", lambda one: _interval(one.score))
    rows += row("Right", lambda one: _counts(one.accuracy))
    rows += row("Mean over classes", lambda one: _balanced(one.accuracy))
    rows += row("Top-5 accuracy", lambda one: _percent(one.top5))
    rows += row("… 95 % interval", lambda one: _interval(one.top5))
    rows += row("F1 of all labels", lambda one: _of_labels(one, "micro_f1"))
    rows += row("F1, mean over classes", lambda one: _of_labels(one, "macro_f1"))
    rows += row("Agreement with the teacher", lambda one: _percent(one.agreement))
    rows += row("… 95 % interval", lambda one: _interval(one.agreement))
    rows += row("NLL", lambda one: figures.significant(one.calibration.nll) if one.calibration else None)
    rows += row("ECE", lambda one: figures.percent(one.calibration.ece, found.n) if one.calibration else None)
    rows += row("ONNX file", lambda one: figures.megabytes(one.bytes))
    return Table("Files", ["", *(one.name for one in every)], rows)


def _percent(score: Score | None) -> str | None:
    return figures.percent(score.percent, score.n) if score else None


def _interval(score: Score | None) -> str | None:
    return figures.percent_interval(score.low, score.high, score.n) if score else None


def _counts(accuracy: Accuracy | None) -> str | None:
    return f"{accuracy.correct:,} of {accuracy.n:,}" if accuracy else None


def _balanced(accuracy: Accuracy | None) -> str | None:
    known = accuracy is not None and accuracy.balanced is not None
    return figures.percent(accuracy.balanced, accuracy.n) if accuracy and known else None


def _of_labels(one: Network, measured: str) -> str | None:
    score = one.multi_label
    return figures.percent(getattr(score, measured), score.n) if score else None


def pairs(found: Validation) -> Table:
    """Every two files on the same images."""
    rows = [
        [
            f"{one.first} against {one.second}",
            f"{one.first_alone:,}",
            f"{one.second_alone:,}",
            figures.points(one.points, found.n),
            p_value(one.p),
            p_value(one.p_holm),
            in_words(one),
        ]
        for one in found.pairs
    ]
    exact = ", its labels being the very ones" if found.multi_label else ""
    note = (
        f"McNemar’s exact test: how many images one file alone has right{exact}. "
        "The word goes by p corrected for the number of pairs (Holm), at 5 %."
    )
    names = ["", "first alone", "second alone", "difference", "p", "p, Holm", ""]
    return Table("In pairs, on the same images", names, rows, note=note)


def in_words(one: Pair) -> str:
    """A pair's verdict: no difference that these images can tell is not the same as none."""
    return "no measurable difference" if one.verdict == "no difference" else one.verdict


def told(one: Pair, n: int) -> str:
    """int8 against fp32: −0.3 points, no measurable difference (p = 1.000)."""
    p = p_value(one.p_holm)
    p = f"p {p}" if p.startswith("<") else f"p = {p}"
    return f"{one.first} against {one.second}: {figures.points(one.points, n)}, {in_words(one)} ({p})"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def classes(network: Network) -> Table:
    """A row per class: recall and precision with their intervals."""
    precise = {one.label: one for one in network.multi_label.classes} if network.multi_label else {}
    rows = []
    for one in network.per_class:
        row = [one.label, figures.count(one.n), *_share(one.recall), *_share(one.precision), _f1(one)]
        if precise:
            of = precise.get(one.label)
            row.append(figures.MISSING if of is None else figures.percent(of.average_precision, of.n))
        rows.append(row)
    names = ["class", "images", "recall", "95 % interval", "precision", "95 % interval", "F1"]
    note = "Recall: of a class’s images, those that are answered so. Precision: of the answers, those right."
    return Table(
        f"By class, {network.name}", [*names, *(["average precision"] if precise else [])], rows, note=note
    )


def _share(share: Accuracy | None) -> tuple[str, str]:
    if share is None:
        return figures.MISSING, figures.MISSING
    return figures.percent(share.top1), figures.percent_interval(share.low, share.high)


def _f1(one: ClassMeasure) -> str:
    return figures.percent(one.f1)


def confused(network: Network) -> Table:
    """The pairs of classes that are confused most often."""
    rows = [
        [one.label, one.answer, figures.count(one.n), figures.percent(one.share)]
        for one in network.confused[:MOST_CONFUSED]
    ]
    more = len(network.confused) - len(rows)
    note = f"The {MOST_CONFUSED} most frequent; validation.json has more." if more > 0 else ""
    return Table("Most confused", ["true class", "answer", "images", "of the class"], rows, note=note, left=2)


def _mistakes(found: Validation) -> str:
    first, shown = found.first, len(found.examples)
    told = f"The file {first.name} has {figures.counted(first.mistakes, 'image')} wrong"
    told += ", the surest answers first" if first.mistakes > 1 else ""
    told += f"; here are {shown}, all are in mistakes.csv" if shown < first.mistakes else ""
    told += ". Each with its probability" + (
        ", that of exactly these labels, were they independent of each other." if found.multi_label else "."
    )
    return told


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


def _files(found: Validation) -> Table:
    rows = [
        [
            one.name,
            one.file,
            one.source,
            f"{one.image_size} px",
            figures.megabytes(one.bytes),
            one.sha256,
            "" if one.fused else f"made for {one.target}, asked without integer kernels",
        ]
        for one in found.networks
    ]
    names = ["", "file", "named as", "image", "size", "sha256", "how"]
    return Table("Files asked", names, rows, code=frozenset({1, 2, 5}), text=True)


def _skipped(found: Validation) -> Table:
    rows = [[name, reason] for name, reason in found.skipped]
    return Table("Left out", ["file", "why"], rows, code=frozenset({0}), text=True)
