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
from ..runs.results import Report, Subject
from ..tasks import TASKS
from . import format
from .networks import (
    all_networks,
    compare_speed,
    find_network,
    score_name,
    shipped_network,
    thread_counts,
)
from .render import render_markdown_template, render_plain_template
from .sections import calibration, classes
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
    is_uint8, task = manifest.get("input") == UINT8, TASKS[manifest.get("task", "classification")]
    program = render_plain_template(
        "classify.cpp.j2",
        side=preprocessing.size,
        mean=[f"{value!r}f" for value in preprocessing.mean],
        std=[f"{value!r}f" for value in preprocessing.std],
        uint8=is_uint8,
        sigmoid=isinstance(task.likelihood, Sigmoid),
    )
    return render_markdown_template(
        "model_card.md.j2",
        metadata=escape_controls(metadata(report, manifest), keep="\n"),
        title=title(report),
        lead=_lead(report, manifest),
        files=_files(report, manifest, preprocessing),
        classes=_list_classes(manifest["labels"]),
        training=_training(report, manifest),
        limits=_limits(report),
        evaluation=_evaluation(report),
        latency=percentiles(report.bench) if report.bench is not None else Table("Latency", [], []),
        speed=_speed(report),
        steps=_preprocessing_steps(preprocessing, is_uint8=is_uint8),
        raspberry_pi=_raspberry_pi(manifest),
        program=program,
    )


def metadata(report: Report, manifest: Mapping[str, Any]) -> str:
    """Return the metadata that the Hub reads, as YAML."""
    origin = manifest["origin"]
    tags = ["questpress", "onnxruntime", *dict.fromkeys(file["precision"] for file in manifest["files"])]
    tags += [report.student.name] if report.student else []
    tags += ["knowledge-distillation"] if report.method != "none" else []
    content: dict[str, Any] = {
        "library_name": "onnx",
        "pipeline_tag": "image-classification",
        "tags": tags,
    }
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


def _lead(report: Report, manifest: Mapping[str, Any]) -> str:
    shipped, size = shipped_network(report), manifest["preprocessing"]["size"]
    text = (
        f"Image classifier with {format.plural(len(manifest['labels']), 'class', 'classes')} for images of "
    )
    text += f"{size} × {size} pixels, {format.megabytes(manifest['files'][0]['bytes'])}."
    if shipped is not None and (score := shipped.subject.score) is not None:
        text += f" {format.title(score.metric)} on {score.n:,} test images: {format.score(score)}."
    return f"{text} Made with questpress."


def _files(report: Report, manifest: Mapping[str, Any], preprocessing: Preprocessing) -> Table:
    rows = []
    for file in manifest["files"]:
        accuracy = file["accuracy"] or {}
        rows.append(
            [
                file["name"],
                file["precision"],
                file["target"] or "any",
                format.megabytes(file["bytes"]),
                format.percent(accuracy.get("top1", accuracy.get("map")), accuracy.get("n")),
                f"{file['opset']}, IR {file['ir_version']}",
            ]
        )
    shipped, size = shipped_network(report), f"{preprocessing.size} × {preprocessing.size}"
    note = f"Architecture: {manifest['origin']['student']} of timm"
    if shipped is not None and shipped.subject.parameters is not None:
        note += f", {format.millions(shipped.subject.parameters)} parameters"
    note += f". Input: RGB, {size} pixels. manifest.json has the SHA-256 of each file."
    columns = ["file", "precision", "processor", "size", score_name(report), "opset"]
    return Table("Files", columns, rows, code=frozenset({0}), text=True, note=note)


def _list_classes(labels: Sequence[str]) -> str:
    if len(labels) <= MAX_CLASSES:
        return ", ".join(labels)
    first = ", ".join(labels[:MAX_CLASSES])
    return f"{first}, … {len(labels):,} in total; manifest.json lists them in the order of the logits."


def _training(report: Report, manifest: Mapping[str, Any]) -> list[str]:
    """Return how the weights were made, one statement each."""
    origin, data = manifest["origin"], report.data
    lines = []
    if report.method != "none":
        lines += [f"Teacher: {_describe_weights(teacher)}." for teacher in report.teachers]
    if report.student is not None:
        lines.append(f"Student: {_describe_weights(report.student)}.")
    method = "training without a teacher" if report.method == "none" else report.method
    source = f" ({report.method_source})" if report.method_source else ""
    epochs = sum(epoch.stage == "student" for epoch in report.epochs)
    duration = f", {format.plural(epochs, 'epoch')}" if epochs else ""
    lines.append(f"Method: {method}{source}{duration}.")
    if report.recovery is not None and any(
        candidate.name == QAT and candidate.ships for search in report.int8 for candidate in search.tried
    ):
        tuned = format.plural(report.recovery.epochs, "epoch")
        lines.append(
            f"The int8 file was fine-tuned for {tuned} with fake quantization: its weights differ from fp32."
        )
    if report.config.get("ema") or report.config.get("average_last"):
        lines.append("The weights are an average over the last part of the training.")
    if (rounds := report.config.get("rounds", 1)) > 1:
        lines.append(
            f"Rounds: {rounds}. The student of each round is the teacher of the next; the last one ships."
        )
    if data is not None:
        lines.append(
            f"Images: {data.name}; {data.train:,} training, {data.val:,} validation and {data.test:,} test "
            "images, without overlap."
        )
    if "temperature" in origin:
        lines.append(f"The logits are divided by a temperature of {origin['temperature']:.3g}.")
    versions = ", ".join(f"{name} {value}" for name, value in sorted(manifest["versions"].items()))
    return [*lines, f"Versions: {versions}."]


def _describe_weights(network: Subject) -> str:
    return f"{network.name}, initial weights {network.weights}" + (
        f", {network.license}" if network.license else ""
    )


def _limits(report: Report) -> list[str]:
    lines = [
        "For images similar to the training images. On others it may be less accurate than below.",
        "It knows its classes only: an image of none of them may still be assigned to one.",
    ]
    shipped = shipped_network(report)
    if shipped is None:
        return lines
    scores = list(classes.class_scores(shipped).values())
    weak = sorted(
        (score.percent, score.label, score.n)
        for score in scores
        if score.percent is not None and score.percent < 100
    )
    if len(scores) > 2 and weak:
        names = ", ".join(
            f"{label} ({format.percent(p)} of {n:,})" for p, label, n in weak[:MAX_WEAK_CLASSES]
        )
        lines.append(f"Weakest classes: {names}.")
    if shipped.subject.calibration is not None:
        lines.append(calibration.describe(shipped, shipped.subject.calibration))
    return lines


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
    note = (
        "Test images were not used for training. Students were measured in ONNX Runtime on the files in this "
    )
    note += "folder, teachers in PyTorch."
    if any(c.subject.score is not None and c.subject.score.correct is not None for c in all_networks(report)):
        note += " Wilson intervals."
    return Table("Evaluation", columns, rows, note=note)


def _speed(report: Report) -> str:
    machine, shipped = describe_machine(report.environment), shipped_network(report)
    sentences = [f"Measured on {machine}."] if machine else []
    for over in (find_network(report, "teacher"), find_network(report, "student")):
        for threads in thread_counts(report):
            if over is None or shipped is None or over.key == shipped.key:
                continue
            if (ratio := compare_speed(shipped, over, threads)) is not None:
                pair = f"{shipped.role} vs. {over.role_in_sentence}"
                sentences.append(f"{pair}, {format.threads(threads)}: {ratio.text}.")
    return " ".join(sentences)


def _preprocessing_steps(preprocessing: Preprocessing, *, is_uint8: bool) -> list[str]:
    size, resize = preprocessing.size, preprocessing.resize
    fit = {
        "center": f"Resize the shorter side to {resize} pixels",
        "squash": f"Resize to {resize} × {resize} pixels",
        "border": f"Resize the longer side to {resize} pixels and pad with the mean color",
    }[preprocessing.crop_mode]
    steps = [
        "Decode to RGB; apply the EXIF orientation; blend transparent pixels with white.",
        f"{fit} with Pillow’s {preprocessing.interpolation} filter, antialiased; others reduce accuracy.",
        f"Crop the central {size} × {size} pixels.",
    ]
    if is_uint8:
        return [*steps, f"Pass the pixels as uint8 [batch, {size}, {size}, 3]."]
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (preprocessing.mean, preprocessing.std))
    steps.append(f"Divide by 255, subtract the mean ({mean}), divide by the std ({std}).")
    return [*steps, f"Pass float32 [batch, 3, {size}, {size}]."]


def _raspberry_pi(manifest: Mapping[str, Any]) -> str:
    arm = next((file["name"] for file in manifest["files"] if file["target"] == "arm64"), None)
    if arm is None:
        return (
            "This folder has no int8 file for its processor, so the fp32 file is used; compress export RUN "
            "--target arm64 makes one."
        )
    return (
        f"It uses {arm}. A Pi 3 or 4 lacks the dot-product instructions that make int8 fast: try --file "
        "student.onnx there too."
    )
