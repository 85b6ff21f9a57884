"""A small run of every stage, and its results, for kills.py and faults.py.

90 small images, one thread, a separate run folder and cache. Processes are forked from a server that has
already imported torch.
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
        "tests.campaigns.small_run", *(f"questpress.pipeline.stages.{name}" for name in _STAGES),
        "questpress.pipeline.api.run", "questpress.pipeline.api.validate.validate",
        "torch.onnx._internal.exporter._core", "torch._dynamo", "onnxscript.function_libs.torch_lib.ops",
    ],
)  # fmt: skip

CLASSES = ("blue", "green", "red")
OPTIONS = (
    "--teacher", "cifar_resnet14", "--teacher-weights", "none", "--student", "cifar_resnet8",
    "--image-size", "16", "--batch-size", "16", "--teacher-epochs", "2", "--epochs", "3",
    "--set", "quest.words=8", "--cache-views", "2", "--calibration", "minmax", "--calibration-images", "16",
    "--qat", "--qat-epochs", "1", "--max-drop", "100", "--bench-seconds", "0.02",
)  # fmt: skip

TIMED = {
    "images_per_second", "seconds", "time_fractions", "peak_memory_bytes", "mfu", "latency_ms", "speedups",
    "bench", "p50", "p50_fp32", "speedup", "slow", "trial", "finished", "summary",
    "curves", "load average at start",
}  # fmt: skip
"""Fields with times, or computed from them."""

CALL_FIELDS = {"command", "out", "computed", "warnings", "checksum"}
"""Fields about the command, what it computed again, and its warnings."""

PAGES = ("report.html", "report.md", "artifact/README.md", "bench/latency.npz", ".lock")
"""Files that show the content of others, with times."""


def make_images(root: Path, count: int = 30) -> Path:
    """Write noisy images in the colors of their classes."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng([label, number]).integers(0, 120, (20, 24, 3))
            pixels[..., 2 - label] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:03d}.png")
    return root


def run_options(data: Path, out: Path, *more: str) -> tuple[str, ...]:
    """Return the arguments of the whole run, in ``out``/run with ``out``/cache."""
    return (
        *OPTIONS, "--data", str(data), "--out", str(out / "run"), "--cache", str(out / "cache"), *more,
    )  # fmt: skip


def start(
    arguments: tuple[str, ...], log: Path, fault: Callable[..., None] | None = None, *fault_arguments: Any
) -> BaseProcess:
    """Start ``compress ARGUMENTS`` in a separate process, with output in ``log``.out and ``log``.err.

    ``fault`` is called with ``fault_arguments`` in that process first.
    """
    process = CONTEXT.Process(target=_run_command, args=(arguments, str(log), fault, fault_arguments))
    process.start()
    return process


def save_each_step() -> None:
    """Write a checkpoint after each step."""
    import math

    from questpress.pipeline.training import loop

    loop.SAVE_SECONDS, loop.SAVE_FRACTION = 0.0, math.inf


def _run_command(
    arguments: tuple[str, ...], log: str, fault: Callable[..., None] | None, fault_arguments: Any
) -> None:
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
    from questpress.pipeline.cli.main import cli

    for number, end in ((1, "out"), (2, "err")):
        handle = os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    sys.argv = ["compress", *arguments]
    if fault is not None:
        fault(*fault_arguments)
    cli(list(arguments), prog_name="compress")


def cpu_seconds(number: int | None) -> float:
    """Return the processor seconds of a process and its children, infinity if it has ended."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    except OSError:
        return math.inf
    if fields[0] == "Z":
        return math.inf
    seconds = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return seconds + sum(results for child in children if (results := cpu_seconds(int(child))) < math.inf)


def list_descendants(number: int | None) -> list[int]:
    """Return the descendants of a process."""
    try:
        children = list(map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split()))
    except OSError:
        return []
    return [*children, *(number for child in children for number in list_descendants(child))]


def wait_for_end(numbers: list[int], seconds: float = 10) -> bool:
    """Return True if all these processes end within some seconds."""
    end = time.monotonic() + seconds
    while any(cpu_seconds(number) < math.inf for number in numbers):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def stages() -> tuple[str, ...]:
    from questpress.pipeline.config.stages import list_stages

    return list_stages(1, qat=True)


def run_stages(
    data: Path, whole: Path, before: Path, chosen: Sequence[str] | None = None
) -> dict[str, float]:
    """Do the run, or its first stages, with one process per stage; copy folder and cache before each.

    Returns:
        The processor seconds of each stage.
    """
    seconds = {}
    for stage in chosen or stages():
        if whole.exists():
            shutil.copytree(whole, before / stage)
        else:
            (before / stage).mkdir(parents=True)
            whole.mkdir()
        process = start(run_options(data, whole, "--quiet", "--until", stage), whole.parent / "log")
        seconds[stage] = 0.0
        while (now := cpu_seconds(process.pid)) < math.inf:
            seconds[stage] = now
            time.sleep(0.002)
        process.join()
        if process.exitcode:
            raise SystemExit((whole.parent / "log.err").read_text())
    return seconds


def read_results(out: Path) -> dict[str, object]:
    """Return the results of a run by file, the arrays of the cache and whether its entries are intact."""
    results: dict[str, object] = {}
    for file in sorted((out / "run").rglob("*")):
        name = file.relative_to(out / "run").as_posix()
        if file.is_file() and name not in PAGES:
            results |= _read_content(name, file, out)
    return results | dict(_read_cache(out / "cache"))


def _read_content(name: str, file: Path, out: Path) -> dict[str, object]:
    if name in ("run.json", ".run.json", "report.json"):
        content = _drop_times(json.loads(_drop_paths(file, out)))
        if name != "report.json":
            content["stages"].get("report", {}).pop("key", None)  # depends on the bench's times
            for engine in content.get("engines", {}).values():
                engine.pop("key")  # that of the last stage that used it
        return {f"{name} {key}": value for key, value in content.items()}
    if name == "metrics.jsonl":
        return {
            f"{name} {line['stage']} {line['epoch']}": _drop_times(line)
            for line in map(json.loads, file.read_text().splitlines())
        }
    return {name: file.read_bytes()}


def _drop_paths(file: Path, out: Path) -> str:
    """Return a file's text without hashes and paths that vary."""
    text = file.read_text().replace(str(out), "")
    return re.sub(r'"(bench/latency\.npz|config\.yaml)": "\w{64}"', r'"\1": ""', text)


def _drop_times(content: Any) -> Any:
    if isinstance(content, str) and content.startswith('{"stage":'):  # a line of a curve
        return _drop_times(json.loads(content))
    if isinstance(content, dict):
        return {key: _drop_times(value) for key, value in content.items() if key not in TIMED | CALL_FIELDS}
    return [_drop_times(value) for value in content] if isinstance(content, list) else content


def _read_cache(root: Path) -> Iterator[tuple[str, object]]:
    from questpress.pipeline.runs.cache import Cache

    cache = Cache(root)
    for entry in sorted(root.glob("*/*")):
        if entry.name.startswith("."):
            continue  # a partial entry of the killed process, removed after a day
        place = cache.get(entry.parent.name, entry.name)
        yield f"cache {entry.parent.name} {entry.name}", place is not None
        for file in sorted(place.glob("*.npy")) if place else []:
            yield f"cache {entry.name} {file.name}", file.read_bytes()


def find_differences(results: dict[str, object], expected: dict[str, object]) -> tuple[str, ...]:
    """Return the names of results that differ."""
    return tuple(name for name in {**expected, **results} if expected.get(name) != results.get(name))
