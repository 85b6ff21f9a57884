"""Faults in a small run: damaged bytes, a full disk, folders that cannot be written, clocks that jump.

    python -m tests.campaigns.faults all --out faults.jsonl

    flips      flipped bytes, truncated and empty files in a finished run, a killed run and the cache, then
               compress, report, validate, predict or compare (fault_flips.py)
    disk       a disk (tmpfs) that is full after a random amount of writing (fault_disk.py)
    readonly   run folder, cache and data mounted read-only (fault_places.py)
    clock      a clock that jumps by hours and years, and files from the future (fault_places.py)

In each case the command ends as it does without the fault, to the bit, or it stops with one error message
(exit code 1 or 2), keeps all good files unchanged, and succeeds once the fault is removed. Anything else is a
defect: it is printed and makes the exit code 1. Outcomes are appended to --out; the same command resumes.
Linux only; disk and readonly mount file systems, which requires root.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.campaigns.fault_cases import DEFECT, EQUAL, ERROR, Case


@dataclass(frozen=True)
class Outcome:
    """The outcome of one fault."""

    kind: str
    name: str
    """Name of the case, unique."""
    what: str
    """The kind of file or folder with the fault."""
    verb: str
    verdict: str
    message: str = ""
    """The error message, or the description of a defect."""


def run_cases(cases: Iterator[Case], kind: str, done: set[tuple[str, str]]) -> Iterator[Outcome]:
    for case in cases:
        if (kind, case.name) not in done:
            verdict, message = case.run()
            yield Outcome(kind, case.name, case.what, case.verb, verdict, message)


def format_table(outcomes: Sequence[dict[str, str]]) -> str:
    """Return counts of verdicts by fault and command, as Markdown."""
    columns = ("fault", "in", "command", "cases", "identical", "error message", "defects")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|--:|--:|--:|--:|"]
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for entry in outcomes:
        counts.setdefault((entry["kind"], entry["what"], entry["verb"]), Counter())[entry["verdict"]] += 1
    for (kind, what, verb), verdicts in counts.items():
        figures = [sum(verdicts.values()), verdicts[EQUAL], verdicts[ERROR], verdicts[DEFECT]]
        lines.append(f"| {kind} | {what} | {verb} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


def format_by_file(outcomes: Sequence[dict[str, str]]) -> str:
    """Return verdicts by damaged file and command, as Markdown; `–`: not tried."""
    verbs = list(dict.fromkeys(entry["verb"] for entry in outcomes))
    lines = [f"| damaged | {' | '.join(verbs)} |", f"|---|{'---|' * len(verbs)}"]
    for what in dict.fromkeys(entry["what"] for entry in outcomes):
        cells = []
        for verb in verbs:
            tried = Counter(
                entry["verdict"] for entry in outcomes if (entry["what"], entry["verb"]) == (what, verb)
            )
            cells.append(", ".join(f"{count} {verdict}" for verdict, count in tried.items()) or "–")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    from tests.campaigns import fault_disk, fault_flips, fault_places

    kinds: dict[str, Callable[[Path, int], Iterator[Case]]] = {
        "flips": fault_flips.cases,
        "disk": fault_disk.cases,
        "readonly": fault_places.read_only,
        "clock": fault_places.clock,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=[*kinds, "all", "none"], help="none: only print the tables of --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines; cases that it contains are skipped")
    arguments = parser.parse_args()
    done = arguments.out.read_text().splitlines() if arguments.out and arguments.out.exists() else []
    outcomes = [json.loads(line) for line in done]
    logging.disable()  # the cache's warnings about damage
    names = {(entry["kind"], entry["name"]) for entry in outcomes}
    chosen = {"all": list(kinds), "none": []}.get(arguments.kind, [arguments.kind])
    for kind in chosen:
        with tempfile.TemporaryDirectory() as work:
            for outcome in run_cases(kinds[kind](Path(work), arguments.seed), kind, names):
                outcomes.append(asdict(outcome))
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(asdict(outcome)) + "\n")
                print(f"{outcome.verdict:<12} {kind} {outcome.name}: {outcome.message}", flush=True)
    print(format_table([entry for entry in outcomes if entry["kind"] != "flips"]))
    print(format_by_file([entry for entry in outcomes if entry["kind"] == "flips"]))
    sys.exit(any(entry["verdict"] == DEFECT for entry in outcomes))


if __name__ == "__main__":
    main()
