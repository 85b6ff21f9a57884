"""report: what every stage has found, as one page, one Markdown file and one JSON file."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ...export.artifact import tool_versions
from .. import methods
from ..config import recipes
from ..config.stages import kind, number
from ..errors import UsageError
from ..methods.feed import RECONSTRUCTION
from ..report.assemble import with_later_bench
from ..report.card import write_beside
from ..report.format import together
from ..report.write import writable, write_report
from ..runs.folder import RunFolder, StageResult
from ..runs.results import Epoch, Reconstruction, Report, StageTime
from ..training.job import Job
from .export import ARTIFACT

FILES = ("report.html", "report.md", "report.json")


def run(job: Job) -> StageResult:
    write(job.folder)
    return StageResult(", ".join(FILES), [])


def write(folder: RunFolder) -> Report:
    """Write the three files anew with what is known by now, and what lies beside the files that ship."""
    report = assemble(folder)
    write_report(report, folder.path)
    if report.artifact is not None:
        write_beside(report, folder.path / report.artifact)
    return report


def assemble(folder: RunFolder) -> Report:
    """The report of a run from its folder alone.

    Raises:
        UsageError: what the folder says of itself is not of the form that stages leave.
        JobError: a later bench in it is damaged.
    """
    try:
        return _assembled(folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{folder.path} holds a record from which no report can be made ({_brief(error)}): it was "
            "edited or damaged, or left by another version of compress. Its weights are as they were."
        ) from error


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{error.title}.{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _assembled(folder: RunFolder) -> Report:
    config = folder.options()
    facts = with_later_bench(folder.path, folder.facts())
    tools = folder.record.get("tools") or tools_here()
    environment = {**tools, **facts.pop("environment", {}), **_engines(folder)}
    # What the options do not ask for any more has no part in what ships.
    stages = {name: entry for name, entry in folder.record["stages"].items() if name in folder.stages}
    epochs = _epochs(folder)
    found = Report(
        title=f"{config['student']} from {together(config['teacher'])}",
        command=folder.record["command"],
        method=config["method"],
        method_parameters=config["settings"],
        method_source="; ".join(methods.load(name).paper for name in methods.names(config["method"])) or None,
        recipe=_recipe(config),
        image_size=config["student_size"] or config["image_size"],
        teacher_image_size=config["image_size"],
        epochs=epochs,
        reconstruction=_reconstruction(epochs, config),
        warnings=[text for stage in stages.values() for text in stage["warnings"]],
        stages=[
            StageTime(stage=name, seconds=stage["seconds"], summary=stage["summary"])
            for name, stage in stages.items()
        ],
        environment=environment,
        config={**config, "out": str(folder.path)},
        artifact=ARTIFACT.as_posix() if "validate" in stages else None,
        **facts,
    )
    return writable(found)


def tools_here() -> dict[str, str]:
    """The versions that stages are done with now."""
    return {"python": platform.python_version(), **tool_versions()}


def _recipe(config: Mapping[str, Any]) -> str | None:
    """The recipe's name and source, and what the run has other than it."""
    if config.get("recipe") is None:
        return None
    recipe = recipes.load(config["recipe"])
    changes = ", ".join(f"{name} {value}" for name, value in recipe.changes(config).items())
    return f"{recipe.name} ({recipe.source})" + (f", but {changes}" if changes else "")


def _epochs(folder: RunFolder) -> list[Epoch]:
    epochs = [Epoch.model_validate_json(line) for line in folder.curves()]
    trainings = {kind(stage) for stage in folder.stages}
    return [epoch for epoch in epochs if kind(epoch.stage) in trainings]


def _reconstruction(epochs: Sequence[Epoch], config: Mapping[str, Any]) -> list[Reconstruction]:
    """What FEED has watched, of each teacher, in each training."""
    found = []
    rounds = config.get("rounds", 1)
    for stage in dict.fromkeys(epoch.stage for epoch in epochs):
        own = [epoch.watched for epoch in epochs if epoch.stage == stage]
        names = [name for name in own[-1] if name.startswith(RECONSTRUCTION)]
        place = (number(stage) or rounds) - 1
        teachers = [f"round {place}"] if place else config["teacher"]
        found += [
            Reconstruction(stage=stage, teacher=teachers[t], error=own[-1][name], first=own[0][name])
            for t, name in enumerate(names)
        ]
    return found


def _engines(folder: RunFolder) -> dict[str, str]:
    """On what the networks were trained, and the teachers answered meanwhile."""
    engines: Mapping[str, Mapping[str, Any]] = folder.record.get("engines", {})
    return {
        f"{what} computed on": f"{e['device']} ({e['name']}), {e['precision']}, {e['threads']} threads"
        for what, e in engines.items()
    }
