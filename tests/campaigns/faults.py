"""Faults in a small run: damaged bytes, a full disk, folders that cannot be written, clocks that jump.

    python -m tests.campaigns.faults all --out faults.jsonl

    flips      bytes flipped, a file cut short or emptied: each file of a finished run, of one that was
               killed, and of the cache; then compress, report, validate, predict or compare (fault_flips.py)
    disk       a disk that is full after a random amount of writing: a real one, a tmpfs (fault_disk.py)
    readonly   run folder, cache and data that may only be read                          (fault_places.py)
    clock      a clock that jumps by hours and years, and files from the future          (fault_places.py)

In every case either the command ends as it does without the fault, to the bit, or it stops with one sentence
(exit code 1 or 2), all that was good before is there byte for byte, and where the fault can be taken away the
same command then ends as it should. Anything else is a defect: it is printed, and makes the exit code 1.
Outcomes are appended to --out; the same command goes on where it was cut. Linux; disk and readonly mount file
systems and so want root.
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

from tests.campaigns.fault_cases import DEFECT, EQUAL, TOLD, Case


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    kind: str
    name: str
    """Of the case: the same name is the same case."""
    what: str
    """The file or the place at fault, in general words."""
    verb: str
    verdict: str
    told: str = ""
    """The sentence; of a defect what was wrong."""


def campaign(cases: Iterator[Case], kind: str, known: set[tuple[str, str]]) -> Iterator[Outcome]:
    for case in cases:
        if (kind, case.name) not in known:
            verdict, told = case.try_it()
            yield Outcome(kind, case.name, case.what, case.verb, verdict, told)


def table(outcomes: Sequence[dict[str, str]]) -> str:
    """Outcomes by what was at fault and verb, as Markdown."""
    columns = ("fault", "in", "command", "cases", "as without", "one sentence", "defects")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|--:|--:|--:|--:|"]
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for one in outcomes:
        counts.setdefault((one["kind"], one["what"], one["verb"]), Counter())[one["verdict"]] += 1
    for (kind, what, verb), found in counts.items():
        figures = [sum(found.values()), found[EQUAL], found[TOLD], found[DEFECT]]
        lines.append(f"| {kind} | {what} | {verb} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


def by_file(outcomes: Sequence[dict[str, str]]) -> str:
    """What became of damage, by file and command, as Markdown; `–`: it was not tried."""
    verbs = list(dict.fromkeys(one["verb"] for one in outcomes))
    lines = [f"| damaged | {' | '.join(verbs)} |", f"|---|{'---|' * len(verbs)}"]
    for what in dict.fromkeys(one["what"] for one in outcomes):
        cells = []
        for verb in verbs:
            tried = Counter(one["verdict"] for one in outcomes if (one["what"], one["verb"]) == (what, verb))
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
    parser.add_argument("kind", choices=[*kinds, "all", "none"], help="none: the tables of --out alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines; what stands there already is not done again")
    arguments = parser.parse_args()
    known = arguments.out.read_text().splitlines() if arguments.out and arguments.out.exists() else []
    outcomes = [json.loads(line) for line in known]
    logging.disable()  # what the cache says of damage that is looked for here
    names = {(one["kind"], one["name"]) for one in outcomes}
    wanted = {"all": list(kinds), "none": []}.get(arguments.kind, [arguments.kind])
    for kind in wanted:
        with tempfile.TemporaryDirectory() as work:
            for outcome in campaign(kinds[kind](Path(work), arguments.seed), kind, names):
                outcomes.append(asdict(outcome))
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(asdict(outcome)) + "\n")
                print(f"{outcome.verdict:<12} {kind} {outcome.name}: {outcome.told}", flush=True)
    print(table([one for one in outcomes if one["kind"] != "flips"]))
    print(by_file([one for one in outcomes if one["kind"] == "flips"]))
    sys.exit(any(one["verdict"] == DEFECT for one in outcomes))


if __name__ == "__main__":
    main()
