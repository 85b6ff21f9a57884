"""Fault cases and the verdict on a command; see faults.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.small_run import PAGES, find_differences, read_results

EQUAL, ERROR, DEFECT = "identical", "error message", "DEFECT"

LOG_FILES = ("run.json", ".run.json", "config.yaml", "metrics.jsonl", "report.json", ".lock")
"""Records and logs of a run, which change with every command."""


@dataclass(frozen=True)
class Case:
    """One fault; ``run`` causes it and returns the verdict and a message."""

    name: str
    what: str
    verb: str
    run: Callable[[], tuple[str, str]]


def read_files(folder: Path, excluded: Sequence[str] = ()) -> dict[str, bytes]:
    """Return the contents of files of a run folder and its cache that must not change without need."""
    places = (folder / "run", folder / "cache")  # which may be links
    return {
        name: file.read_bytes()
        for file in sorted(path for place in places for path in place.rglob("*"))
        if file.is_file()
        and (name := file.relative_to(folder).as_posix()).removeprefix("run/")
        not in (*LOG_FILES, *PAGES, *excluded)
        and not any(part.startswith(".") for part in Path(name).parts)
    }


def judge(
    code: int | None, errors: str, before: dict[str, bytes], folder: Path, expected: dict[str, object] | None
) -> tuple[str, str]:
    """Return the verdict on a finished command, and a message.

    Args:
        before: good files, from ``read_files``.
        expected: results without the fault; None if the caller compares them.
    """
    if code == 0:
        differs = () if expected is None else find_differences(read_results(folder), expected)
        return (DEFECT, f"differ: {', '.join(differs[:5])}") if differs else (EQUAL, "")
    sentences = [line for line in errors.splitlines() if line.startswith("Error: ")]
    if code not in (1, 2) or "Traceback" in errors or len(sentences) != 1:
        return DEFECT, f"exit code {code}: {errors.strip()[-1500:]}"
    after = read_files(folder)
    lost = [name for name, content in before.items() if after.get(name) != content and not _may_change(name)]
    if lost:
        return DEFECT, f"lost: {', '.join(lost[:5])} ({sentences[0]})"
    return ERROR, sentences[0]


def _may_change(name: str) -> bool:
    """Return True for checkpoints, the manifest and cache entries, which a run may replace or remove."""
    return name.startswith(("run/checkpoint/", "cache/")) or name == "run/artifact/manifest.json"
