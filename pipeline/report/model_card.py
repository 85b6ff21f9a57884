"""The artifact's README.md: a model card for the Hugging Face Hub, and instructions for using the artifact.

It depends on the report and the manifest only, and names nothing of the machine but its processor.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...export.artifact import write_predict
from ...export.runtime import UINT8, Preprocessing, read_manifest
from ...export.text import escape_controls
from ..evaluation.likelihood import Sigmoid
from ..runs.files import write_if_changed
from ..runs.results import Report
from ..runs.scores import ClassScore
from ..tasks import load_task
from . import format
from .networks import (
    Column,
    all_networks,
    find_network,
    score_name,
    shipped_network,
    speed_ratios,
)
from .render import render_markdown_template, render_plain_template
from .sections import calibration
from .sections.classes import class_scores
from .sections.int8 import QAT
from .sections.latency import percentiles
from .summary import describe_machine, title
from .tables import Table

README = "README.md"
MAX_CLASSES = 40
MAX_WEAK_CLASSES = 3


def write_card(report: Report, folder: Path) -> None:
    """Write README.md and predict.py into an artifact folder, each atomically.

    Raises:
        ArtifactError: the manifest is missing or damaged.
        ExportError: predict.py cannot be written.
        JobError: README.md cannot be written.
    """
    _, manifest = read_manifest(folder)
    write_predict(folder)
    write_if_changed(folder / README, model_card(report, manifest))


def model_card(report: Report, manifest: Mapping[str, Any]) -> str:
    """Return the text of README.md for an artifact folder with this manifest."""
    preprocessing = Preprocessing.from_dict(manifest["preprocessing"])
    is_uint8, task = manifest.get("input") == UINT8, load_task(manifest.get("task", "classification"))
    program = render_plain_template(
        "classify.cpp.j2",
        side=preprocessing.size,
        mean=[f"{value!r}f" for value in preprocessing.mean],
        std=[f"{value!r}f" for value in preprocessing.std],
        uint8=is_uint8,
        sigmoid=isinstance(task.likelihood, Sigmoid),
    )
    shipped, labels = shipped_network(report), manifest["labels"]
    measured = shipped.subject.calibration if shipped is not None else None
    return render_markdown_template(
        "model_card.md.j2",
        format=format,
        report=report,
        manifest=manifest,
        metadata=escape_controls(metadata(report, manifest), keep="\n"),
        title=title(report),
        score=shipped.subject.score if shipped is not None else None,
        files=_files(report, manifest),
        classes=", ".join(labels[:MAX_CLASSES]),
        has_all_classes=len(labels) <= MAX_CLASSES,
        epochs=sum(epoch.stage == "student" for epoch in report.epochs),
        is_tuned=any(c.name == QAT and c.ships for search in report.int8 for c in search.tried),
        weak_classes=_weak_classes(shipped) if shipped is not None else [],
        calibration=calibration.describe(shipped, measured) if shipped is not None and measured else None,
        evaluation=_evaluation(report),
        latency=percentiles(report.bench) if report.bench is not None else Table("Latency", [], []),
        speed=_speed(report),
        preprocessing=preprocessing,
        is_uint8=is_uint8,
        arm_file=next((file["name"] for file in manifest["files"] if file["target"] == "arm64"), None),
        program=program,
    )


def metadata(report: Report, manifest: Mapping[str, Any]) -> str:
    """Return the metadata that the Hub reads, as YAML."""
    origin = manifest["origin"]
    tags = ["questpress", "onnxruntime", *dict.fromkeys(file["precision"] for file in manifest["files"])]
    tags += [report.student.name] if report.student else []
    tags += ["knowledge-distillation"] if report.method != "none" else []
    content: dict[str, Any] = {"library_name": "onnx", "pipeline_tag": "image-classification", "tags": tags}
    data = str(report.config.get("data", ""))
    if data.startswith("hfds/"):
        content["datasets"] = [data.removeprefix("hfds/")]
    if results := _results(report, origin):
        content["model-index"] = [{"name": title(report), "results": results}]
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    return _license(report, origin["licenses"]) + text


def _license(report: Report, licenses: Sequence[str]) -> str:
    licenses = [" ".join(name.split()) for name in licenses]
    if len(licenses) == 1:
        student = report.student.license if report.student else None
        source = "the student's initial weights" if student else "the teacher's weights"
        entry = yaml.safe_dump({"license": licenses[0].lower()}, allow_unicode=True, width=1000)
        return f"# The license of {source}, from which these weights were made.\n{entry}"
    if licenses:
        return f"# Made from weights under several licenses: {', '.join(licenses)}\nlicense: other\n"
    return "# license: unknown. Name the license of the images and initial weights of these weights here.\n"


def _results(report: Report, origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics = []
    for column in reversed(all_networks(report)):
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
    return [{"task": {"type": "image-classification"}, "dataset": dataset, "metrics": metrics}]


def _weak_classes(shipped: Column) -> list[ClassScore]:
    """Return the classes with the lowest scores below 100 %; none of two classes."""
    scores = class_scores(shipped).values()
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
            format.percent(accuracy.get("top1", accuracy.get("map")), accuracy.get("n")),
            f"{file['opset']}, IR {file['ir_version']}",
        ]
        for file in manifest["files"]
        for accuracy in [file["accuracy"] or {}]
    ]
    columns = ["file", "precision", "processor", "size", score_name(report), "opset"]
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
        for column in all_networks(report)
        if (score := column.subject.score) is not None
    ]
    columns = ["", score_name(report), "95 % interval", "test images", "agreement with teacher"]
    return Table("Evaluation", columns, rows)


def _speed(report: Report) -> str:
    machine, shipped = describe_machine(report.environment), shipped_network(report)
    sentences = [f"Measured on {machine}."] if machine else []
    for over in (find_network(report, "teacher"), find_network(report, "student")):
        if over is not None and shipped is not None and over.key != shipped.key:
            pair = f"{shipped.role} vs. {over.role_in_sentence}"
            ratios = speed_ratios(report, shipped, over)
            sentences += [f"{pair}, {format.threads(r.threads)}: {r.text}." for r in ratios]
    return " ".join(sentences)
