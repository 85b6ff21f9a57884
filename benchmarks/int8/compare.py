"""Latency of int8 files: ours against other tools' on the same networks and images, all in paired rounds.

    python -m benchmarks.int8.compare --data clothing/ --out runs/int8

The peers aren't dependencies of ours: pip install nncf openvino onnxslim. The networks are timm's with random
weights, since speed depends on types and graphs, not on values; ``files.py`` quantizes them with each tool.
Each subject runs in a separate process, all subjects of a network and a thread count in the same rounds; a
ratio is the median over rounds of the ratio of medians, with its paired bootstrap 95 % interval. The same
command resumes, and repeats what was made or timed with other settings.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from questpress.export.latency.runner import BenchResult, Progress, Subject, bench, environment
from questpress.pipeline.errors import UsageError
from questpress.pipeline.runs.files import atomic_write, write_json

from benchmarks.cells import markdown, run_and_write
from benchmarks.int8.files import KINDS, PEERS, WITHOUT, File, Images, files_of, missing, read, versions

OPENVINO = """
import os
os.environ["ONEDNN_MAX_CPU_ISA"] = {instructions!r}  # read at the first compilation
from questpress.export.latency.worker import main
main(["run", "openvino"])
"""
MODELS = (
    "mobilenetv2_100", "resnet18", "resnet50",
    "mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_lite0",
)  # fmt: skip


@dataclass
class Trials:
    """Every network at every thread count, in a folder from which it resumes."""

    folder: Path
    models: Sequence[str]
    threads: Sequence[int]
    kinds: Sequence[str]
    images: Images
    seconds: float
    seed: int
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, budget: float | None) -> bool:
        """Run what is missing, start nothing after `budget` seconds; return True if all is done."""
        ends = None if budget is None else time.monotonic() + budget

        def has_time() -> bool:
            return ends is None or time.monotonic() < ends

        for model in self.models:
            files = files_of(self.folder / model, model, self.kinds, self.images, self.seed, has_time)
            for threads in self.threads if files else ():
                name = f"{model}.{threads}"
                result = self._done(name, files, threads)
                if result is None and has_time():
                    result = self._time(name, model, files, threads)
                if result is not None:
                    self.done[name] = {"model": model, "threads": threads, **result}
        return len(self.done) == len(self.models) * len(self.threads)

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        write_json(path, {**about, "cells": list(self.done.values())})

    def _made_with(self, files: Mapping[str, File], threads: int) -> dict[str, Any]:
        """Return all that a cell's figures depend on."""
        here = environment()
        return {
            "files": {kind: file.error or file.sha256 for kind, file in files.items()},
            "images": self.images.describe(),
            "seconds": self.seconds,
            "seed": self.seed,
            "threads": threads,
            "versions": versions(self.kinds),
            "machine": {"cpu": here.cpu, "flags": list(here.flags), "cores": here.cores},
        }

    def _done(self, name: str, files: Mapping[str, File], threads: int) -> dict[str, Any] | None:
        """Return an earlier call's figures if they are of these files, this machine and these settings."""
        earlier = read(self.folder / f"{name}.json")
        made_with = json.loads(json.dumps(self._made_with(files, threads)))
        return earlier if earlier is not None and earlier["made_with"] == made_with else None

    def _time(self, name: str, model: str, files: Mapping[str, File], threads: int) -> dict[str, Any]:
        _, inputs = self.images.arrays(model)
        subjects = [Subject(kind, files[kind].path, inputs, script(kind)) for kind in timed(files)]
        options: dict[str, Any] = {"seconds": self.seconds, "seed": self.seed, "progress": log_progress(name)}
        result = bench(subjects, threads=[threads], **options)
        samples: dict[str, Any] = dict(result.to_arrays())
        with atomic_write(self.folder / f"{name}.npz") as part, part.open("wb") as raw:
            np.savez_compressed(raw, **samples)
        cell = {"made_with": self._made_with(files, threads), **figures(result, files, threads)}
        write_json(self.folder / f"{name}.json", cell)
        return cell


def figures(result: BenchResult, files: Mapping[str, File], threads: int) -> dict[str, Any]:
    """Return one cell: latency of each subject, and the speed-up of ours over each other one."""
    kinds = timed(files)
    speedups = [result.speedup("ours", kind, threads) for kind in kinds if kind != "ours"]
    return {
        "files": {kind: file.to_dict() for kind, file in files.items()},
        "latencies": {kind: result.latency(kind, threads).model_dump() for kind in kinds},
        "ours_against": {speedup.over: speedup.model_dump() for speedup in speedups if speedup is not None},
        "environment": asdict(result.environment),
    }


def timed(files: Mapping[str, File]) -> list[str]:
    """Return the kinds that have a file, except those without a rule that are byte for byte ours."""
    return [
        kind
        for kind, file in files.items()
        if file.error is None and not (kind in WITHOUT and file.sha256 == files["ours"].sha256)
    ]


def script(kind: str) -> tuple[str, ...]:
    """Return the command that times it in the place of ONNX Runtime's worker."""
    instructions = KINDS[kind].openvino
    return () if instructions is None else ("-c", OPENVINO.format(instructions=instructions))


def log_progress(name: str) -> Progress:
    """Print what is being timed, once for each change of it."""
    last = ""

    def report(_fraction: float, what: str) -> None:
        nonlocal last
        if what != last and what != "done":
            print(f"== {name}: {what}", file=sys.stderr, flush=True)
        last = what

    return report


Cell = Mapping[str, Any]


def tables(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    """Return the tables of latency, of ours against each other subject and of the files, with notes."""
    if not cells:
        return "nothing is done yet\n"
    machine, made_with = cells[0]["environment"], cells[0]["made_with"]
    tools = ", ".join(f"{name} {number}" for name, number in made_with["versions"].items())
    images = made_with["images"]
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags'])}; {tools}; "
            f"{images['calibration']} calibration images of {images['data']}, {images['size']} px; "
            f"{made_with['seconds']:g} s for each subject.\n",
            "p50, ms:\n",
            latencies(cells, kinds),
            "How many times faster ours is, with its 95 % interval:\n",
            ratios(cells, kinds),
            "The files: MB, signal to noise of the logits against fp32, SHA-256:\n",
            files_table(cells, kinds),
            *(f"- {note}" for note in notes(cells)),
        ]
    )


def latencies(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    header = ["network", "threads", *(KINDS[kind].title for kind in kinds)]
    rows = [[*_row(cell), *(_p50(cell["latencies"].get(kind)) for kind in kinds)] for cell in cells]
    return markdown(header, rows)


def ratios(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    others = [kind for kind in kinds if kind != "ours"]
    header = ["network", "threads", *(KINDS[kind].title for kind in others)]
    rows = [[*_row(cell), *(_ratio(cell, kind) for kind in others)] for cell in cells]
    return markdown(header, rows)


def files_table(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    by_model = {cell["model"]: cell["files"] for cell in cells}
    rows = [
        [
            model,
            KINDS[kind].title,
            f"{files[kind]['bytes'] / 1e6:.2f}",
            "" if files[kind]["logits_db"] is None else f"{files[kind]['logits_db']:.1f} dB",
            files[kind]["sha256"][0][:16],
        ]
        for model, files in by_model.items()
        for kind in kinds
        if KINDS[kind].file_of is None and files[kind]["error"] is None
    ]
    return markdown(["network", "file", "MB", "logits", "SHA-256"], rows)


def notes(cells: Sequence[Cell]) -> list[str]:
    """Return notes on the figures: files that were not made, and other load on the machine."""
    messages = [file["error"] for cell in cells for file in cell["files"].values() if file["error"]]
    messages += [
        f"{cell['model']} on {_threads(cell)}: the warm-up of {KINDS[kind].title} did not settle within 2 %"
        for cell in cells
        for kind, latency in cell["latencies"].items()
        if not latency["settled"]
    ]
    busy = [cell for cell in cells if (cell["environment"]["load"] or 0) > cell["environment"]["cores"] / 2]
    if busy:
        messages.append(f"other work was running at the start of {len(busy)} of {len(cells)} rows")
    return list(dict.fromkeys(messages))


def _row(cell: Cell) -> list[str]:
    return [cell["model"], str(cell["threads"])]


def _threads(cell: Cell) -> str:
    return f"{cell['threads']} thread" + ("s" if cell["threads"] > 1 else "")


def _p50(latency: Mapping[str, Any] | None) -> str:
    p50 = latency and latency["percentiles"].get("p50")
    return f"{p50['value']:.3g}" if p50 else "–"


def _ratio(cell: Cell, kind: str) -> str:
    speedup = cell["ours_against"].get(kind)
    if speedup is None:
        hashes = [cell["files"].get(name, {}).get("sha256") for name in ("ours", kind)]
        return "the same file" if hashes[0] == hashes[1] else "–"
    return f"{speedup['ratio']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f}), {speedup['verdict']}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="timm's names")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"some of {', '.join(PEERS)}, or none")
    parser.add_argument("--rules", action="store_true", help="peers: ours with each rewriting rule left out")
    parser.add_argument("--threads", default="1,2", help="each a row")
    parser.add_argument("--seconds", type=float, default=10.0, help="at least, for each subject of a row")
    parser.add_argument("--data", default="digits", help="as compress takes it")
    parser.add_argument("--images", type=int, default=128, help="of the train role, to calibrate on")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of images, weights and the order of blocks")
    parser.add_argument("--budget", help="start nothing after this time: 9m, 2h")
    parser.add_argument("--out", type=Path, required=True, help="folder from which the same command resumes")
    o = parser.parse_args(arguments)
    if o.rules and o.peers != parser.get_default("peers"):
        parser.error("--rules and --peers are two tables: give one of them")
    peers = () if o.peers == "none" else tuple(o.peers.split(","))
    if unknown := [peer for peer in peers if peer not in PEERS]:
        parser.error(f"--peers: there is no {', '.join(unknown)}; there are {', '.join(PEERS)}")
    kinds = ("fp32", "ours", *(WITHOUT if o.rules else peers))
    if absent := missing(kinds):
        raise SystemExit(absent)
    threads = [int(count) for count in o.threads.split(",")]
    try:
        images = Images(o.data, o.images, o.seed, o.size)
    except UsageError as error:
        raise SystemExit(str(error)) from None
    trials = Trials(o.out, o.models.split(","), threads, kinds, images, o.seconds, o.seed)
    about = {"benchmark": "int8", "kinds": {kind: KINDS[kind].title for kind in kinds}}
    run_and_write(trials, o.budget, about, lambda: tables(list(trials.done.values()), kinds))


if __name__ == "__main__":
    main()
