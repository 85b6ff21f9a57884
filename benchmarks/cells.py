"""Experiments as cells of a table: each one run of the command, resumable, done in slices of a given time."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from questpress.pipeline.config.options import parse_time
from questpress.pipeline.runs.files import write_json
from questpress.pipeline.runs.scores import Proportion

GRACE_SECONDS = 60
"""How long an interrupted command may take to stop."""

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Cell:
    """One run: its row, method and seed in the table, and its command line."""

    row: str
    method: str
    seed: int
    arguments: Sequence[str]
    until: str = "validate"

    @property
    def name(self) -> str:
        return f"{self.row}.{self.method}.{self.seed}".replace(":", "-").replace("/", "-").replace("+", "-")


@dataclass
class Table:
    """All cells of an experiment, in a folder from which they resume, on this machine or another."""

    folder: Path
    cells: list[Cell]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, budget: float | None) -> bool:
        """Run what is missing within ``budget`` seconds; return True if all cells are done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ends = None if budget is None else time.monotonic() + budget
        finished = True
        for cell in self.cells:
            left = None if ends is None else ends - time.monotonic()
            # What comes after an unfinished cell may be done all the same.
            finished = self.run_cell(cell, left) and finished
        return finished

    def run_cell(self, cell: Cell, seconds: float | None) -> bool:
        """Run what is missing of a cell, within a time; return True if it is done."""
        result = self._result(cell)
        if result is None and (seconds is None or seconds > 0):
            result = self._run(cell, seconds)
        if result is not None:
            self.done[cell.name] = result
        return result is not None

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write the cells that are done, each with its machine, versions and options."""
        write_json(
            path,
            {
                **about,
                "cells": [
                    {"row": c.row, "method": c.method, "seed": c.seed, **self.done[c.name]}
                    for c in self.cells
                    if c.name in self.done
                ],
            },
        )

    def results(self, row: str, method: str) -> list[dict[str, Any]]:
        """Return the result of each seed that is done."""
        cells = [cell for cell in self.cells if (cell.row, cell.method) == (row, method)]
        return [self.done[cell.name] for cell in cells if cell.name in self.done]

    def accuracies(self, row: str, method: str) -> list[float]:
        """Return top-1 in percent of each seed that is done."""
        return [result["top1"] for result in self.results(row, method)]

    def _result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the result of a cell, or None if it is not done.

        Raises:
            SystemExit: it was made with other arguments.
        """
        made_with = self._arguments(cell)
        report = self.folder / cell.name / "report.json"
        if made_with.exists() and json.loads(made_with.read_text(encoding="utf-8")) != list(cell.arguments):
            raise SystemExit(
                f"{self.folder / cell.name} was made with other options; use another --out, or remove it"
            )
        if not report.exists():
            return None
        content = json.loads(report.read_text(encoding="utf-8"))
        stages = {stage["stage"]: stage["seconds"] for stage in content["stages"]}
        if cell.until not in stages:
            return None
        subject = content["teacher"] if cell.until == "teacher" else content["student"]
        epochs = [epoch for epoch in content["epochs"] if epoch["stage"] == "student"]
        return {
            "arguments": list(cell.arguments),
            "train_images": content["data"]["train"],
            "environment": content["environment"],
            "top1": subject["score"]["percent"],
            "n": subject["score"]["n"],
            "details": {name: value["percent"] for name, value in subject["score"]["details"].items()},
            "low": subject["score"]["low"],
            "high": subject["score"]["high"],
            "calibration": _short(subject.get("calibration")),
            "int8": (content.get("student_int8") or {}).get("score"),
            "teacher": content["teacher"]["score"]["percent"],
            "epochs": len(epochs),
            "images_per_second": statistics.median([e["images_per_second"] for e in epochs])
            if epochs
            else None,
            "stage_seconds": stages,
            "last_epoch": {key: epochs[-1][key] for key in ("losses", "metrics")} if epochs else None,
        }

    def _arguments(self, cell: Cell) -> Path:
        """Return the file, next to the run folder, that holds the arguments of a cell."""
        return self.folder / f"{cell.name}.arguments.json"

    def _run(self, cell: Cell, seconds: float | None) -> dict[str, Any] | None:
        """Run a cell for at most ``seconds``; return its result, or None if it is not done yet.

        Raises:
            SystemExit: the command failed; its output is above.
        """
        command = [
            sys.executable, "-m", "questpress.pipeline", *cell.arguments,
            "--seed", str(cell.seed), "--until", cell.until, "--out", str(self.folder / cell.name),
        ]  # fmt: skip
        write_json(self._arguments(cell), list(cell.arguments))
        print(f"== {cell.name}", file=sys.stderr, flush=True)
        code = run_command(command, seconds)
        if code is None:
            return None
        if code != 0:
            raise SystemExit(f"{cell.name} failed with exit code {code}")
        return self._result(cell)


def _short(calibration: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return the figures without the bins: ECE and its interval in percent, entropy and NLL in nats."""
    names = ("ece", "ece_low", "ece_high", "confidence", "accuracy", "entropy", "nll")
    return None if calibration is None else {name: calibration[name] for name in names}


def run_command(
    command: Sequence[str], seconds: float | None, stop: Callable[[], bool] = lambda: False
) -> int | None:
    """Run a command without its output; return its exit code, or None if it was stopped.

    Args:
        seconds: after which it is stopped by SIGTERM.
        stop: called several times a second; stops it, too.
    """
    # A separate process group, so that the signal reaches it and not this program.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    ends = None if seconds is None else time.monotonic() + seconds
    try:
        while (ends is None or time.monotonic() < ends) and not stop():
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=POLL_SECONDS)
        return None
    finally:
        # However this program ends, the command must not outlive it.
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Resumable(Protocol):
    """An experiment that resumes from its folder; `done` holds the results to write."""

    folder: Path
    done: dict[str, dict[str, Any]]

    def run(self, budget: float | None) -> bool: ...

    def write(self, path: Path, about: Mapping[str, Any]) -> None: ...


def run_and_write(
    table: Resumable, budget: str | None, about: Mapping[str, Any], text: Callable[[], str]
) -> None:
    """Run what is missing and write ``results.json`` and ``results.md``, also after an error."""
    left = seconds(budget) if budget else None
    table.folder.mkdir(parents=True, exist_ok=True)  # where the results go, whatever happens
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    finished = False
    try:
        finished = table.run(left)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if table.done:
            table.write(table.folder / "results.json", about)
        (table.folder / "results.md").write_text(text(), encoding="utf-8")
        print(text() if finished else f"{text()}\nnot all done yet: the same command resumes")


def seconds(text: str) -> float:
    """Convert ``9m``, ``2h`` or ``45s`` to seconds."""
    try:
        return parse_time(text)
    except ValueError as error:
        raise SystemExit(f"--budget {error}, got {text}.") from None


def spoken(values: Sequence[float]) -> str:
    """Return mean ± standard deviation of the seeds, in percent."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def interval(values: Sequence[float], n: int) -> str:
    """Return the 95 % interval that ``n`` test images leave around the mean of the seeds, in percent."""
    around = Proportion.from_counts(round(n * statistics.mean(values) / 100), n)
    return f"{around.low:.1f} to {around.high:.1f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
