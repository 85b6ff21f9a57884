"""Tasks: what a network learns from its labels, how it is scored and decoded, and what the report calls it.

One task is one class in one file. To add one, write its file, add it to ``TASKS`` and ``TaskName``, and let a
reader of data sets set ``ImageSet.task``.
"""

from functools import cache
from importlib import import_module

import numpy as np

from ...export.runtime import Model
from ..config import TaskName
from ..data.dataset import ImageSet
from ..runs.results import DataSummary
from .base import Task

TASKS: dict[TaskName, str] = {
    "classification": "classification:Classification",
    "multi-label": "multi_label:MultiLabel",
    "detection": "detection:Detection",
}
"""Name -> module:class. Imported when used."""


@cache
def load_task(name: TaskName) -> Task:
    module, cls = TASKS[name].split(":")
    task: Task = getattr(import_module(f".{module}", __package__), cls)()
    return task


def task_of(data: ImageSet | DataSummary) -> Task:
    """Return the task that a data set is labeled for."""
    return load_task(data.task)


def task_of_file(model: Model, thresholds: np.ndarray | None) -> Task:
    """Return the task of a model: one with a decoder detects, one with thresholds has several labels."""
    if model.decoder is not None:
        return load_task("detection")
    return load_task("classification" if thresholds is None else "multi-label")
