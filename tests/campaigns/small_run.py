"""A small run of every stage, in processes that are soon there, and what it left: for kills.py and faults.py.

A teacher trained from scratch, a vocabulary, the store of the teacher's answers, a student, its ONNX file, a
recovery under fake quantization, the search for int8, its validation, a bench and the report: on 90 little
pictures and one thread. Every run has a folder and a cache of its own.
"""

import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CONTEXT = multiprocessing.get_context("forkserver")
_STAGES = ("teacher", "prepare", "student", "export", "qat", "quantize", "validate", "bench", "report")
CONTEXT.set_forkserver_preload(
    [
        "tests.campaigns.small_run",
        *(f"questpress.pipeline.stages.{name}" for name in _STAGES),
        "questpress.pipeline.api.run",
        "questpress.pipeline.api.validation.validate",
        "torch.onnx._internal.exporter._core",
        "torch._dynamo",
        "onnxscript.function_libs.torch_lib.ops",
    ]
)

CLASSES = ("blue", "green", "red")
OPTIONS = (
    "--teacher", "cifar_resnet14", "--teacher-weights", "none", "--student", "cifar_resnet8",
    "--image-size", "16", "--batch-size", "16", "--teacher-epochs", "2", "--epochs", "3",
    "--set", "quest.words=8", "--cache-views", "2", "--calibration", "minmax", "--calibration-images", "16",
    "--qat", "--qat-epochs", "1", "--max-drop", "100", "--bench-seconds", "0.02",
)  # fmt: skip

TIMED = {
    "images_per_second", "seconds", "time_fractions", "peak_memory_bytes", "mfu", "latency_ms", "speedups",
    "bench", "p50", "p50_fp32", "speedup", "slow", "trial", "finished", "summary", "curves", "load average at start",
}  # fmt: skip
"""Fields that hold times, or follow from them."""

TOLD = {"command", "out", "computed", "warnings", "checksum"}
"""Fields that say how a run was called, what it had to do again, and what it said of that."""

PAGES = ("report.html", "report.md", "artifact/README.md", "bench/latency.npz", ".lock")
"""Files of a run that show what stands in others, with times."""


def pictures(root: Path, count: int = 30) -> Path:
    """Noisy pictures in the colours of their classes."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng([label, number]).integers(0, 120, (20, 24, 3))
            pixels[..., 2 - label] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:03d}.png")
    return root


def run_options(data: Path, out: Path, *more: str) -> tuple[str, ...]:
    """The whole run, in ``out``/run with ``out``/cache."""
    return (
        *OPTIONS, "--data", str(data), "--out", str(out / "run"), "--cache", str(out / "cache"), *more,
    )  # fmt: skip


def start(
    arguments: tuple[str, ...], told: Path, fault: Callable[..., None] | None = None, *of: Any
) -> BaseProcess:
    """``compress ARGUMENTS`` in a process of its own; what it says goes to ``told``.out and ``told``.err.

    ``fault`` is called with ``of`` before it begins: what goes wrong in that process.
    """
    process = CONTEXT.Process(target=_command, args=(arguments, str(told), fault, of))
    process.start()
    return process


def _command(arguments: tuple[str, ...], told: str, fault: Callable[..., None] | None, of: Any) -> None:
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
    from questpress.pipeline.cli.main import cli

    for number, end in ((1, "out"), (2, "err")):
        handle = os.open(f"{told}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    sys.argv = ["compress", *arguments]
    if fault is not None:
        fault(*of)
    cli(list(arguments), prog_name="compress")


def used(number: int | None) -> float:
    """Seconds of the processor that a process and its children have taken; no end of them when it is gone."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    except OSError:
        return math.inf
    if fields[0] == "Z":
        return math.inf
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(found for child in children if (found := used(int(child))) < math.inf)


def below(number: int | None) -> list[int]:
    """The processes that a process has started, and those that these have."""
    try:
        children = list(map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split()))
    except OSError:
        return []
    return [*children, *(one for child in children for one in below(child))]


def gone(numbers: list[int], seconds: float = 10) -> bool:
    """Whether all of these processes end in so many seconds."""
    end = time.monotonic() + seconds
    while any(used(number) < math.inf for number in numbers):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def stages() -> tuple[str, ...]:
    from questpress.pipeline.config.stages import list_stages

    return list_stages(1, qat=True)


def staged(data: Path, whole: Path, before: Path, chosen: Sequence[str] | None = None) -> dict[str, float]:
    """The run in one process for each stage, with a copy of folder and cache before each: seconds of the
    processor that the stages took. ``chosen``: the first of them; None: all.
    """
    seconds = {}
    for stage in chosen or stages():
        if whole.exists():
            shutil.copytree(whole, before / stage)
        else:
            (before / stage).mkdir(parents=True)
            whole.mkdir()
        process = start(run_options(data, whole, "--quiet", "--until", stage), whole.parent / "told")
        seconds[stage] = 0.0
        while (now := used(process.pid)) < math.inf:
            seconds[stage] = now
            time.sleep(0.002)
        process.join()
        if process.exitcode:
            raise SystemExit((whole.parent / "told.err").read_text())
    return seconds


def left_by(out: Path) -> dict[str, object]:
    """What a run has left, by file; of the cache whether each entry is as it was written, and its arrays."""
    found: dict[str, object] = {}
    for file in sorted((out / "run").rglob("*")):
        name = file.relative_to(out / "run").as_posix()
        if file.is_file() and name not in PAGES:
            found |= _content(name, file, out)
    return found | dict(_cached(out / "cache"))


def _content(name: str, file: Path, out: Path) -> dict[str, object]:
    if name in ("run.json", ".run.json", "report.json"):
        content = _untimed(json.loads(_anywhere(file, out)))
        if name != "report.json":
            content["stages"].get("report", {}).pop("key", None)  # follows from the bench's times
            for engine in content.get("engines", {}).values():
                engine.pop("key")  # of the stage that has used it last
        return {f"{name} {key}": value for key, value in content.items()}
    if name == "metrics.jsonl":
        return {
            f"{name} {line['stage']} {line['epoch']}": _untimed(line)
            for line in map(json.loads, file.read_text().splitlines())
        }
    return {name: file.read_bytes()}


def _anywhere(file: Path, out: Path) -> str:
    """A file's text without what depends on times and places."""
    text = file.read_text().replace(str(out), "")
    return re.sub(r'"(bench/latency\.npz|config\.yaml)": "\w{64}"', r'"\1": ""', text)


def _untimed(content: Any) -> Any:
    if isinstance(content, str) and content.startswith('{"stage":'):  # a line of a curve
        return _untimed(json.loads(content))
    if isinstance(content, dict):
        return {key: _untimed(value) for key, value in content.items() if key not in TIMED | TOLD}
    return [_untimed(one) for one in content] if isinstance(content, list) else content


def _cached(root: Path) -> Iterator[tuple[str, object]]:
    from questpress.pipeline.runs.cache import Cache

    cache = Cache(root)
    for entry in sorted(root.glob("*/*")):
        if entry.name.startswith("."):
            continue  # half-written by the killed process, and swept up after a day
        place = cache.get(entry.parent.name, entry.name)
        yield f"cache {entry.parent.name} {entry.name}", place is not None
        for file in sorted(place.glob("*.npy")) if place else []:
            yield f"cache {entry.name} {file.name}", file.read_bytes()


def differences(found: dict[str, object], expected: dict[str, object]) -> tuple[str, ...]:
    """The names of what is not as in the uninterrupted run."""
    return tuple(name for name in {**expected, **found} if expected.get(name) != found.get(name))
