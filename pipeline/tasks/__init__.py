"""Tasks: what a network learns from its labels, how it is scored and decoded, and what the report calls it.

One task is one class in one file. To add one, write its file, add its class to ``TASKS`` and its name to
``TaskName`` in ``runs/scores.py``, and let a reader of data sets set ``ImageSet.task``.
"""

import numpy as np

from ..data.dataset import ImageSet
from ..runs.results import DataSummary
from ..runs.scores import TaskName
from .base import Task, thresholds_of
from .classification import Classification
from .multi_label import MultiLabel

__all__ = ["CLASSIFICATION", "MULTI_LABEL", "TASKS", "Task", "task_of", "task_of_file", "thresholds_of"]

CLASSIFICATION, MULTI_LABEL = Classification(), MultiLabel()
TASKS: dict[TaskName, Task] = {task.name: task for task in (CLASSIFICATION, MULTI_LABEL)}


def task_of(data: ImageSet | DataSummary) -> Task:
    """Return the task that a data set is labeled for."""
    return TASKS[data.task]


def task_of_file(thresholds: np.ndarray | None) -> Task:
    """Return the task of a model file by its thresholds, which multi-label files have."""
    return CLASSIFICATION if thresholds is None else MULTI_LABEL
