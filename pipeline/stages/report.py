"""report: write the report of the run."""

from collections.abc import Mapping
from typing import Any

from ..data.training_data import TrainingData
from ..report.run_report import FILES, write
from ..runs.folder import StageResult
from ..training.context import RunContext


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    write(context.folder)
    return StageResult(", ".join(FILES), [])
