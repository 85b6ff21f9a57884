"""Everything that only a GPU can show, for the first time that there is one: in slices, with one table.

    python -m benchmarks.gpu_first_hour --data cifar100/ --out runs/gpu

``--data`` is CIFAR-100 as train/ and test/ of class folders. One command works for at most nine minutes
(``--limit``); the same command continues from ``--out``, where results.md has a row for each part and then
all tables. A part that fails is reported there and repeated by the next command, after the other parts.

In this order: throughput of each pair, compilation and CUDA graphs, a run that is stopped and resumed
compared with an uninterrupted one, two processes if there are two GPUs, and accuracy by the papers' recipes
on two pairs, each teacher first.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from questpress.pipeline.errors import UsageError
from questpress.pipeline.runs.device import choose_device, device_name
from questpress.pipeline.runs.files import write_json
from safetensors.numpy import load_file

from benchmarks import cells
from benchmarks.papers import crd
from benchmarks.training import compiled, throughput

PAIRS = ("wrn40-2:16-2", "r56:r20")
METHODS = ("none", "kd", "quest")
COMPILED = ("supervised", "QuEST online")
TIMED = ("--seconds", "10", "--rounds", "10")

CHECKED, CHECKED_EPOCHS = "r56:r20", 2
"""The runs that are compared with each other."""

STOP_AT = 0.5
"""Fraction of the training at which a run is stopped."""

WHOLE, RESUMED, RANKS = "uninterrupted run", "resumed run", "run on two GPUs"
RUNS = {WHOLE: "whole", RESUMED: "resumed", RANKS: "ranks"}
"""Folder of each of these runs."""

TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "-m")

Part = Callable[[float], bool]
"""Works for at most a number of seconds, 0 if only to find out; returns True if it is done."""


class FirstHour:
    """All parts, in a folder from which they continue."""

    def __init__(self, folder: Path, data: str, device: str, epochs: str | None) -> None:
        self.folder, self.device, self.epochs = folder, device, epochs
        self.data = ["--data", data, "--cache", str(folder / "cache"), "--device", device]
        self.done: dict[str, Any] = {}
        self.states: dict[str, str] = {}
        common = [*self.data, *(["--epochs", epochs, "--teacher-epochs", epochs] if epochs else [])]
        methods: dict[str, list[str]] = {name: [] for name in METHODS}
        self.table = cells.Table(folder, crd.build_cells(folder, list(PAIRS), methods, "0", common))

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Yield the parts by name, the shortest first."""
        for pair in throughput.PAIRS:
            yield self._measurement(f"throughput {pair}", throughput, "--pairs", pair)
        pair = next(name for name in throughput.PAIRS if name.startswith("resnet56"))
        for subject in COMPILED:
            chosen = ("--pairs", pair, "--subjects", subject)
            yield self._measurement(f"compiled {subject}", compiled, *chosen)
        yield WHOLE, partial(self._run, WHOLE)
        yield "stopped run", self._stop
        yield RESUMED, partial(self._run, RESUMED)
        if self.device == "cuda" and torch.cuda.device_count() > 1:
            yield RANKS, partial(self._run, RANKS, launcher=TORCHRUN)
        for cell in self.table.cells:
            yield f"accuracy {cell.name}", partial(self.table.run_cell, cell)

    def run(self, budget: float | None) -> bool:
        """Do what is missing within ``budget`` seconds; return True if everything is done."""
        ends = time.monotonic() + (budget or 0)
        parts, file = dict(self.parts()), self.folder / "parts.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.states = dict.fromkeys(parts, "left")
        try:
            for name in sorted(parts, key=lambda name: before.get(name, "left") not in ("left", "done")):
                try:
                    if parts[name](max(0.0, ends - time.monotonic())):
                        self.states[name] = "done"
                except SystemExit as error:
                    self.states[name] = str(error)
        finally:
            write_json(file, self.states)
        finished = set(self.states.values()) == {"done"}
        if RANKS not in self.states:
            self.states[RANKS] = "skipped: it requires two GPUs"
        return finished

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write all that was measured."""
        write_json(path, {**about, "parts": self.states, "results": self.done, "cells": self.table.done})

    def text(self) -> str:
        """Return the state of each part, and the tables of those that are done, in Markdown."""
        texts = [cells.markdown(["part", "state"], [[*row] for row in self.states.items()])]
        for found in self.done.values():
            texts += map(throughput.text, found.get("pairs", ()))
            texts += map(compiled.text, found.get("compiled", ()))
        if WHOLE in self.done:
            texts.append(self._compare_runs())
        if self.table.done:
            rows = crd.build_rows(self.table, list(PAIRS), list(METHODS))
            texts.append(cells.markdown(crd.COLUMNS, rows))
        return "\n".join(texts)

    def _measurement(self, name: str, module: ModuleType, *chosen: str) -> tuple[str, Part]:
        """Return the part of a module that writes its results to ``--out`` when it has all of them."""
        file = self.folder / f"{name.replace(' ', '-')}.json"
        command = [module.__name__, *chosen, "--device", self.device, *TIMED, "--out", str(file)]

        def work(seconds: float) -> bool:
            _run_command(command, seconds, file)
            if file.exists():
                self.done[name] = json.loads(file.read_text(encoding="utf-8"))
            elif seconds > 0:
                raise SystemExit("stopped at the end of a slice; repeated after the other parts")
            return file.exists()

        return name, work

    def _command(self, name: str) -> list[str]:
        teacher, student, _ = crd.PAIRS[CHECKED]
        epochs = str(min(CHECKED_EPOCHS, int(self.epochs or CHECKED_EPOCHS)))
        return [
            "questpress.pipeline", "--teacher", teacher, "--teacher-weights", "none", "--student", student,
            "--recipe", crd.RECIPES["quest"], *self.data, "--teacher-epochs", "1", "--epochs", epochs,
            "--deterministic",
            "--until", "student", "--out", str(self.folder / RUNS[name]),
        ]  # fmt: skip

    def _run(self, name: str, seconds: float, launcher: Sequence[str] = ()) -> bool:
        run = self.folder / RUNS[name]
        file = run / "student.safetensors"
        _run_command([*launcher, *self._command(name)], seconds, file)
        if file.exists():
            self.done[name] = _last_epoch(run)
        return file.exists()

    def _stop(self, seconds: float) -> bool:
        """Stop a run in the middle of its training."""
        mark, run = self.folder / "stopped", self.folder / RUNS[RESUMED]
        checkpoint = run / "checkpoint" / "student.pt"
        whole = self.done.get(WHOLE)
        if mark.exists() or whole is None:
            return mark.exists()
        trained: list[float] = []

        def stop() -> bool:
            if checkpoint.exists() and not trained:
                trained.append(time.monotonic())
            return bool(trained) and time.monotonic() >= trained[0] + STOP_AT * whole["training seconds"]

        _run_command(self._command(RESUMED), seconds, mark, stop)
        if (run / "student.safetensors").exists():
            raise SystemExit(f"the training ended before it could be stopped; remove {run}")
        if checkpoint.exists():
            mark.touch()
        return mark.exists()

    def _compare_runs(self) -> str:
        expected = load_file(self.folder / RUNS[WHOLE] / "student.safetensors")
        rows = []
        for name, folder in RUNS.items():
            if name not in self.done:
                continue
            weights = load_file(self.folder / folder / "student.safetensors")
            gaps = [np.abs(weights[key] - value).max() for key, value in expected.items()]
            last = self.done[name]
            difference = "" if name == WHOLE else f"{max(gaps):.1e}" if max(gaps) else "equal to the bit"
            rows.append([name, f"{last['images_per_second']:.0f}", f"{last['loss']:.6f}", difference])
        columns = [
            "run",
            "images/s",
            "loss of the last epoch",
            "largest difference of a weight from the first row's",
        ]
        return cells.markdown(columns, rows)


def _run_command(
    command: Sequence[str], seconds: float, result: Path, stop: Callable[[], bool] = lambda: False
) -> None:
    """Run a module unless its result exists. Raises SystemExit if it fails."""
    if result.exists() or seconds <= 0:
        return
    print(f"== {' '.join(command)}", file=sys.stderr, flush=True)
    code = cells.run_command([sys.executable, "-m", *command], seconds, stop)
    if code:
        raise SystemExit(f"failed with exit code {code}")


def _last_epoch(run: Path) -> dict[str, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    epochs = [line for line in lines if line["stage"] == "student"]
    return {
        "images_per_second": epochs[-1]["images_per_second"],
        "loss": epochs[-1]["losses"]["loss"],
        "training seconds": sum(epoch["seconds"] for epoch in epochs),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="CIFAR-100 as train/ and test/ of class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--limit", type=int, default=540, help="seconds of a slice [default: 540]")
    parser.add_argument("--epochs", help="other than the recipes' 240, for a trial")
    parser.add_argument("--device", default="cuda", help="cpu for a trial [default: cuda]")
    options = parser.parse_args(arguments)
    try:
        device = choose_device(options.device)
    except UsageError as error:
        parser.error(str(error))
    hour = FirstHour(options.out, options.data, device, options.epochs)
    about = {
        "benchmark": "first hour on a GPU",
        "device": f"{device} ({device_name(device)})",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
    }
    head = f"{about['device']}, torch {about['torch']}\n\n"
    # An interrupted command has some time to save its state, which is part of the slice.
    budget = max(options.limit - cells.GRACE_SECONDS, options.limit / 2)
    cells.run_and_write(hour, f"{budget:.0f}s", about, lambda: head + hour.text())


if __name__ == "__main__":
    main()
