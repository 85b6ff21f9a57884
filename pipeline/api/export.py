"""Export a finished run again, for other processors or with other options (`compress export`)."""

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..runs.folder import RunFolder, read_config
from ..runs.results import Report
from .run import compress


def export(folder: str | Path, **options: Any) -> Report:
    """Run the stages from export on with other options of export; teacher and student are kept.

    Raises:
        UsageError: the folder is not a run, its student is not finished, or other options are given.
    """
    run = RunFolder.read(Path(folder))
    if "student" not in run.record.stages:
        raise UsageError(
            f"The student of {folder} is not finished. Run the original command again without --until "
            f"({run.record.command})."
        )
    read_config(run.path)  # refuse an edited file
    return compress(config=run.path / "config.yaml", out=run.path, **options)
