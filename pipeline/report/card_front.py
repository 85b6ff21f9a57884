"""The metadata at the head of a model card, as Hugging Face's hub reads it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..runs.results import Report
from . import format
from .summary import title
from .networks import every


def front(report: Report, manifest: Mapping[str, Any]) -> str:
    """The metadata that the hub reads, as YAML."""
    origin = manifest["origin"]
    precisions = dict.fromkeys(entry["precision"] for entry in manifest["files"])
    data = str(report.config.get("data", ""))
    tags = ["questpress", "onnxruntime", *precisions, str(report.student.name if report.student else "")]
    if report.method != "none":
        tags.append("knowledge-distillation")
    content: dict[str, Any] = {
        "library_name": "onnx",
        "pipeline_tag": "image-classification",
        "tags": [tag for tag in tags if tag],
    }
    if data.startswith("hfds/"):
        content["datasets"] = [data.removeprefix("hfds/")]
    results = _results(report, origin)
    if results:
        content["model-index"] = [{"name": title(report), "results": results}]
    written: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    return _licence(report, origin["licences"]) + written


def _licence(report: Report, known: Sequence[str]) -> str:
    student = report.student.licence if report.student else None
    if len(known) == 1:
        whose = "the student's first weights" if student else "the teacher's weights"
        said = yaml.safe_dump({"license": " ".join(known[0].lower().split())}, allow_unicode=True, width=1000)
        return f"# That of {whose}, which these were made from.\n{said}"
    if known:
        told = ", ".join(" ".join(one.split()) for one in known)
        return f"# Made from weights under several licences: {told}\nlicense: other\n"
    return (
        "# license: not known. These weights were made from weights and images of your own; say here what "
        "they may be used for.\n"
    )


def _results(report: Report, origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    # In one line: three dashes at the head of another would end the metadata.
    name = " ".join(str(origin["data"]).split())
    metrics = []
    for column in reversed(every(report)):
        score = column.subject.score
        if score is None or not column.key.startswith("student"):
            continue
        file = column.role.removeprefix("Student ")
        told = f"of {score.n:,} test images, 95 % interval {score.low:.2f} to {score.high:.2f} %, {file} file"
        metrics.append(
            {
                "type": score.metric.lower(),
                "name": f"{format.title(score.metric)} {told}",
                "value": round(score.percent / 100, 6),
            }
        )
    if not metrics:
        return []
    dataset = {"name": name, "type": _slug(name), "split": "test"}
    return [{"task": {"type": "image-classification"}, "dataset": dataset, "metrics": metrics}]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "images"
