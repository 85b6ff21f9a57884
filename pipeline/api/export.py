"""Export a finished run again, for other processors or with other options (`compress export`)."""

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..runs.folder import RunFolder, read_config
from ..runs.results import Report
from .run import compress


def export_again(folder: str | Path, **options: Any) -> Report:
    """Do a run's stages from export on with other options of theirs; the teacher and the student stay.

    Raises:
        UsageError: the folder holds no run, one whose student is not finished, or other options than those.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise UsageError(f"{folder} holds no run: name a folder that compress has made.")
    run = RunFolder(folder, writes=False)
    run.open(fresh=False)
    if "student" not in run.record["stages"]:
        raise UsageError(
            f"{folder} holds a run whose student is not finished: repeat the command that began it, without "
            f"--until ({run.record.get('command', 'compress …')})."
        )
    read_config(folder)  # as the run has left it
    return compress(config=folder / "config.yaml", out=folder, **options)
