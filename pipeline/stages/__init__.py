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
    """Import a stage and return its ``run(context, data, previous)``.

    ``previous`` holds the facts of the finished stages. For names see
    :func:`~questpress.pipeline.config.stages.list_stages`.
    """
    module = "student" if get_kind(name) == ROUND else get_kind(name)
    run: Run = import_module(f".{module}", __package__).run
    return run
