"""A run folder that has nothing to ship yet, named where a finished one is wanted."""

from pathlib import Path

from .errors import UsageError


def refuse_unfinished(path: Path) -> None:
    """
    Raises:
        UsageError: ``path`` is the folder of a run that has not come to its artifact.
    """
    if (path / "run.json").is_file() and not (path / "artifact" / "manifest.json").is_file():
        raise UsageError(
            f"{path} holds a run that has nothing to ship yet: repeat the command that began it."
        )
