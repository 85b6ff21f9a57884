"""Options, their defaults and limits, and recipes."""

from typing import Literal

TaskName = Literal["classification", "multi-label", "detection"]
"""The kinds of labels; see ``pipeline/tasks``."""
