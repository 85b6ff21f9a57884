"""A run's curves as lines of text: ``metrics.jsonl`` holds one for each epoch.

Of a stage that is done its lines stand in run.json too, and of a training under way in its checkpoint. Both
have a checksum, which a file that others read line by line cannot have: what is damaged in it is made good
from there.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path


def read(file: Path) -> list[str]:
    """The lines that can be read as epochs; none where there is no file."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if training_of(line) is not None]


def training_of(line: str) -> str | None:
    """Which training an epoch belongs to; None where the line is no epoch."""
    try:
        content = json.loads(line)
        return str(content["stage"]) if isinstance(content["epoch"], int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def epoch_of(line: str) -> int:
    return int(json.loads(line)["epoch"])


def by_stage(lines: Iterable[str], stages: Sequence[str]) -> dict[str | None, list[str]]:
    """Lines by the stage whose trainings they tell of, None for those of no such stage: of several teachers,
    ``teacher 0``, ``teacher 1`` … belong to ``teacher``.
    """
    found: dict[str | None, list[str]] = {stage: [] for stage in (*stages, None)}
    for line in lines:
        name = str(training_of(line))
        found[next((one for one in stages if name == one or name.startswith(f"{one} ")), None)].append(line)
    return found


def of_training(lines: Iterable[str], training: str) -> list[str]:
    return [line for line in lines if training_of(line) == training]
