"""SIGKILL at random moments of a small run, each gone on with to its end: does it come out to the bit?

    python -m tests.campaigns.kills --kills 200 --out kills.jsonl

The run has every stage (small_run.py). A kill falls into a stage drawn evenly and, within it, into a moment
drawn evenly over the processor's time that this stage takes uninterrupted, so that a busy machine changes
nothing; the killed run begins as a copy of the uninterrupted one before that stage. Then the same command is
given again. What is compared: weights, ONNX files, manifest, int8 ranges and options by their bytes, curves,
the run's record and the report without times, and every array of the store, whose checksums are verified too.
Processes that the killed one leaves behind are counted. Outcomes are appended to --out: the same command
goes on where it was cut. Linux only: it reads /proc.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.campaigns.small_run import (
    below,
    differences,
    gone,
    left_by,
    pictures,
    run_options,
    staged,
    stages,
    start,
    used,
)


@dataclass(frozen=True)
class Outcome:
    """One run that was killed and gone on with."""

    number: int
    stage: str
    moment: float
    """Seconds of the processor after the process began."""
    during: str
    """What ran when it was killed, as far as the run folder tells."""
    left: int
    """Processes that did not end with it."""
    differs: tuple[str, ...]
    """What is not as in the uninterrupted run; empty: all is, to the bit."""


def campaign(
    work: Path, numbers: Sequence[int], seed: int, of: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """The uninterrupted run, in one go and stage by stage, then interrupted ones.

    Args:
        of: the stages that kills fall into; all of them where none is named.
    """
    data = pictures(work / "pictures")
    whole = work / "whole"
    whole.mkdir()
    uninterrupted = start(run_options(data, whole, "--quiet"), work / "told")
    uninterrupted.join()
    if uninterrupted.exitcode:
        raise SystemExit((work / "told.err").read_text())
    expected = left_by(whole)
    chosen = of or stages()
    last = max(map(stages().index, chosen))
    seconds = staged(data, work / "staged", work / "before", stages()[: last + 1])
    if last == len(stages()) - 1 and (differs := differences(left_by(work / "staged"), expected)):
        raise SystemExit(f"Two uninterrupted runs differ: {', '.join(differs)}.")
    for number in numbers:
        draw = random.Random(f"{seed} {number}")
        stage = draw.choice(chosen)
        out = work / f"killed{number}"
        moment, during, left = _killed(data, work / "before" / stage, out, seconds[stage], draw)
        went_on = start(run_options(data, out, "--quiet"), work / "told")
        went_on.join()
        if went_on.exitcode:
            told = (work / "told.err").read_text().strip()
            differs = (f"exit code {went_on.exitcode}", told[-2000:])
        else:
            differs = differences(left_by(out), expected)
        yield Outcome(number, stage, moment, during, left, differs)
        if not differs:
            shutil.rmtree(out)


def _killed(
    data: Path, before: Path, out: Path, seconds: float, draw: random.Random
) -> tuple[float, str, int]:
    """A copy of ``before``, gone on with and killed: the moment, what ran, and how many processes it left."""
    while True:
        shutil.copytree(before, out)
        moment = draw.uniform(0, seconds)
        process = start(run_options(data, out, "--quiet"), out / "told")
        while used(process.pid) < moment:
            time.sleep(0.001)
        children, during = below(process.pid), where(out)
        process.kill()
        process.join()
        if process.exitcode == -9:
            return moment, during, 0 if gone(children) else len(children)
        shutil.rmtree(out)  # it was quicker than the uninterrupted one


def where(out: Path) -> str:
    """The stage and the epoch that a run is in."""
    record = out / "run" / "run.json"
    if not record.exists():
        return "start"
    done = json.loads(record.read_text())["stages"]
    stage = next((name for name in stages() if name not in done), "end")
    curve = out / "run" / "metrics.jsonl"
    lines = curve.read_text().splitlines() if curve.exists() else []
    epochs = sum(json.loads(line)["stage"] == stage for line in lines)
    return f"{stage}, {epochs} epochs done" if epochs else stage


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines; what stands there already is not done again")
    parser.add_argument("--stage", action="append", help="kill in this stage alone")
    arguments = parser.parse_args()
    known = arguments.out.read_text().splitlines() if arguments.out and arguments.out.exists() else []
    outcomes = [json.loads(line) for line in known]
    numbers = sorted(set(range(arguments.kills)) - {one["number"] for one in outcomes})
    with tempfile.TemporaryDirectory() as work:
        for outcome in campaign(Path(work), numbers, arguments.seed, arguments.stage):
            outcomes.append(asdict(outcome))
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
            verdict = f"{', '.join(outcome.differs[:3])} differ" if outcome.differs else "equal to the bit"
            print(f"killed after {outcome.moment:5.2f} s ({outcome.during}): {verdict}", flush=True)
    equal = sum(not one["differs"] for one in outcomes)
    left = sum(one["left"] for one in outcomes)
    print(f"{equal} of {len(outcomes)} killed runs ended as the uninterrupted one, to the bit;")
    print(f"{left} processes outlived the one that was killed. Kills by stage:")
    print(", ".join(f"{name} {count}" for name, count in Counter(one["stage"] for one in outcomes).items()))
    sys.exit(equal != len(outcomes) or left > 0)


if __name__ == "__main__":
    main()
