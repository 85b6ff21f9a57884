"""What a fault is, and the verdict on a command that has met one: see faults.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.small_run import PAGES, differences, left_by

EQUAL, TOLD, DEFECT = "as without", "one sentence", "DEFECT"

OWN = ("run.json", ".run.json", "config.yaml", "metrics.jsonl", "report.json", ".lock")
"""Files of a run in which it notes what it does: they change whenever a command does anything."""


@dataclass(frozen=True)
class Case:
    """One fault: ``try_it`` brings it about and says what came of it."""

    name: str
    what: str
    verb: str
    try_it: Callable[[], tuple[str, str]]


def kept(folder: Path, but: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file of a run folder and its cache that may not change without need, whole."""
    places = (folder / "run", folder / "cache")  # which may be links
    return {
        name: file.read_bytes()
        for file in sorted(one for place in places for one in place.rglob("*"))
        if file.is_file()
        and (name := file.relative_to(folder).as_posix()).removeprefix("run/") not in (*OWN, *PAGES, *but)
        and not any(part.startswith(".") for part in Path(name).parts)
    }


def judged(
    code: int | None, said: str, before: dict[str, bytes], folder: Path, expected: dict[str, object] | None
) -> tuple[str, str]:
    """The verdict on a command that ended so.

    Args:
        before: what was good, as ``kept`` gives it.
        expected: what it leaves without the fault; None where that is looked at elsewhere.
    """
    if code == 0:
        differs = () if expected is None else differences(left_by(folder), expected)
        return (DEFECT, f"differ: {', '.join(differs[:5])}") if differs else (EQUAL, "")
    sentences = [line for line in said.splitlines() if line.startswith("Error: ")]
    if code not in (1, 2) or "Traceback" in said or len(sentences) != 1:
        return DEFECT, f"exit code {code}: {said.strip()[-1500:]}"
    after = kept(folder)
    lost = [name for name, content in before.items() if after.get(name) != content and not _fleeting(name)]
    if lost:
        return DEFECT, f"lost: {', '.join(lost[:5])} ({sentences[0]})"
    return TOLD, sentences[0]


def _fleeting(name: str) -> bool:
    """A checkpoint is followed by newer ones, a manifest goes while its files are made anew, and an entry of
    the cache that is damaged goes too.
    """
    return name.startswith(("run/checkpoint/", "cache/")) or name == "run/artifact/manifest.json"
