"""Time the model files of an artifact on a device: `predict.py --bench`.

A short form of `compress bench` in one process: files take turns in blocks, in random order, after a warm-up.
Intervals are order statistics, 95 %, with blocks as clusters.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import PIL
from PIL import Image

from ..runtime import (
    CPU,
    ArtifactError,
    Detector,
    Preprocessing,
    default_threads,
    open_content,
    read_manifest,
    read_verified,
    runnable_targets,
)
from ..runtime.processor import bench_file_name
from .machine import describe_device
from .self_test import render_images

BENCH_VERSION = 1
SECONDS = 5.0
"""Default of `--seconds`, for each file and thread count."""
END_TO_END = 0.3
"""Time from an image file to a prediction, as a fraction of `SECONDS`."""
BLOCK_SECONDS = 0.1
MIN_BLOCKS = 5
MIN_SAMPLES = {"p50": 11, "p90": 64, "p95": 130, "p99": 662, "p99_9": 6636}
"""A percentile of fewer samples is not reported. From these numbers on, the probability that at most one
sample is above the percentile is below 1 % (the rule of MLPerf's load generator).
"""
QUANTILES = {"p50": 0.5, "p90": 0.9}
WARM_UP_WINDOWS = 10
SETTLED = 0.02
LOADS = 3
NORMAL_QUANTILE = 1.96
MAX_WAITING = 0.05
"""Fraction of the time that one thread may wait for a core."""
MAX_DRIFT = 0.03
"""Change of the median from the first to the last third of the blocks."""
MAX_IMAGES = 64
PHOTOS, PHOTO_SIZE = 8, (1024, 768)


def synthesize_photos(seed: int, count: int = PHOTOS) -> list[bytes]:
    """Return JPEG images of quality 90 that take about as long to decode as photos, the same for a seed.

    They are a sum of noise at several scales, each half as coarse as the one before and .6 times as strong.
    """
    (width, height), photos = PHOTO_SIZE, []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        image, strength = np.zeros((height, width, 3)), 1.0
        for scale in (256, 128, 64, 32, 16, 8, 4, 2):
            coarse = rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), dtype=np.uint8)
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            image += strength * (np.asarray(smooth, dtype=np.float64) - 128)
            strength *= 0.6
        file = BytesIO()
        Image.fromarray((128 + image).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    return photos


def describe_photos(count: int) -> str:
    width, height = PHOTO_SIZE
    return f"{count} synthetic photos, JPEG, {width} × {height} pixels"


def compute_drift(medians: np.ndarray) -> float:
    """Return by how much the last third of the rounds is slower than the first, relative.

    0 if the difference is not significant.
    """
    third = len(medians) // 3
    if third < 2:
        return 0.0
    logs = np.log(medians)
    first, last = logs[:third], logs[-third:]
    change = float(np.median(last) - np.median(first))
    # Standard error of the difference of two medians of independent rounds.
    error = 1.2533 * float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / third))
    return float(np.expm1(change)) if abs(change) > 3 * error else 0.0


def compute_intervals(blocks: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Return `QUANTILES` of the times in all blocks with enough samples: value, low and high of each."""
    count = sum(map(len, blocks))
    return {name: _interval(blocks, p) for name, p in QUANTILES.items() if count >= MIN_SAMPLES[name]}


def _interval(blocks: Sequence[np.ndarray], p: float) -> dict[str, float]:
    """Return the quantile `p` and the order statistics that enclose it with 95 % confidence.

    The variance of the number of samples above it is that between blocks, at least that of independent ones.
    """
    ordered = np.sort(np.concatenate(blocks))
    value, n, count = float(np.quantile(ordered, p)), len(ordered), max(2, len(blocks))
    above = np.array([np.count_nonzero(block > value) for block in blocks])
    sizes = np.array([len(block) for block in blocks])
    variance = float(np.sum((above - sizes * above.sum() / n) ** 2)) * count / (count - 1)
    student = NORMAL_QUANTILE + (NORMAL_QUANTILE**3 + NORMAL_QUANTILE) / (4 * (count - 1))  # approximate
    half = student * math.sqrt(max(variance, n * p * (1 - p)))
    low, high = max(0, math.floor(n * p - half)), min(n - 1, math.ceil(n * p + half))
    return {"value": value, "low": float(ordered[low]), "high": float(ordered[high])}


@dataclass
class Timing:
    """Times of repeated calls of a function, which takes one of the inputs in turn."""

    call: Callable[[Any], object]
    inputs: Sequence[Any]
    blocks: list[np.ndarray] = field(default_factory=list)
    """Milliseconds of each call, [runs] for each block."""
    processor_seconds: float = 0.0
    """Processor time of all threads in the blocks."""

    def __post_init__(self) -> None:
        self._next = cycle(self.inputs)

    def time_block(self, seconds: float) -> np.ndarray:
        """Call for at least `seconds` and once; return milliseconds [runs]."""
        times: list[float] = []
        clock = time.perf_counter
        end = clock() + seconds
        while not times or clock() < end:
            item = next(self._next)
            start = clock()
            self.call(item)
            times.append(1000 * (clock() - start))
        return np.array(times)

    def warm_up(self, seconds: float) -> None:
        """Run windows until two medians agree within `SETTLED`."""
        last = 0.0
        for _ in range(WARM_UP_WINDOWS):
            median = float(np.median(self.time_block(seconds)))
            if abs(median - last) <= SETTLED * last:
                return
            last = median

    def add_block(self, seconds: float) -> None:
        before = time.process_time()
        self.blocks.append(self.time_block(seconds))
        self.processor_seconds += time.process_time() - before

    @property
    def seconds(self) -> float:
        return sum(float(block.sum()) for block in self.blocks) / 1000

    @property
    def count(self) -> int:
        return sum(map(len, self.blocks))


def time_together(timings: Sequence[Timing], seconds: float) -> None:
    """Time all for `seconds` each, in blocks and random order."""
    rng = np.random.default_rng(0)
    block = min(BLOCK_SECONDS, seconds / MIN_BLOCKS)
    for timing in timings:
        timing.warm_up(block)
    gc.collect()
    gc.disable()  # a collection would make one run slow
    try:
        while any(
            t.seconds < seconds or len(t.blocks) < MIN_BLOCKS or t.count < MIN_SAMPLES["p50"] for t in timings
        ):
            for index in rng.permutation(len(timings)):
                timings[index].add_block(block)
    finally:
        gc.enable()


def run_bench(
    path: Path,
    *,
    file: str | None = None,
    threads: int | None = None,
    provider: str = CPU,
    images: Sequence[Path] = (),
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Time the files of an artifact folder that this processor runs, or one `file`; return `bench.*.json`.

    At one thread and at `default_threads`, or at `threads` alone. `images` are by default synthetic photos.
    Raises ArtifactError, and ImageError if an image cannot be read.
    """
    folder, manifest = read_manifest(path)
    files, targets = manifest["files"], runnable_targets()
    entries = [f for f in files if (f["target"] in targets if file is None else f["name"] == file)]
    if not entries:
        names = ", ".join(entry["name"] for entry in files) or "no files"
        raise ArtifactError(f"{folder} contains no {file or 'file for this processor'}, it has {names}")
    photos: Sequence[Path | bytes] = images[:MAX_IMAGES] or synthesize_photos(0, PHOTOS)
    pixels = render_images(photos, Preprocessing.from_dict(manifest["preprocessing"]))
    contents = {entry["name"]: read_verified(folder, entry) for entry in entries}
    results: list[dict[str, Any]] = []
    flags: list[dict[str, Any]] = []
    for count in sorted({1, default_threads()}) if threads is None else [threads]:
        print(f"Timing {plural(len(entries), 'file')}, {plural(count, 'thread')}", file=sys.stderr)
        loads, runs, ends = [], [], []
        for name, content in contents.items():
            milliseconds = []
            for _ in range(LOADS):
                start = time.perf_counter()
                model = open_content(content, name, threads=count, manifest=manifest, providers=provider)
                model.infer(model.to_input(pixels[:1]))
                milliseconds.append(1000 * (time.perf_counter() - start))
            loads.append(float(np.median(milliseconds)))
            runs.append(Timing(model.run, [model.to_input(image[None]) for image in pixels]))
            ends.append(Timing(model.detect if isinstance(model, Detector) else model.predict, photos))
        time_together(runs, seconds)
        time_together(ends, END_TO_END * seconds)
        for entry, load, run, end in zip(entries, loads, runs, ends):
            results.append(
                {
                    **{key: entry[key] for key in ("name", "sha256", "bytes", "precision", "target")},
                    "threads": count,
                    "n": run.count,
                    "latency_ms": compute_intervals(run.blocks),
                    "processor_ms": 1000 * run.processor_seconds / run.count,
                    "load_ms": load,
                    "end_to_end_ms": compute_intervals(end.blocks),
                }
            )
            flags += _find_flags(entry["name"], count, run)
    return {
        "bench_version": BENCH_VERSION,
        "device": describe_device(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "onnxruntime": ort.__version__,
        },
        "provider": provider,
        "seconds": seconds,
        "images": f"{len(photos)} image files" if images else describe_photos(PHOTOS),
        "results": results,
        "flags": flags,
    }


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


def _find_flags(name: str, threads: int, timing: Timing) -> list[dict[str, Any]]:
    """Return the disturbances of a timing: name, file, threads and a sentence of each."""
    waited = 1 - timing.processor_seconds / timing.seconds
    drift = compute_drift(np.array([np.median(block) for block in timing.blocks]))
    sentences = {}
    if threads == 1 and waited > MAX_WAITING:
        sentences["neighbor"] = (
            f"{name} waited {waited:.0%} of the time, as other processes used the cores: compare processor "
            "ms."
        )
    if abs(drift) > MAX_DRIFT:
        change = "slower" if drift > 0 else "faster"
        sentences["drift"] = f"{name} became {abs(drift):.0%} {change}: the clock speed or the load changed."
    return [
        {"name": flag, "file": name, "threads": threads, "sentence": sentence}
        for flag, sentence in sentences.items()
    ]


def format_bench(bench: Mapping[str, Any]) -> str:
    """Return the device, a table of the results, and the flags."""
    device, versions = bench["device"], bench["versions"]
    memory = f", {device['memory_bytes'] / 1e9:.1f} GB" if device["memory_bytes"] else ""
    lines = [
        f"{device['processor']}, {device['machine']}, {plural(device['cores'], 'core')}{memory}, "
        f"{device['system']}",
        f"onnxruntime {versions['onnxruntime']}, {bench['provider']}; from {bench['images']}",
        "",
    ]
    columns = ("file", "threads", "p50 ms (95 %)", "p90 ms", "processor ms", "load ms", "from file, p50 ms")
    rows = [columns]
    for result in bench["results"]:
        latency, end_to_end = result["latency_ms"], result["end_to_end_ms"]
        rows.append(
            (
                result["name"],
                str(result["threads"]),
                _format_interval(latency.get("p50")),
                f"{latency['p90']['value']:.3g}" if "p90" in latency else "–",
                f"{result['processor_ms']:.3g}",
                f"{result['load_ms']:.3g}",
                _format_interval(end_to_end.get("p50")),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [f"{flag['sentence']} ({plural(flag['threads'], 'thread')})" for flag in bench["flags"]]
    return "\n".join(lines)


def _format_interval(percentile: Mapping[str, float] | None) -> str:
    if percentile is None:
        return "–"
    return "{value:.3g} ({low:.3g} to {high:.3g})".format(**percentile)


def write_bench(bench: Mapping[str, Any], folder: Path) -> Path:
    """Write `bench.DEVICE.json`. Raises ArtifactError if that is impossible."""
    path = folder / bench_file_name(bench["device"]["processor"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(bench, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}. Choose another --out") from error
    return path
