"""Tasks: what a network learns from its labels, how it is scored and decoded, and what the report calls it.

One task is one class in one file. To add one, write its file, add its class to ``TASKS`` and its name to
``TaskName`` in ``runs/scores.py``, and let a reader of data sets set ``ImageSet.task``.
"""

from typing import Protocol

import numpy as np

from ..runs.scores import TaskName
from .base import Chance, PairedTest, Task, thresholds_of
from .classification import Classification
from .multi_label import MultiLabel

__all__ = [
    "CLASSIFICATION",
    "MULTI_LABEL",
    "TASKS",
    "Chance",
    "PairedTest",
    "Task",
    "task_of",
    "task_of_file",
    "thresholds_of",
]

CLASSIFICATION, MULTI_LABEL = Classification(), MultiLabel()
TASKS: dict[TaskName, Task] = {task.name: task for task in (CLASSIFICATION, MULTI_LABEL)}


class HasTask(Protocol):
    """A data set, or the summary of one in a report."""

    @property
    def task(self) -> TaskName: ...


def task_of(data: HasTask) -> Task:
    """Return the task that a data set is labelled for."""
    return TASKS[data.task]


def task_of_file(thresholds: np.ndarray | None) -> Task:
    """Return the task of a model file by its thresholds, which multi-label files have."""
    return CLASSIFICATION if thresholds is None else MULTI_LABEL
