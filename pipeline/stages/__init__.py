"""The stages: each reads files, writes files, and gives its part of the report."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from ..config.stages import kind

if TYPE_CHECKING:
    from ..runs.folder import StageResult
    from ..training.job import Job


def stage_run(name: str) -> "Callable[[Job], StageResult]":
    """The function that does a stage; see :func:`~questpress.pipeline.config.stages.stages_of`."""
    run: Callable[[Job], StageResult] = import_module(f".{kind(name)}", __package__).run
    return run
