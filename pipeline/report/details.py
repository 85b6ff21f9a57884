"""The tables at the end of the page: files and their origin, data, stages, epochs, and every option."""

import math
import shlex
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from ..runs.results import Epoch, Report, Subject
from . import format
from .networks import every, measure, shipped
from .tables import Table


def files(report: Report) -> Table:
    rows = [
        [
            column.role,
            column.subject.file or format.MISSING,
            f"{column.subject.bytes:,}" if column.subject.bytes is not None else format.MISSING,
            column.subject.sha256 or format.MISSING,
        ]
        for column in every(report)
        if column.subject.file or column.subject.sha256
    ]
    return Table("Files", ["", "file", "bytes", "SHA-256"], rows, code=frozenset({1, 3}), text=True)


def origins(report: Report) -> Table:
    rows = [
        [
            column.role,
            column.subject.weights,
            column.subject.head or format.MISSING,
            column.subject.licence or format.MISSING,
            _format(column.subject),
        ]
        for column in every(report)
    ]
    columns = ["", "weights started from", "head", "licence of the weights", "format"]
    return Table("Origin of the weights", columns, rows, text=True)


def _format(subject: Subject) -> str:
    parts = [
        f"{name} {value}" for name, value in (("opset", subject.opset), ("IR", subject.ir_version)) if value
    ]
    return "ONNX, " + ", ".join(parts) if parts else format.MISSING


def quantization(report: Report) -> Table:
    ships = shipped(report)
    recipe = ships.subject.quantization if ships else None
    return pairs("Quantization", recipe or {})


def roles(report: Report) -> Table:
    data = report.data
    if data is None:
        return Table("Data", [], [])
    rows = [[role, f"{n:,}"] for role, n in (("train", data.train), ("val", data.val), ("test", data.test))]
    note = f"{data.name}; fingerprint {data.fingerprint}. Skipped images: {len(data.skipped):,}. "
    note += f"Groups of identical images: {len(data.duplicates):,}."
    return Table("Data", ["role", "images"], rows, note=note)


def repeat(report: Report) -> Table:
    """Which command measures which figures again."""
    if not report.config.get("out"):
        return Table("To measure again", [], [])
    run = shlex.quote(str(report.config["out"]))
    rows = []
    if report.artifact is not None:
        rows.append([f"{measure(report)} and calibration", f"compress validate {run}"])
        rows.append(["latency", f"compress bench {run}"])
        rows.append(["the files that ship, and int8", f"compress export {run}"])
    rows.append(["these pages, of the same figures", f"compress report {run}"])
    return Table("To measure again", ["what", "command"], rows, code=frozenset({1}), text=True)


def skipped(report: Report) -> Table:
    found = report.data.skipped if report.data else []
    rows = [[name, reason] for name, reason in found]
    return Table("Images skipped", ["image", "reason"], rows, code=frozenset({0}), text=True)


def duplicates(report: Report) -> Table:
    found = report.data.duplicates if report.data else []
    rows = [
        [f"{len(group):,}", ", ".join(group[:10]) + (", …" if len(group) > 10 else "")] for group in found
    ]
    return Table("Identical images", ["images", "names"], rows, code=frozenset({1}), text=True)


def stages(report: Report) -> Table:
    rows = [[one.stage, format.duration(one.seconds), one.summary] for one in report.stages]
    total = sum(one.seconds for one in report.stages)
    note = f"{format.duration(total)} in all." if rows else ""
    return Table("Stages", ["stage", "time", "result"], rows, note=note, text=True)


def training(report: Report) -> Table:
    """What each training cost; a measure that none of them has is left out."""
    trainings = {
        stage: [epoch for epoch in report.epochs if epoch.stage == stage]
        for stage in dict.fromkeys(epoch.stage for epoch in report.epochs)
    }
    costs: dict[str, Callable[[list[Epoch]], str | None]] = {
        "images/s": lambda epochs: _rate([epoch.images_per_second for epoch in epochs]),
        "an epoch": lambda epochs: _median([epoch.seconds for epoch in epochs], format.duration),
        "peak memory": _peak_memory,
        "share of the steps": _shares,
        "of the device’s peak": lambda epochs: _median(
            [epoch.mfu for epoch in epochs], lambda mfu: format.percent(100 * mfu)
        ),
    }
    known = {
        name: cells
        for name, cost in costs.items()
        if any(cells := [cost(epochs) for epochs in trainings.values()])
    }
    rows = [
        [stage, *(cells[i] or format.MISSING for cells in known.values())]
        for i, stage in enumerate(trainings)
    ]
    note = "Medians over the epochs, without the evaluation after each."
    if "of the device’s peak" in known:
        note += " Of the device’s peak: the networks’ own arithmetic against what it can compute at best."
    return Table("Cost of training", ["", *known], rows, note=note, text=True)


def _median(values: Iterable[float | None], told: Callable[[float], str]) -> str | None:
    found = [value for value in values if value is not None and math.isfinite(value)]
    return told(statistics.median(found)) if found else None


def _rate(values: Iterable[float]) -> str | None:
    return _median((value for value in values if value < 1e15), lambda rate: format.number(round(rate)))


def _peak_memory(epochs: list[Epoch]) -> str | None:
    found = [epoch.peak_memory_bytes for epoch in epochs if epoch.peak_memory_bytes is not None]
    return format.megabytes(max(found)) if found else None


def _shares(epochs: list[Epoch]) -> str | None:
    """Of all epochs together, each counted by its time."""
    timed = [(epoch.shares, epoch.seconds or 1.0) for epoch in epochs if epoch.shares]
    whole = sum(seconds for _, seconds in timed)
    phases = dict.fromkeys(phase for shares, _ in timed for phase in shares)
    together = {
        phase: 100 * sum(shares.get(phase, 0.0) * seconds for shares, seconds in timed) / whole
        for phase in phases
    }
    return ", ".join(f"{phase} {format.percent(share)}" for phase, share in together.items()) or None


def epochs(report: Report) -> Table:
    rows = [
        [
            one.stage,
            f"{one.epoch:,} of {one.epochs:,}",
            ", ".join(f"{name} {format.number(value)}" for name, value in one.losses.items()),
            format.percent(one.train_accuracy),
            format.percent(one.val_accuracy),
            format.number(one.learning_rate),
            format.number(round(one.images_per_second)) if one.images_per_second < 1e15 else format.MISSING,
        ]
        for one in report.epochs
    ]
    columns = ["stage", "epoch", "losses", "train", "val", "learning rate", "images/s"]
    return Table("Epochs", columns, rows, text=True)


def store(report: Report) -> Table:
    """What the student learned from instead of asking the teachers at every step."""
    used = report.teacher_cache
    if used is None:
        return Table("Teachers’ stored answers", [], [])
    rows = [
        ["views of each image", f"{used.views:,}" + (", all there are" if used.complete else "")],
        ["a view of all images", format.megabytes(used.bytes_per_view)],
        ["all views", format.megabytes(used.views * used.bytes_per_view)],
        ["views that a teacher was asked about", f"{used.computed:,}"],
    ]
    if used.lost_mass is not None:
        rows.append(["share of p_T that is left out", f"{format.significant(100 * used.lost_mass)} %"])
    return Table("Teachers’ stored answers", ["", "value"], rows, text=True)


def environment(report: Report) -> Table:
    return pairs("Environment", report.environment)


def config(report: Report) -> Table:
    return pairs("Every option", report.config)


def method(report: Report) -> Table:
    origin = {"source": report.method_source, "recipe": report.recipe}
    balance = {
        f"balance.{one.method}": f"gradient {format.number(one.pull)} times the labels', where "
        f"{format.number(one.least)} to {format.number(one.most)} does good: weight times "
        f"{format.number(one.factor)}"
        for one in report.balance
    }
    hashes = {
        f"hashes of {one.teacher}": f"{one.hashes:,}, s = {format.number(one.std)}, bias: {one.bias}"
        for one in report.hashes
    }
    content = {name: value for name, value in origin.items() if value} | report.method_parameters
    content |= hashes | balance
    return pairs(f"Parameters of {report.method}", content)


def pairs(title: str, content: dict[str, Any]) -> Table:
    rows = [[name, value] for name, value in _flat(content)] if content else []
    return Table(title, ["", "value"], rows, code=frozenset({0, 1}), text=True)


def _flat(content: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, (list, tuple)):
        yield name, ", ".join(str(one) for one in content) or "none"
    elif content is None:
        yield name, "not set"
    elif isinstance(content, bool):
        yield name, "yes" if content else "no"
    else:
        yield name, str(content)
