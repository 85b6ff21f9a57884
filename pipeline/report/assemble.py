"""A run's report with a later bench in it: what `compress bench RUN` measured stands for what the run did."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import JobError
from ..runs.bench_results import Bench
from ..runs.folder import RunFolder
from ..runs.record import read_checked

LATER = Path("bench/bench.json")
"""What `compress bench` leaves in a run folder. The run's own bench removes it."""


def report_anew(run: Path) -> None:
    """Write the three files of a run's report with what is known by now."""
    from ..stages.report import write

    folder = RunFolder(run, writes=False)
    folder.open(fresh=False)
    write(folder)


def with_later_bench(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A run's facts with the latencies of a bench after it, where there is one of the very same files."""
    later = later_bench(folder)
    if later is None or not _same_files(later, facts):
        return dict(facts)
    newer = bench_facts(later)
    over: dict[str, Any] = {"bench": newer["bench"]}
    for key, one in newer.items():
        known = facts.get(key)
        if isinstance(known, Mapping) and key != "bench":
            over[key] = {**known, **one}
        elif key == "teachers" and known is not None and len(known) == len(one):
            over[key] = [{**before, **after} for before, after in zip(known, one, strict=True)]
    return {**facts, **over}


def later_bench(folder: Path) -> Bench | None:
    """None where there is none, or of another version.

    Raises:
        JobError: it is damaged.
    """
    file = folder / LATER
    if not file.exists():
        return None
    try:
        content = read_checked(file)
    except (OSError, ValueError) as error:
        raise JobError(
            f"{file} is damaged ({error}): delete it, or measure again with compress bench {folder}."
        ) from error
    try:
        return Bench.model_validate(content)
    except ValidationError:
        return None


def _same_files(later: Bench, facts: Mapping[str, Any]) -> bool:
    timed = {one.key: one.sha256 for one in later.subjects if one.key is not None}
    now = {key: (facts.get(key) or {}).get("sha256") for key in ("student", "student_int8")}
    return "student" in timed and all(timed.get(key) == hashed for key, hashed in now.items() if hashed)


def bench_facts(bench: Bench) -> dict[str, Any]:
    """Return the parts of a report that a bench provides: latency and speed-ups of the run's networks, the
    environment, and the bench itself.
    """
    keys = {file.name: file.key for file in bench.subjects if file.key is not None}
    facts: dict[str, Any] = {}
    for name, key in keys.items():
        facts[key] = {
            "latency_ms": {
                str(latency.threads): latency.model_dump(mode="json", exclude={"quantiles"})
                for latency in bench.latencies
                if latency.subject == name
            },
            "speedups": [
                {**speedup.model_dump(mode="json"), "subject": key, "over": keys[speedup.over]}
                for speedup in bench.speedups
                if speedup.subject == name and speedup.over in keys
            ],
        }
    teachers = [facts.pop(key) for key in list(facts) if key.startswith("teacher")]
    if teachers:
        facts["teachers"] = teachers
    if len(teachers) == 1:
        facts["teacher"] = teachers[0]
    return {**facts, "environment": dict(bench.environment), "bench": bench.model_dump(mode="json")}
