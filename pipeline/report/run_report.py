"""Write the report of a run, and the README.md of its artifact.

README.md is a model card for the Hugging Face Hub with instructions for using the artifact. It depends on the
report and the manifest only, and names nothing of the machine but its processor.
"""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...export.artifact import CARD, write_runtime
from ...export.runtime import UINT8, Preprocessing, height_width, read_manifest
from ...export.text import escape_controls
from ..evaluation.calibration import Sigmoid
from ..runs.files import write_if_changed
from ..runs.folder import RunFolder
from ..runs.record import check_readable
from ..runs.results import Report
from ..runs.scores import ClassScore
from ..tasks import load_task
from . import format, networks, summary
from .assemble import assemble, make_writable
from .page import Page
from .render import render_markdown_template, render_page, render_plain_template
from .sections import calibration, classes, details, int8, latency, training
from .tables import Table

FILES = ("report.html", "report.md", "report.json")
MIN_INTERVAL, MAX_FRACTION = 5.0, 0.01
"""Seconds between reports during a training, and their fraction of its time."""
MAX_CLASSES = 40
HUB_LICENSES = {
    "apache-2.0",
    "apple-amlr",
    "apple-ascl",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "gemma",
    "mit",
}
"""Identifiers of the Hugging Face Hub among the licenses of timm's weights. It refuses cards with others."""
MAX_WEAK_CLASSES = 3


def report_page(report: Report) -> Page:
    missing = summary.list_missing(report)
    remarks = [f"Not in this report yet: {', '.join(missing)}."] if missing else []
    if machine := summary.describe_machine(report.environment):
        remarks.append(f"{'Benchmarked' if networks.thread_counts(report) else 'Run'} on {machine}")
    footer = f"questpress, report schema {report.schema_version}. "
    footer += "report.html, report.md and report.json have the same content."
    if report.artifact:
        footer += f" The files to deploy are in {report.artifact}."
    return Page(
        kind="compression report",
        title=summary.title(report),
        lead=summary.lead(report),
        sections=[
            networks.comparison_section(report),
            classes.example_section(report),
            classes.section(report),
            latency.section(report).fold(),
            int8.section(report).fold(),
            training.section(report) if missing else training.section(report).fold(),
            calibration.section(report).fold(),
            training.vocabulary_section(report).fold(),
            details.section(report).fold(),
        ],
        footer=footer,
        data_file="report.json",
        warnings=summary.warnings(report),
        key_figures=summary.key_figures(report),
        remarks=remarks,
    )


def write(folder: RunFolder) -> Report:
    """Write the report again, and the model card if the run has an artifact."""
    report = assemble(folder)
    write_report(report, folder.path)
    if report.artifact is not None:
        write_card(report, folder.path / report.artifact)
    return report


class LiveReport:
    """Writes the report of a run during a training."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.next = 0.0

    def __call__(self) -> None:
        """Write the report unless it was written recently."""
        started = time.monotonic()
        if started < self.next:
            return
        write_report(assemble(self.folder), self.folder.path)
        ended = time.monotonic()
        self.next = ended + max(MIN_INTERVAL, (ended - started) / MAX_FRACTION)


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html into ``folder``, each atomically.

    Any part of ``report`` may be missing. The same report gives the same bytes.
    """
    report = make_writable(report)
    content = report.model_dump_json(indent=2) + "\n"
    check_readable(folder / "report.json", content)
    for name, text in {"report.json": content, **render_page(report_page(report), "report")}.items():
        write_if_changed(folder / name, text)


def write_card(report: Report, folder: Path) -> None:
    """Write README.md and the runtime into an artifact folder, each file atomically."""
    _, manifest = read_manifest(folder)
    write_runtime(folder)
    write_if_changed(folder / CARD, model_card(report, manifest))


def model_card(report: Report, manifest: Mapping[str, Any]) -> str:
    """Return the text of README.md for an artifact folder with this manifest."""
    preprocessing = Preprocessing.from_dict(manifest["preprocessing"])
    height, width = height_width(preprocessing.size)
    is_uint8, task = manifest.get("input") == UINT8, load_task(manifest.get("task", "classification"))
    program = ""
    if task.likelihood is not None:  # the sample prints probabilities
        program = render_plain_template(
            "classify.cpp.j2",
            height=height,
            width=width,
            mean=[f"{value!r}f" for value in preprocessing.mean],
            std=[f"{value!r}f" for value in preprocessing.std],
            uint8=is_uint8,
            sigmoid=isinstance(task.likelihood, Sigmoid),
            thresholds=manifest.get("thresholds"),
        )
    shipped, labels = networks.shipped_network(report), manifest["labels"]
    measured = shipped.subject.calibration if shipped is not None else None
    return render_markdown_template(
        "model_card.md.j2",
        format=format,
        report=report,
        manifest=manifest,
        metadata=escape_controls(metadata(report, manifest), keep="\n"),
        title=summary.title(report),
        score=shipped.subject.score if shipped is not None else None,
        files=_files(report, manifest),
        classes=", ".join(labels[:MAX_CLASSES]),
        has_all_classes=len(labels) <= MAX_CLASSES,
        epochs=sum(epoch.stage == "student" for epoch in report.epochs),
        is_tuned=any(c.name == int8.QAT and c.ships for search in report.int8 for c in search.tried),
        weak_classes=_weak_classes(shipped) if shipped is not None else [],
        calibration=calibration.describe(shipped, measured) if shipped is not None and measured else None,
        evaluation=_evaluation(report),
        latency=latency.percentiles(report.bench) if report.bench is not None else Table("Latency", [], []),
        speed=_speed(report),
        devices=latency.devices(report.devices),
        preprocessing=preprocessing,
        is_uint8=is_uint8,
        batch="1" if report.config.get("batch") == "1" else "batch",
        arm_file=next((file["name"] for file in manifest["files"] if file["target"] == "arm64"), None),
        program=program,
        task=task,
        height=height,
        width=width,
    )


def metadata(report: Report, manifest: Mapping[str, Any]) -> str:
    """Return the metadata that the Hub reads, as YAML."""
    origin = manifest["origin"]
    tags = ["questpress", "onnxruntime", *dict.fromkeys(file["precision"] for file in manifest["files"])]
    tags += [report.student.name] if report.student else []
    tags += ["knowledge-distillation"] if report.method != "none" else []
    tag = networks.find_task(report).pipeline_tag
    content: dict[str, Any] = {"library_name": "onnx", "pipeline_tag": tag, "tags": tags}
    data = str(report.config.get("data", ""))
    if data.startswith("hfds/"):
        content["datasets"] = [data.removeprefix("hfds/")]
    if results := _results(report, origin):
        content["model-index"] = [{"name": summary.title(report), "results": results}]
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    return _license(report, origin["licenses"]) + text


def _license(report: Report, licenses: Sequence[str]) -> str:
    licenses = [" ".join(name.split()) for name in licenses]
    if len(licenses) == 1:
        student = report.student.license if report.student else None
        source = "the student's initial weights" if student else "the teacher's weights"
        name = re.sub(r"[^a-z0-9.]+", "-", licenses[0].lower()).strip("-")
        entry = f"license: {name}\n" if name in HUB_LICENSES else f"license: other\nlicense_name: {name}\n"
        return f"# The license of {source}, from which these weights were made.\n{entry}"
    if licenses:
        return f"# Made from weights under several licenses: {', '.join(licenses)}\nlicense: other\n"
    return "# license: unknown. Name the license of the images and initial weights of these weights here.\n"


def _results(report: Report, origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics = []
    for column in reversed(networks.all_networks(report)):
        score = column.subject.score
        if score is not None and column.key.startswith("student"):
            interval = f"95 % interval {score.low:.2f} to {score.high:.2f} %"
            name = f"{format.title(score.metric)} on {score.n:,} test images, {interval}, {column.short_role}"
            value = round(score.percent / 100, 6)
            metrics.append({"type": score.metric.lower(), "name": name, "value": value})
    if not metrics:
        return []
    # In one line: three dashes at the start of another one would end the metadata.
    data = " ".join(str(origin["data"]).split())
    slug = re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-") or "images"
    dataset = {"name": data, "type": slug, "split": "test"}
    return [
        {"task": {"type": networks.find_task(report).pipeline_tag}, "dataset": dataset, "metrics": metrics}
    ]


def _weak_classes(shipped: networks.Column) -> list[ClassScore]:
    """Return the classes with the lowest scores below 100 %; none of two classes."""
    scores = classes.class_scores(shipped).values()
    weak = [score for score in scores if score.percent is not None and score.percent < 100]
    weak.sort(key=lambda score: (score.percent or 0, score.label))
    return weak[:MAX_WEAK_CLASSES] if len(scores) > 2 else []


def _files(report: Report, manifest: Mapping[str, Any]) -> Table:
    rows = [
        [
            file["name"],
            file["precision"],
            file["target"] or "any",
            format.megabytes(file["bytes"]),
            format.percent(accuracy.get(networks.find_task(report).manifest_key), accuracy.get("n")),
            f"{file['opset']}, IR {file['ir_version']}",
        ]
        for file in manifest["files"]
        for accuracy in [file["accuracy"] or {}]
    ]
    columns = ["file", "precision", "processor", "size", networks.score_name(report), "opset"]
    return Table("Files", columns, rows, code=frozenset({0}), text=True)


def _evaluation(report: Report) -> Table:
    rows = [
        [
            column.role,
            format.score_percent(score),
            format.score_interval(score),
            f"{score.n:,}" if score.correct is None else f"{score.correct:,} of {score.n:,}",
            format.score_percent(column.subject.agreement),
        ]
        for column in networks.all_networks(report)
        if (score := column.subject.score) is not None
    ]
    columns = ["", networks.score_name(report), "95 % interval", "test images", "agreement with teacher"]
    return Table("Evaluation", columns, rows)


def _speed(report: Report) -> str:
    machine, shipped = summary.describe_machine(report.environment), networks.shipped_network(report)
    sentences = [f"Measured on {machine}."] if machine else []
    for over in (networks.find_network(report, "teacher"), networks.find_network(report, "student")):
        if over is not None and shipped is not None and over.key != shipped.key:
            pair = f"{shipped.role} vs. {over.role_in_sentence}"
            ratios = networks.speed_ratios(report, shipped, over)
            sentences += [f"{pair}, {format.threads(r.threads)}: {r.text}." for r in ratios]
    return " ".join(sentences)
