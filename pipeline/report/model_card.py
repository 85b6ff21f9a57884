"""The artifact's README.md: a model card in the form of Hugging Face's hub, and how to run what ships.

It is made of the report and the manifest alone, says nothing of the machine but its processor, and is written
anew whenever more is known; the same run gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...export.artifact import write_predict
from ...export.runtime import UINT8, Preprocessing, read_manifest
from ...export.text import spelled_out
from ..runs.files import write_if_changed
from ..runs.results import Report, Subject
from .sections import calibration
from . import format, tables
from .bench_tables import percentiles
from .card_front import front
from .summary import in_words, machine, score_in_words, title
from .sections.int8 import LEARNED
from .networks import Column, every, measure, of, pace, shipped, threads
from .tables import Table
from .render import as_markdown, as_plain, writable

README = "README.md"

MOST_CLASSES = 40


@dataclass(frozen=True)
class Card:
    front: str
    title: str
    lead: str
    details: Table
    classes: str
    making: list[str]
    limits: list[str]
    evaluation: Table
    measured: list[str]
    latency: Table
    timed: str
    steps: list[str]
    on_a_pi: str
    side: int
    cpp: str
    image: str = "photo.jpg"


def write_beside(report: Report, folder: Path) -> None:
    """Write README.md and predict.py into an artifact folder, each whole or not at all.

    Raises:
        ArtifactError: there is no manifest, or it is damaged.
        JobError: the folder cannot be written; of predict.py, ExportError.
    """
    _, manifest = read_manifest(folder)
    write_predict(folder)
    write_if_changed(folder / README, card(writable(report), manifest))


def card(report: Report, manifest: Mapping[str, Any]) -> str:
    """The text of README.md for an artifact folder with this manifest."""
    return as_markdown("card.md.j2", _card(report, manifest))


def _card(report: Report, manifest: Mapping[str, Any]) -> Card:
    p = Preprocessing.from_dict(manifest["preprocessing"])
    several, pixels = manifest.get("task") is not None, manifest.get("input") == UINT8
    return Card(
        front=spelled_out(front(report, manifest), but="\n"),
        title=title(report),
        lead=_lead(report, manifest),
        details=_details(report, manifest, p),
        classes=_classes(manifest["labels"]),
        making=_making(report, manifest),
        limits=_limits(report, several=several),
        evaluation=_evaluation(report),
        measured=_measured(report),
        latency=tables.latency(report) if report.bench is None else percentiles(report.bench),
        timed=_timed(report),
        steps=_steps(p, pixels=pixels),
        on_a_pi=_on_a_pi(manifest),
        side=p.size,
        cpp=as_plain(
            "classify.cpp.j2",
            side=p.size,
            mean=[f"{value!r}f" for value in p.mean],
            std=[f"{value!r}f" for value in p.std],
            pixels=pixels,
            several=several,
            input="input",
            output="logits",
        ),
    )


def _lead(report: Report, manifest: Mapping[str, Any]) -> str:
    ships, p = shipped(report), manifest["preprocessing"]
    size = format.megabytes(manifest["files"][0]["bytes"])
    told = f"Tells {format.counted(len(manifest['labels']), 'class', 'classes')} apart in images of "
    told += f"{p['size']} × {p['size']} pixels, with a file of {size}."
    if ships is not None and ships.subject.score is not None:
        told += f" Its {measure(report)} on {ships.subject.score.n:,} test images is "
        told += f"{score_in_words(ships.subject.score)}."
    return f"{told} Made by questpress."


def _details(report: Report, manifest: Mapping[str, Any], p: Preprocessing) -> Table:
    """A row for each file."""
    rows = []
    for entry in manifest["files"]:
        accuracy = entry["accuracy"] or {}
        score = accuracy.get("top1", accuracy.get("map"))
        rows.append(
            [
                entry["name"],
                entry["precision"],
                entry["target"] or "any",
                format.megabytes(entry["bytes"]),
                format.percent(score, accuracy.get("n")),
                f"{entry['opset']}, IR {entry['ir_version']}",
            ]
        )
    network = shipped(report)
    note = f"The network is timm’s {manifest['origin']['student']}"
    if network is not None and network.subject.parameters is not None:
        note += f", {format.millions(network.subject.parameters)} parameters"
    note += f". Input: {p.size} × {p.size} pixels, RGB. SHA-256 of each file: manifest.json."
    columns = ["file", "precision", "processor", "size", measure(report), "opset"]
    return Table("Files", columns, rows, code=frozenset({0}), text=True, note=note)


def _classes(labels: Sequence[str]) -> str:
    if len(labels) > MOST_CLASSES:
        told = ", ".join(labels[:MOST_CLASSES])
        return f"{told}, … {len(labels):,} in all; manifest.json lists them in the order of the logits."
    return ", ".join(labels)


def _making(report: Report, manifest: Mapping[str, Any]) -> list[str]:
    origin, data = manifest["origin"], report.data
    told = []
    if report.method != "none":
        for one in report.teachers:
            told.append(f"Teacher: {_network(one)}.")
    if report.student is not None:
        told.append(f"Student: {_network(report.student)}.")
    method = "plain training, without a teacher" if report.method == "none" else report.method
    source = f" ({report.method_source})" if report.method_source else ""
    learned = sum(1 for epoch in report.epochs if epoch.stage == "student")
    epochs = f", {format.counted(learned, 'epoch')}" if learned else ""
    told.append(f"Method: {method}{source}{epochs}.")
    recovered = [one for search in report.int8 for one in search.tried if one.name == LEARNED and one.ships]
    if report.recovery is not None and recovered:
        told.append(
            f"The int8 file learned on for {format.counted(report.recovery.epochs, 'epoch')} under fake "
            "quantization: its weights are not those of the float file."
        )
    if report.config.get("ema") or report.config.get("average_last"):
        told.append("The weights that ship are a mean over the last part of the training.")
    if (rounds := report.config.get("rounds", 1)) > 1:
        told.append(
            f"Rounds: {rounds}, each with a new student; from the second on the student of the one before is "
            "the teacher. The last one ships."
        )
    if data is not None:
        told.append(
            f"Images: {data.name}; {data.train:,} to train, {data.val:,} to val, {data.test:,} to "
            "test. No image has two of these roles."
        )
    if "temperature" in origin:
        told.append(f"The logits are divided by a temperature of {origin['temperature']:.3g}.")
    versions = ", ".join(f"{name} {value}" for name, value in sorted(manifest["versions"].items()))
    told.append(f"Written by {versions}.")
    return told


def _network(one: Subject) -> str:
    licence = f", {one.licence}" if one.licence else ""
    return f"{one.name}, whose weights started from {one.weights}{licence}"


def _limits(report: Report, *, several: bool) -> list[str]:
    told = [
        "For images like those it was trained on: on others it may be worse than the figures below, which "
        "no test on one set of images can tell.",
        (
            "It knows its classes and nothing else: an image of none of them may still get one."
            if several
            else "It knows its classes and nothing else: of any image it names one of them."
        ),
    ]
    ships = shipped(report)
    if ships is None:
        return told
    classes = ships.subject.score.classes if ships.subject.score is not None else []
    worst = sorted(
        (one.percent, one.label, one.n) for one in classes if one.percent is not None and one.percent < 100
    )[:3]
    if len(classes) > 2 and worst:
        found = ", ".join(f"{label} ({format.percent(percent)} of {n:,})" for percent, label, n in worst)
        told.append(f"Weakest at: {found}.")
    if ships.subject.calibration is not None:
        told.append(calibration.reading(ships, ships.subject.calibration))
    return told


def _evaluation(report: Report) -> Table:
    rows = [
        [
            column.role,
            format.percent(score.percent, score.n),
            format.percent_interval(score.low, score.high, score.n),
            f"{score.correct:,} of {score.n:,}" if score.correct is not None else f"{score.n:,}",
            _agreement(column),
        ]
        for column in every(report)
        if (score := column.subject.score) is not None
    ]
    columns = ["", measure(report), "95 % interval", "test images", "answers like the teacher"]
    return Table("Evaluation", columns, rows)


def _agreement(column: Column) -> str:
    found = column.subject.agreement
    return format.percent(found.percent, found.n) if found else format.MISSING


def _measured(report: Report) -> list[str]:
    """How the figures are to be read."""
    ships = shipped(report)
    told = [
        "Measured in ONNX Runtime on the very files of this folder, on test images that had no part in the "
        "training; the teacher’s are those of its weights."
    ]
    if ships is not None and ships.subject.score is not None and ships.subject.score.correct is not None:
        told.append("Intervals are Wilson’s.")
    return told


def _timed(report: Report) -> str:
    where, ships, found = machine(report), shipped(report), []
    for over in (of(report, "teacher"), of(report, "student")):
        for count in threads(report):
            if over is None or ships is None or over.key == ships.key:
                continue
            one = pace(ships, over, count)
            if one is not None:
                found.append(
                    f"{ships.role} against {over.role.lower()}, {format.threads(count)}: {in_words(one)}."
                )
    return " ".join([f"On {where}." if where else "", *found]).strip()


def _steps(p: Preprocessing, *, pixels: bool) -> list[str]:
    size, resize = f"{p.size} × {p.size}", f"{p.resize} × {p.resize}"
    fit = {
        "center": f"Resize the short side to {p.resize} pixels",
        "squash": f"Resize to {resize} pixels whatever the shape",
        "border": f"Resize the long side to {p.resize} pixels and fill with the mean colour",
    }[p.crop_mode]
    told = [
        "Decode to RGB, upright as EXIF says; transparent pixels on white.",
        f"{fit}, with Pillow’s {p.interpolation} filter, antialiased; another filter costs accuracy.",
        f"Cut the middle {size} pixels.",
    ]
    numbers = (", ".join(f"{value:g}" for value in values) for values in (p.mean, p.std))
    if pixels:
        return [*told, f"Feed the pixels as they are: uint8 [batch, {p.size}, {p.size}, 3]."]
    told.append("Divide by 255, subtract the mean ({}), divide by the deviation ({}).".format(*numbers))
    return [*told, f"Feed float32 [batch, 3, {p.size}, {p.size}]."]


def _on_a_pi(manifest: Mapping[str, Any]) -> str:
    arm = next((entry["name"] for entry in manifest["files"] if entry["target"] == "arm64"), None)
    if arm is None:
        return (
            "No int8 file of this folder is made for its processor, so the fp32 file answers; "
            "compress export RUN --target arm64 makes one."
        )
    return (
        f"There {arm} answers, which is made for its processor. A Pi 3 or 4 lacks the dot-product "
        "instructions that make int8 fast: try --file student.onnx there too."
    )
