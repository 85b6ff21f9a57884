"""The stages of a run. Each reads files, writes files and returns its part of the report."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..config.stages import ROUND, get_kind

if TYPE_CHECKING:
    from ..data.training_data import TrainingData
    from ..runs.folder import StageResult
    from ..training.context import RunContext

    Run = Callable[[RunContext, TrainingData, Mapping[str, Any]], StageResult]


def load_stage(name: str) -> "Run":
    """Import a stage and return its function of (context, data, previous).

    ``previous`` holds the facts of the finished stages. For names see
    :func:`~questpress.pipeline.config.stages.list_stages`.
    """
    kind = get_kind(name)
    module = import_module(".student" if kind in (ROUND, "prepare") else f".{kind}", __package__)
    stage: Run = module.prepare if kind == "prepare" else module.run
    return stage
