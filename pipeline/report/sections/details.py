"""The end of the report: commands, stages, data, files, weights, and all options."""

import shlex
from collections.abc import Iterable
from typing import Any

from ...runs.results import Report, Subject
from .. import format
from ..networks import all_networks, score_name, shipped_network
from ..page import Section
from ..tables import Table

MAX_DUPLICATES = 10
"""Names that are shown of a group of identical images."""


def section(report: Report) -> Section:
    shipped = shipped_network(report)
    skipped = [[name, reason] for name, reason in (report.data.skipped if report.data else [])]
    quantization = shipped.subject.quantization if shipped is not None else None
    return Section(
        "Details",
        "details",
        command=report.command,
        tables=[commands(report), _stages(report), _data(report), _weights(report), _files(report)],
        folded=[
            Table("Skipped files", ["file", "reason"], skipped, code=frozenset({0}), text=True),
            _copies("Identical images", report.data.duplicates if report.data else []),
            _copies("Near copies in several splits", report.data.near_copies if report.data else []),
            _nested_table("Quantization", quantization or {}),
            _nested_table(f"Parameters of {report.method}", _method(report)),
            _nested_table("Environment", report.environment),
            _nested_table("All options", report.config),
        ],
    )


def commands(report: Report) -> Table:
    """Return the commands that measure the figures of the report again."""
    rows = []
    if report.config.get("out"):
        run = shlex.quote(str(report.config["out"]))
        if report.artifact is not None:
            rows.append([f"{score_name(report)} and calibration", f"compress validate {run}"])
            rows.append(["latency", f"compress bench {run}"])
            rows.append(["export and int8", f"compress export {run}"])
        rows.append(["report", f"compress report {run}"])
    return Table("Commands to repeat a part", ["part", "command"], rows, code=frozenset({1}), text=True)


def _stages(report: Report) -> Table:
    rows = [[stage.stage, format.duration(stage.seconds), stage.summary] for stage in report.stages]
    note = f"Total {format.duration(sum(stage.seconds for stage in report.stages))}."
    return Table("Stages", ["stage", "time", "result"], rows, note=note, text=True)


def _data(report: Report) -> Table:
    data = report.data
    if data is None:
        return Table("Data", [], [])
    splits = {"training": data.train, "validation": data.val, "test": data.test}
    if data.unlabeled:
        splits |= {"without labels": data.unlabeled, "left out as copies": sum(data.left_out.values())}
    note = f"{data.name}; fingerprint {data.fingerprint}. Skipped files: {len(data.skipped):,}. "
    note += f"Groups of identical images: {len(data.duplicates):,}. "
    note += f"Test images with a near copy in another split: {data.near_copies_in_test:,}."
    note += "".join(f" {text[0].upper()}{text[1:]}." for text in data.notes)
    if data.shown is not None:
        note += f" The input shows {format.percent(data.shown)} of the median image"
        hides = data.shown < 50 and report.config.get("resize") in (None, "crop")
        note += "; --resize or --image-size HEIGHT,WIDTH shows more." if hides else "."
    return Table("Data", ["split", "images"], [[name, f"{n:,}"] for name, n in splits.items()], note=note)


def _weights(report: Report) -> Table:
    rows = [
        [
            column.role,
            column.subject.weights,
            column.subject.head or format.MISSING,
            column.subject.license or format.MISSING,
            _onnx_version(column.subject),
        ]
        for column in all_networks(report)
    ]
    columns = ["", "initial weights", "head", "license of the weights", "format"]
    return Table("Weights", columns, rows, text=True)


def _onnx_version(subject: Subject) -> str:
    versions = (("opset", subject.opset), ("IR", subject.ir_version))
    parts = [f"{name} {value}" for name, value in versions if value]
    return f"ONNX, {', '.join(parts)}" if parts else format.MISSING


def _files(report: Report) -> Table:
    rows = [
        [
            column.role,
            column.subject.file or format.MISSING,
            format.count(column.subject.bytes),
            column.subject.sha256 or format.MISSING,
        ]
        for column in all_networks(report)
        if column.subject.file or column.subject.sha256
    ]
    return Table("Files", ["", "file", "bytes", "SHA-256"], rows, code=frozenset({1, 3}), text=True)


def _copies(title: str, groups: list[list[str]]) -> Table:
    rows = [
        [f"{len(group):,}", ", ".join(group[:MAX_DUPLICATES] + ["…"] * (len(group) > MAX_DUPLICATES))]
        for group in groups
    ]
    return Table(title, ["images", "names"], rows, code=frozenset({1}), text=True)


def _method(report: Report) -> dict[str, Any]:
    origin = {"source": report.method_source, "recipe": report.recipe}
    hashes = {
        f"hashes of {h.teacher}": f"{h.hashes:,}, s = {format.number(h.std)}, bias: {h.bias}"
        for h in report.hashes
    }
    balance = {
        f"balance.{weight.method}": f"gradient ratio to the label loss {format.number(weight.ratio)}, "
        f"range {format.number(weight.low)} to {format.number(weight.high)}, weight × "
        f"{format.number(weight.factor)}"
        for weight in report.balance
    }
    return {k: v for k, v in origin.items() if v} | report.method_parameters | hashes | balance


def _nested_table(title: str, content: dict[str, Any]) -> Table:
    rows = [[name, value] for name, value in _flatten(content)] if content else []
    return Table(title, ["", ""], rows, code=frozenset({0, 1}), text=True)


def _flatten(content: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _flatten(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, (dict, list, tuple)):
        yield name, ", ".join(str(item) for item in content) or "none"
    elif content is None:
        yield name, "not set"
    elif isinstance(content, bool):
        yield name, "yes" if content else "no"
    else:
        yield name, str(content)
