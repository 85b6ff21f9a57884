"""SIGKILL at random moments of a small run, each gone on with to its end: do the weights come out to the bit?

    python benchmarks/kills.py --kills 20

A teacher trained from scratch, a vocabulary, the store of the teacher's answers and a student, on little
pictures and on one thread. The moments are drawn evenly, with ``--seed``, over the processor's time that an
uninterrupted run takes, so that a busy machine changes nothing. Each run has a folder and a cache of its own.
What is compared: every file of weights, every curve (without its times) and every array of the store, whose
checksums are verified too. Linux only: it reads /proc.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["questpress.pipeline.run", "questpress.pipeline.stages.student"])

CLASSES = ("blue", "green", "red")
OPTIONS = (
    "--teacher", "cifar_resnet14", "--teacher-weights", "none", "--student", "cifar_resnet8",
    "--image-size", "16", "--batch-size", "16", "--teacher-epochs", "4", "--epochs", "8",
    "--set", "quest.words=8", "--store-views", "3", "--until", "student", "--quiet",
)  # fmt: skip
SECONDS = "seconds.txt"
"""Where a run that has ended leaves the seconds of the processor that it took."""

TIMED = ("images_per_second", "seconds", "shares", "peak_memory_bytes", "mfu")


@dataclass(frozen=True)
class Outcome:
    """One run that was killed and gone on with."""

    moment: float
    """Seconds of the processor after its start."""
    during: str
    """What ran then, as far as the run folder tells."""
    differs: tuple[str, ...]
    """What is not as in the uninterrupted run; empty: all is, to the bit."""


def pictures(root: Path, count: int = 30) -> Path:
    """Noisy pictures in the colours of their classes."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng([label, number]).integers(0, 120, (20, 24, 3))
            pixels[..., 2 - label] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:03d}.png")
    return root


def campaign(work: Path, kills: int, seed: int) -> Iterator[Outcome]:
    """The uninterrupted run, then ``kills`` interrupted ones."""
    data = pictures(work / "pictures")
    whole = work / "whole"
    run(data, whole).join()
    seconds = float((whole / SECONDS).read_text())
    expected = left_by(whole)
    draw = random.Random(seed)
    for number in range(kills):
        out = work / f"killed{number}"
        while True:
            moment = draw.uniform(0, seconds)
            killed = run(data, out)
            while used(killed) < moment:
                time.sleep(0.001)
            during = where(out)
            killed.kill()
            killed.join()
            if not (out / SECONDS).exists():
                break
            shutil.rmtree(out)  # it was quicker than the uninterrupted one
        went_on = run(data, out)
        went_on.join()
        if went_on.exitcode:
            yield Outcome(moment, during, (f"exit code {went_on.exitcode}",))
            continue
        found = left_by(out)
        differs = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        yield Outcome(moment, during, tuple(differs))


def used(process: multiprocessing.process.BaseProcess) -> float:
    """Seconds of the processor that a process has taken; no end of them when it is gone."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return math.inf if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(data: Path, out: Path) -> multiprocessing.process.BaseProcess:
    """The command in a process of its own."""
    arguments = (*OPTIONS, "--data", str(data), "--out", str(out / "run"), "--cache", str(out / "cache"))
    out.mkdir(exist_ok=True)
    process = CONTEXT.Process(target=_command, args=(arguments, out / SECONDS))
    process.start()
    return process


def _command(arguments: tuple[str, ...], seconds: Path) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from questpress.pipeline.cli import cli

    with open(os.devnull, "w") as nothing:  # noqa: PTH123  (no file)
        os.dup2(nothing.fileno(), 1)
    sys.argv = ["compress", *arguments]
    cli(list(arguments), prog_name="compress", standalone_mode=False)
    seconds.write_text(str(time.process_time()))


def where(out: Path) -> str:
    """The stage and the epoch that a run is in."""
    record = out / "run" / "run.json"
    if not record.exists():
        return "start"
    done = json.loads(record.read_text())["stages"]
    stage = next((name for name in ("teacher", "prepare", "student") if name not in done), "end")
    curve = out / "run" / "metrics.jsonl"
    lines = curve.read_text().splitlines() if curve.exists() else []
    epochs = sum(json.loads(line)["stage"] == stage for line in lines)
    return f"{stage}, {epochs} epochs done" if epochs else stage


def left_by(out: Path) -> dict[str, object]:
    """What a run has left, by name; a damaged entry of the cache is told by its place."""
    from questpress.pipeline.cache import Cache
    from safetensors.numpy import load_file

    found: dict[str, object] = {}
    for file in sorted((out / "run").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.name} {name}"] = tensor.tobytes()
    for line in (out / "run" / "metrics.jsonl").read_text().splitlines():
        content = json.loads(line)
        name = f"curve of the {content['stage']}, epoch {content['epoch']}"
        found[name] = {key: value for key, value in content.items() if key not in TIMED}
    cache = Cache(out / "cache")
    for entry in sorted((out / "cache").glob("*/*")):
        if entry.name.startswith("."):
            continue  # half-written by the killed process, and swept up after a day
        place = cache.get(entry.parent.name, entry.name)
        found[f"{entry.parent.name} {entry.name}"] = place is not None
        for file in sorted(place.glob("*.npy")) if place else []:
            found[f"{entry.name} {file.name}"] = file.read_bytes()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    equal = 0
    with tempfile.TemporaryDirectory() as work:
        for outcome in campaign(Path(work), arguments.kills, arguments.seed):
            equal += not outcome.differs
            verdict = ", ".join(outcome.differs[:3]) + " differ" if outcome.differs else "equal to the bit"
            print(f"killed after {outcome.moment:5.2f} s ({outcome.during}): {verdict}", flush=True)
    print(f"{equal} of {arguments.kills} killed runs ended as the uninterrupted one, to the bit: weights,")
    print("curves and the teacher's stored answers, whose checksums hold.")
    sys.exit(equal != arguments.kills)


if __name__ == "__main__":
    main()
