"""Throughput of a job's phases next to another program that keeps one of the cores busy.

    python -m benchmarks.training.neighbor

Each phase is timed on all cores, on all cores next to a busy loop that is pinned to the last of them, and on
the other cores alone next to that loop, which is the best that fewer threads could reach. The three follow
each other in each round. The table has medians over the rounds, in images/s (k-means: features/s), and in
percent of the first. Images and weights are random. Training does not adapt its threads here.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.int8 import correction, fake_quantize, quantizer, targets
from questpress.export.runtime import detect_target, open_session
from questpress.models.build import build, geometry
from questpress.pipeline.data.decode import Canonical, decode_images
from questpress.pipeline.data.render import Normalize
from questpress.pipeline.evaluation.predictions import compute_logits
from questpress.pipeline.methods.quest.vocabulary import FeatureMatrix
from questpress.pipeline.runs.device import Engine, choose_engine, fix_threads
from questpress.pipeline.runs.process import keep_freed_memory

from benchmarks.cells import markdown
from benchmarks.training import pictures, precision, vocabulary

NETWORK, SIZE, BATCH = "mobilenetv2_100", 64, 64
MAPS, CHANNELS, WORDS = 8, 64, 256

Phase = tuple[int, Callable[[], Any]]
"""Number of images of some of a phase's work, and the work."""


def build_phases(folder: Path, threads: int) -> Mapping[str, Phase]:
    """Return the phases by name for a number of threads; ``folder`` holds files that they share."""
    network = build(NETWORK, num_classes=10, image_size=SIZE, seed=0).eval()
    form = geometry(NETWORK, SIZE)
    normalize = Normalize(form.mean, form.std)
    pixels = torch.randint(0, 256, (BATCH, SIZE, SIZE, 3), dtype=torch.uint8)
    images = np.random.default_rng(0).standard_normal((BATCH, 3, SIZE, SIZE), np.float32)
    photos, canonical = pictures.made_up(BATCH, 10, None).train, Canonical("short_side", SIZE)
    count = MAPS * vocabulary.BATCH * vocabulary.SIDE**2
    features = FeatureMatrix(count, CHANNELS, None)
    features.fill(vocabulary.maps(count, CHANNELS), (vocabulary.SIDE, vocabulary.SIDE), count)
    if not (folder / "fp32.onnx").exists():
        export_onnx(network, folder / "fp32.onnx", SIZE, metadata={})
    prepared = quantizer.prepare(folder / "fp32.onnx")
    types, operators = targets.find_target(detect_target()), prepared.scope.op_types
    ranges, _ = quantizer.calibrate_ranges(prepared.model, [images], "minmax", operators)
    quantized = quantizer.quantize(prepared, ranges, types)
    int8 = quantizer.write_int8(prepared, quantized, folder / "int8.onnx", {}).path
    rounded = fake_quantize.FakeQuantized(prepared, quantized, types).eval()
    fp32_session, int8_session = (open_session(file, threads) for file in (folder / "fp32.onnx", int8))
    phases: dict[str, Phase] = {}
    for name, size, batch in (("cifar_resnet20", 32, 128), (NETWORK, SIZE, BATCH)):
        engine = choose_engine("cpu", "auto", build(name, num_classes=10, image_size=size))
        phases[f"training {name}, {size} px"] = batch, precision.training(name, size, batch, engine)
    engine = Engine("cpu", threads, "fp32")
    return phases | {
        "evaluation in torch": (BATCH, lambda: compute_logits(network, normalize, pixels, engine)),
        "evaluation of the fp32 file": (BATCH, lambda: fp32_session.run(None, {"input": images})),
        "evaluation of the int8 file": (BATCH, lambda: int8_session.run(None, {"input": images})),
        "decoding": (BATCH, lambda: decode_images(photos, canonical)),
        "k-means": (count, lambda: features.kmeans(WORDS, 2, 0)),
        "int8 calibration": (
            BATCH,
            lambda: quantizer.calibrate_ranges(prepared.model, [images], "minmax", operators),
        ),
        "int8 search, bias correction": (
            BATCH,
            lambda: correction.correct_biases(prepared, rounded, images),
        ),
    }


@contextmanager
def busy_loop(core: int) -> Iterator[None]:
    """Keep a core busy during the block."""
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    command = [sys.executable, "-c", code]
    # In a new session, as Linux shares the processor among sessions.
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it has started
            yield
        finally:
            process.kill()


@contextmanager
def use_cores(cores: set[int]) -> Iterator[None]:
    """Run this thread, and those that it starts, on some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(phase: Phase, seconds: float) -> float:
    """Return images/s."""
    images, work = phase
    started, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - started < seconds:
        work()
        done += images
    return done / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--phases", default="", help="those whose names contain this")
    options = parser.parse_args()
    keep_freed_memory()
    every = sorted(os.sched_getaffinity(0))
    if len(every) < 2:
        parser.error("at least two cores are required")
    free, last = set(every[:-1]), every[-1]
    heads = "phase", "all cores", f"all, core {last} busy", "%", "the others alone", "%"
    with tempfile.TemporaryDirectory() as folder:
        settings = [(set(every), False), (set(every), True), (free, True)]
        counts = [len(cores) for cores, _ in settings]
        phases = {}
        for count in set(counts):
            with fix_threads(count):
                phases[count] = build_phases(Path(folder), count)
        print("ready", file=sys.stderr, flush=True)
        rows = []
        for name in phases[counts[0]]:
            if options.phases not in name:
                continue
            rates: list[list[float]] = [[] for _ in settings]
            for _ in range(options.rounds):
                for (cores, is_busy), measured in zip(settings, rates, strict=True):
                    load = busy_loop(last) if is_busy else nullcontext()
                    with load, use_cores(cores), fix_threads(len(cores)):
                        measured.append(measure(phases[len(cores)][name], options.seconds))
            alone, shared, fewer = map(median, rates)
            rows.append([name, f"{alone:,.0f}", f"{shared:,.0f}", f"{100 * shared / alone:.0f}",
                         f"{fewer:,.0f}", f"{100 * fewer / alone:.0f}"])  # fmt: skip
            print(*rows[-1], file=sys.stderr, flush=True)
    print(markdown(heads, rows))


if __name__ == "__main__":
    main()
