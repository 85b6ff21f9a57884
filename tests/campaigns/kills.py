"""Kill a small run at random moments, resume it, and compare the results to the bit.

    python -m tests.campaigns.kills --kills 200 --out kills.jsonl

The run has every stage (small_run.py). A stage is drawn uniformly, then a moment of its processor time, so
that other load on the machine changes nothing; the killed run starts from a copy of the uninterrupted one
before that stage. Compared are weights, ONNX files, manifest, int8 ranges and options by their bytes; curves,
record and report without times; and the arrays of the cache with their checksums. Processes that outlive the
killed one are counted. Outcomes are appended to --out; the same command resumes. Linux only: it reads /proc.
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
    cpu_seconds,
    find_differences,
    list_descendants,
    make_images,
    read_results,
    run_options,
    run_stages,
    save_each_step,
    stages,
    start,
    wait_for_end,
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one killed and resumed run."""

    number: int
    stage: str
    moment: float
    """Processor seconds after the start."""
    during: str
    """Stage and epoch at that moment, from the run folder."""
    left: int
    """Number of processes that outlived it."""
    differs: tuple[str, ...]
    """Names of results that differ from the uninterrupted run."""


def campaign(
    work: Path, numbers: Sequence[int], seed: int, only: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """Do the uninterrupted run, at once and stage by stage, then killed ones in the stages `only`."""
    data = make_images(work / "pictures")
    whole = work / "whole"
    whole.mkdir()
    uninterrupted = start(run_options(data, whole, "--quiet"), work / "log")
    uninterrupted.join()
    if uninterrupted.exitcode:
        raise SystemExit((work / "log.err").read_text())
    expected = read_results(whole)
    chosen = only or stages()
    last = max(map(stages().index, chosen))
    seconds = run_stages(data, work / "staged", work / "before", stages()[: last + 1])
    if last == len(stages()) - 1 and (differs := find_differences(read_results(work / "staged"), expected)):
        raise SystemExit(f"Two uninterrupted runs differ: {', '.join(differs)}.")
    for number in numbers:
        draw = random.Random(f"{seed} {number}")
        stage = draw.choice(chosen)
        out = work / f"killed{number}"
        moment, during, left = _kill(data, work / "before" / stage, out, seconds[stage], draw)
        resumed = start(run_options(data, out, "--quiet"), work / "log")
        resumed.join()
        if resumed.exitcode:
            log = (work / "log.err").read_text().strip()
            differs = (f"exit code {resumed.exitcode}", log[-2000:])
        else:
            differs = find_differences(read_results(out), expected)
        yield Outcome(number, stage, moment, during, left, differs)
        if not differs:
            shutil.rmtree(out)


def _kill(data: Path, before: Path, out: Path, seconds: float, draw: random.Random) -> tuple[float, str, int]:
    """Resume a copy of ``before`` and kill it; return the moment, the progress and the survivors."""
    while True:
        shutil.copytree(before, out)
        moment = draw.uniform(0, seconds)
        process = start(run_options(data, out, "--quiet"), out / "log", save_each_step)
        while cpu_seconds(process.pid) < moment:
            time.sleep(0.001)
        children, during = list_descendants(process.pid), describe_progress(out)
        process.kill()
        process.join()
        if process.exitcode == -9:
            return moment, during, 0 if wait_for_end(children) else len(children)
        shutil.rmtree(out)  # it finished earlier than the uninterrupted one


def describe_progress(out: Path) -> str:
    """Return the stage and the number of epochs that a run has done."""
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
    parser.add_argument("--out", type=Path, help="JSON lines; kills that it contains are skipped")
    parser.add_argument("--stage", action="append", help="only kill in this stage; can be repeated")
    arguments = parser.parse_args()
    lines = arguments.out.read_text().splitlines() if arguments.out and arguments.out.exists() else []
    outcomes = [json.loads(line) for line in lines]
    numbers = sorted(set(range(arguments.kills)) - {entry["number"] for entry in outcomes})
    with tempfile.TemporaryDirectory() as work:
        for outcome in campaign(Path(work), numbers, arguments.seed, arguments.stage):
            outcomes.append(asdict(outcome))
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
            verdict = f"{', '.join(outcome.differs[:3])} differ" if outcome.differs else "equal to the bit"
            print(f"killed after {outcome.moment:5.2f} s ({outcome.during}): {verdict}", flush=True)
    equal = sum(not entry["differs"] for entry in outcomes)
    left = sum(entry["left"] for entry in outcomes)
    print(f"{equal} of {len(outcomes)} killed runs equal the uninterrupted one to the bit;")
    print(f"{left} processes outlived a killed one. Kills by stage:")
    print(
        ", ".join(f"{name} {count}" for name, count in Counter(entry["stage"] for entry in outcomes).items())
    )
    sys.exit(equal != len(outcomes) or left > 0)


if __name__ == "__main__":
    main()
