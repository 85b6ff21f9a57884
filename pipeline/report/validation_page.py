"""The page of a validation: results of each file, pairwise tests, errors, classes, calibration."""

from collections.abc import Sequence

from ...models.build import show_size
from ..evaluation.predictions import most_confused
from ..evaluation.results import Network, Pair, Validation
from ..runs.results import Subject
from ..runs.scores import Proportion
from ..tasks import load_task
from . import format
from .charts import Chart, Mark, dots
from .networks import Column, score_rows
from .page import MAX_MATRIX_CLASSES, Gallery, KeyFigure, Page, Section, confusion_matrix
from .render import render_page
from .sections import calibration
from .sections.classes import CLASSES_CSV, choose_classes, classes_section, confused_table, picture
from .summary import MAX_DETAILS, describe_machine
from .tables import Attribute, CsvFile, Table, attribute_rows

CALIBRATION_METRICS: dict[str, Attribute] = {
    "NLL": (lambda n: n.calibration, lambda calibration: format.significant(calibration.nll)),
    "ECE": (lambda n: n.calibration, lambda calibration: format.percent(calibration.ece, calibration.n)),
}
MAX_LABEL = 14
"""Letters of a name next to a dot."""


def render_validation(validation: Validation) -> dict[str, str]:
    """Return the page as HTML and as Markdown, by file name."""
    return render_page(validation_page(validation), "validation")


def validation_page(validation: Validation) -> Page:
    remarks = list(validation.notes)
    if machine := describe_machine(validation.environment):
        threads = validation.environment.get("threads")
        remarks.insert(0, f"Evaluated on {machine}" + (f" · {format.threads(threads)}" if threads else ""))
    has_teacher = any(network.teacher is not None for network in validation.networks)
    columns = [
        Column(_key(n), n.name, Subject(name=n.name, weights="", calibration=n.calibration))
        for n in validation.networks
    ]
    return Page(
        kind="validation",
        title=validation.title,
        lead=_lead(validation),
        sections=[
            _results(validation),
            _errors(validation),
            _classes(validation),
            calibration.calibration_section(columns, columns, calibration.describe_all(columns)).fold(),
            _details(validation).fold(),
        ],
        footer="questpress. validation.html, validation.md and validation.json have the same content; "
        "mistakes.csv has every error"
        + (" and differences.csv every disagreement of a file with its teacher." if has_teacher else "."),
        data_file="validation.json",
        warnings=validation.warnings,
        key_figures=_key_figures(validation),
        remarks=remarks,
    )


def _lead(validation: Validation) -> str:
    students = sum(network.role == "student" for network in validation.networks)
    return (
        f"{format.plural(students, 'file')} evaluated on {format.images(validation.n, validation.split)} "
        f"of {validation.data}, {format.plural(len(validation.per_class), 'class', 'classes')}"
        f"{load_task(validation.task).labels_note}, in ONNX Runtime with the session options of deployment."
    )


def _key_figures(validation: Validation) -> list[KeyFigure]:
    first, figures = validation.first, []
    if (score := first.score) is not None:
        details = [f"95 % interval {format.score_interval(score)}"]
        if score.correct is not None:
            details.append(f"{score.correct:,} of {format.plural(score.n, 'image')} correct")
        details += [f"{network.name} {format.score(network.score)}" for network in validation.networks[1:]]
        meaning = f"{load_task(validation.task).metric} of {first.name}"
        figures.append(KeyFigure(format.score_percent(score), meaning, details))
    if (agreement := first.agreement) is not None:
        details = [
            f"95 % interval {format.score_interval(agreement)}",
            f"different on {format.plural(agreement.n - agreement.correct, 'image')}",
        ]
        figures.append(KeyFigure(format.score_percent(agreement), "agreement with the teacher", details))
    if (measured := first.calibration) is not None:
        interval = format.percent_interval(measured.ece_low, measured.ece_high, measured.n)
        details = [f"95 % interval {interval}", calibration.verdict(measured)]
        ece = format.percent(measured.ece, measured.n)
        figures.append(KeyFigure(ece, "expected calibration error", details))
    return figures


def _results(validation: Validation) -> Section:
    charts = [_score_chart(validation), _recall_chart(validation.first)]
    tables = [results_table(validation), pairs_table(validation)]
    return Section("Results", "results", figures=charts, tables=tables)


def _key(network: Network) -> str:
    """Return the network's key in the style sheet."""
    student = "student" if network.precision == "fp32" else "student_int8"
    return "teacher" if network.role == "teacher" else student


def _score_chart(validation: Validation) -> Chart | None:
    marks = [
        Mark(_cut(n.name), _key(n), s.percent, format.score_percent(s), s.low, s.high)
        for n in validation.networks
        if (s := n.score) is not None
    ]
    return dots(format.title(load_task(validation.task).metric), marks, "line: 95 % interval")


def _recall_chart(network: Network) -> Chart | None:
    if len(network.per_class) > MAX_MATRIX_CLASSES:
        return None
    marks = [
        Mark(_cut(c.label), _key(network), r.percent, format.percent(r.percent), r.low, r.high)
        for c in network.per_class
        if (r := c.recall) is not None
    ]
    return dots("Recall by class", marks, f"{network.name}; line: 95 % interval")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def results_table(validation: Validation) -> Table:
    """Return a row for each measure that a file has, and a column for each file."""
    networks = validation.networks
    attributes: dict[str, Attribute] = {
        "Agreement with teacher": (lambda n: n.agreement, format.score),
        **CALIBRATION_METRICS,
        "ONNX file": (lambda n: n.bytes, format.megabytes),
    }
    rows = [*score_rows([n.score for n in networks]), *attribute_rows(networks, attributes)]
    return Table("Results", ["", *(network.name for network in networks)], rows)


def terminal_table(validation: Validation) -> Table:
    """Return a row for each file, for 80 columns."""
    networks = validation.networks
    attributes = CALIBRATION_METRICS | {"agreement": (lambda n: n.agreement, format.score_percent)}
    columns = [*score_rows([n.score for n in networks], MAX_DETAILS), *attribute_rows(networks, attributes)]
    names = [column[0] for column in columns]
    rows = [[n.name, *(column[1 + i] for column in columns)] for i, n in enumerate(networks)]
    return Table(validation.title, ["", *names], rows)


def pairs_table(validation: Validation) -> Table:
    """Return the tests of every two files on the same images."""
    rows = [
        [
            f"{pair.first} vs. {pair.second}",
            format.count(pair.first_alone),
            format.count(pair.second_alone),
            format.points(pair.points, validation.n),
            format.p_value(pair.p),
            format.p_value(pair.p_holm),
            describe_verdict(pair),
        ]
        for pair in validation.pairs
    ]
    task, columns = load_task(validation.task), ["", "only first", "only second", "difference"]
    note = f"{format.capitalize(task.test_name)}."
    if any(pair.first_alone is not None for pair in validation.pairs):
        note += " Only first, only second: images that only this file classifies correctly. "
        note += task.prediction_note
    else:
        del columns[1:3]
        rows = [[row[0], *row[3:]] for row in rows]
    note = f"{note.strip()} Verdict at p < 0.05 after Holm’s correction."
    return Table("Pairwise tests", [*columns, "p", "p (Holm)", "verdict"], rows, note=note)


def describe_verdict(pair: Pair) -> str:
    return "not significant" if pair.verdict == "no difference" else pair.verdict


def describe_pair(pair: Pair, n: int) -> str:
    """int8 vs. fp32: −0.3 points, not significant (p = 1.000)."""
    difference = f"{format.points(pair.points, n)}, {describe_verdict(pair)}"
    return f"{pair.first} vs. {pair.second}: {difference} ({format.p_equals(pair.p_holm)})"


def _errors(validation: Validation) -> Section:
    first, shown = validation.first, len(validation.examples)
    task = load_task(validation.task)
    text = f"{first.name} is wrong on {format.plural(first.mistakes, 'image')}"
    text += f", {task.errors_order}" if first.mistakes > 1 else ""
    text += f"; {shown} are shown, all are in mistakes.csv" if shown < first.mistakes else ""
    text += f". {task.prediction_note} {task.picture_note}"
    gallery = Gallery("Errors", [picture(example) for example in validation.examples])
    return Section("Errors", "errors", text=[text.strip()], figures=[gallery] if shown else [])


def _classes(validation: Validation) -> Section:
    first, task = validation.first, load_task(validation.task)
    caption = f"Rows: true class. Columns: prediction of {first.name}. Numbers: images."
    matrix = confusion_matrix(first.confusion, first.classes, caption)
    own, *others = [
        class_table(network, validation.networks, task.counted) for network in validation.networks
    ]
    pairs = confused_table(most_confused(first.confusion or [], first.classes))
    return classes_section(matrix, first.score, own, pairs, others)


def class_table(network: Network, networks: Sequence[Network], counted: str = "images") -> Table:
    """Return recall and precision of each class with their intervals, F1, and the task's class score.

    They count what ``counted`` names. The CSV file of many classes has those of all ``networks``.
    """
    score = network.score
    # An accuracy of a class is its recall.
    decoded = {s.label: s for s in score.classes} if score is not None and score.correct is None else {}
    measures, rows = {measure.label: measure for measure in network.per_class}, []
    recall = {name: measure.recall.percent for name, measure in measures.items() if measure.recall}
    names, cut = choose_classes(list(measures), recall)
    for measure in map(measures.__getitem__, names):
        row = [measure.label, format.count(measure.n)]
        row += [*_interval(measure.recall), *_interval(measure.precision), format.percent(measure.f1)]
        if decoded:
            own = decoded.get(measure.label)
            row.append(format.MISSING if own is None else format.percent(own.percent, own.n))
        rows.append(row)
    columns = ["class", counted, "recall", "95 % interval", "precision", "95 % interval", "F1"]
    columns += ["average precision"] if decoded else []
    csv = [
        [n.name, m.label, m.n, m.predicted, m.correct, m.f1]
        for n in (networks if cut else ())
        for m in n.per_class
    ]
    heads = ["model", "class", counted, "predicted", "correct", "F1"]
    file = CsvFile(CLASSES_CSV, [heads, *csv]) if cut else None
    return Table(f"Results by class, {network.name}", columns, rows, note=cut, csv=file)


def _interval(value: Proportion | None) -> tuple[str, str]:
    if value is None:
        return format.MISSING, format.MISSING
    return format.percent(value.percent), format.percent_interval(value.low, value.high)


def _details(validation: Validation) -> Section:
    files = [
        [
            network.name,
            network.file,
            network.source,
            f"{show_size(network.image_size)} px",
            format.megabytes(network.bytes),
            network.sha256,
            "" if network.fused else f"made for {network.target}; evaluated without integer kernels",
        ]
        for network in validation.networks
    ]
    columns = ["", "file", "path", "image", "size", "SHA-256", "note"]
    skipped = [[name, reason] for name, reason in validation.skipped]
    return Section(
        "Details",
        "details",
        command=validation.command,
        tables=[Table("Files", columns, files, code=frozenset({1, 2, 5}), text=True)],
        folded=[Table("Skipped files", ["file", "reason"], skipped, code=frozenset({0}), text=True)],
    )
