"""Assemble the report of a run from the records in its folder."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...export.artifact import tool_versions
from ...export.results import DeviceBench
from ...export.runtime import read_manifest
from ...export.text import escape_controls
from .. import methods
from ..config import recipes
from ..config.stages import get_kind, get_round
from ..errors import JobError, UsageError
from ..methods.feed import RECONSTRUCTION
from ..runs.folder import ARTIFACT, RunFolder
from ..runs.record import read_checked, read_json, with_checksum
from ..runs.results import Bench, Epoch, Reconstruction, Report, StageTime
from . import format

DEVICE_BENCHES = "bench/bench.*.json"
"""Results of ``predict.py --bench`` that ``compress bench RUN --add`` copied into a run folder."""
LATER_BENCH = Path("bench/bench.json")
"""The result of `compress bench RUN` in a run folder. The run's own bench removes it."""


def assemble(folder: RunFolder) -> Report:
    """Return the report of a run.

    Raises:
        UsageError: the records in the folder do not have the form that stages write.
        JobError: the result of a later bench is damaged.
    """
    try:
        return _assemble(folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{folder.path}: the record of the run cannot be read ({_summarize(error)}). It was edited, "
            "damaged, or written by another version of compress. The weights are unchanged."
        ) from error


def _summarize(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{error.title}.{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _assemble(folder: RunFolder) -> Report:
    record = folder.record
    config = record.options
    facts = _with_later_bench(folder.path, folder.facts())
    compute = {
        f"{name} computed on": f"{e.device} ({e.name}), {e.precision}, {format.threads(e.threads)}"
        for name, e in record.engines.items()
    }
    environment = {**(record.tools or tool_versions_here()), **facts.pop("environment", {}), **compute}
    # Stages that the options do not request any more have no part in what ships.
    stages = {name: entry for name, entry in record.stages.items() if name in folder.stages}
    trainings = {get_kind(stage) for stage in folder.stages}
    epochs = [Epoch.model_validate_json(line) for line in folder.curves()]
    epochs = [epoch for epoch in epochs if get_kind(epoch.stage) in trainings]
    papers = [methods.load(name).paper for name in methods.parse_methods(config["method"])]
    report = Report(
        title=f"{config['student']} from {format.join_names(config['teacher'])}",
        command=record.command,
        method=config["method"],
        method_parameters=config["settings"],
        method_source="; ".join(papers) or None,
        recipe=_describe_recipe(config),
        image_size=config["student_size"] or config["image_size"],
        teacher_image_size=config["image_size"],
        epochs=epochs,
        reconstruction=list(_reconstruction(epochs, config)),
        warnings=[text for stage in stages.values() for text in stage.warnings],
        stages=[StageTime(stage=name, seconds=s.seconds, summary=s.summary) for name, s in stages.items()],
        environment=environment,
        config={**config, "out": str(folder.path)},
        artifact=ARTIFACT.as_posix() if "validate" in stages else None,
        devices=list(_read_devices(folder.path)) if "validate" in stages else [],
        **facts,
    )
    return make_writable(report)


def tool_versions_here() -> dict[str, str]:
    return {"python": platform.python_version(), **tool_versions()}


def _describe_recipe(config: Mapping[str, Any]) -> str | None:
    """Return the name and the source of the recipe, and the options that differ from it."""
    if config.get("recipe") is None:
        return None
    recipe = recipes.load_recipe(config["recipe"])
    changes = ", ".join(f"{name} {value}" for name, value in recipe.changes(config).items())
    return f"{recipe.name} ({recipe.source})" + (f", but {changes}" if changes else "")


def _reconstruction(epochs: Sequence[Epoch], config: Mapping[str, Any]) -> Iterable[Reconstruction]:
    """Yield FEED's reconstruction error of each teacher in each training."""
    for stage in dict.fromkeys(epoch.stage for epoch in epochs):
        metrics = [epoch.metrics for epoch in epochs if epoch.stage == stage]
        previous_round = (get_round(stage) or config.get("rounds", 1)) - 1
        teachers = [f"round {previous_round}"] if previous_round else config["teacher"]
        names = [name for name in metrics[-1] if name.startswith(RECONSTRUCTION)]
        for i, name in enumerate(names):
            first, last = metrics[0][name], metrics[-1][name]
            yield Reconstruction(stage=stage, teacher=teachers[i], error=last, first=first)


def _with_later_bench(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the latencies of a run by those of a later bench of the same files."""
    bench = _read_later_bench(folder)
    if bench is None or not _has_same_files(bench, facts):
        return dict(facts)
    newer = bench_facts(bench)
    updated: dict[str, Any] = {**facts, "bench": newer.pop("bench")}
    for key, value in newer.items():
        before = facts.get(key)
        if isinstance(before, Mapping):
            updated[key] = {**before, **value}
        elif key == "teachers" and before is not None and len(before) == len(value):
            updated[key] = [{**old, **new} for old, new in zip(before, value, strict=True)]
    return updated


def _read_later_bench(folder: Path) -> Bench | None:
    """Return the result of a later bench; None if there is none, or one of another version."""
    file = folder / LATER_BENCH
    if not file.exists():
        return None
    try:
        content = read_checked(file)
    except (OSError, ValueError) as error:
        raise JobError(
            f"{file} is damaged ({error}). Delete it, or run compress bench {folder} again."
        ) from error
    try:
        return Bench.model_validate(content)
    except ValidationError:
        return None


def _read_devices(folder: Path) -> Iterable[DeviceBench]:
    """Yield the benches on devices, without files that are no longer in the artifact."""
    files = sorted(folder.glob(DEVICE_BENCHES))
    hashes = {entry["sha256"] for entry in read_manifest(folder)[1]["files"]} if files else set()
    for file in files:
        try:
            bench = DeviceBench.model_validate(read_json(file))
        except (OSError, ValueError) as error:
            raise JobError(f"{file} is damaged. Delete it, or add it again.") from error
        results = [result for result in bench.results if result.sha256 in hashes]
        if results:
            yield bench.model_copy(update={"results": results})


def _has_same_files(bench: Bench, facts: Mapping[str, Any]) -> bool:
    timed = {file.key: file.sha256 for file in bench.subjects if file.key is not None}
    current = {key: (facts.get(key) or {}).get("sha256") for key in ("student", "student_int8")}
    return "student" in timed and all(timed.get(key) == sha256 for key, sha256 in current.items() if sha256)


def bench_facts(bench: Bench) -> dict[str, Any]:
    """Return the parts of a report that a bench provides: latencies, speed-ups, environment, the bench."""
    keys = {file.name: file.key for file in bench.subjects if file.key is not None}
    facts: dict[str, Any] = {}
    for name, key in keys.items():
        facts[key] = {
            "latency_ms": {
                str(latency.threads): latency.model_dump(mode="json", exclude={"quantiles"})
                for latency in bench.latencies
                if latency.subject == name
            },
            "speedups": [
                {**speedup.model_dump(mode="json"), "subject": key, "over": keys[speedup.over]}
                for speedup in bench.speedups
                if speedup.subject == name and speedup.over in keys
            ],
        }
    if teachers := [facts.pop(key) for key in list(facts) if key.startswith("teacher")]:
        facts["teachers"] = teachers
        if len(teachers) == 1:
            facts["teacher"] = teachers[0]
    return {**facts, "environment": dict(bench.environment), "bench": bench.model_dump(mode="json")}


def make_writable(report: Report) -> Report:
    """Escape control characters and bytes that are not UTF-8, and add the checksum."""

    def escape(content: Any) -> Any:
        if isinstance(content, str):
            return escape_controls(content, keep="\n\t")
        if isinstance(content, dict):
            return {escape(key): escape(value) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return [escape(item) for item in content]
        return content

    return with_checksum(Report.model_validate(escape(report.model_dump())))
