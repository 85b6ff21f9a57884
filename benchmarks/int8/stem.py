"""Whether a first convolution is faster in float or in integers, in an int8 network.

    taskset -c 1 python -m benchmarks.int8.stem mobilenetv2_100 resnet18

Networks of timm with random weights at 224 px, one image at a time on one thread, in rounds that take the
files in turn. The ratio is int8's time with the first convolution in integers by that with it in float:
above 1, float is faster.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import timm
import torch
from questpress.export import runtime
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.int8.quantizer import calibrate_ranges, prepare, quantize, write_int8
from questpress.export.int8.targets import target

ROUNDS, SECONDS, SIZE = 25, 0.12, 224


def sessions(name: str, folder: Path) -> dict[str, ort.InferenceSession]:
    """fp32, and int8 with the first convolution in integers and in float."""
    torch.manual_seed(0)
    fp32 = export_onnx(timm.create_model(name), folder / "fp32.onnx", SIZE, metadata={}).path
    images = np.random.default_rng(0).standard_normal((8, 3, SIZE, SIZE), dtype=np.float32)
    prepared = prepare(fp32)
    ranges, _ = calibrate_ranges(prepared.model, [images], "minmax", prepared.scope.op_types)
    types = replace(target(runtime.detect_target()), float_stem=False)
    first = next(node.name for node in prepared.model.graph.node if node.op_type == "Conv")
    files = {"fp32": fp32}
    for way, kept in {"integers": (), "float": (first,)}.items():
        model = quantize(prepared, ranges, types, kept_float=kept)
        files[way] = write_int8(prepared, model, folder / f"{way}.onnx", {}).path
    return {way: runtime.open_session(file, 1) for way, file in files.items()}


def main() -> None:
    image = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)
    print("| network | integers, × of fp32 | float, × of fp32 | integers / float |\n|---|---|---|---|")
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            of_ways = sessions(name, Path(folder))
            times: dict[str, list[float]] = {way: [] for way in of_ways}
            for _ in range(ROUNDS):
                for way, session in of_ways.items():
                    times[way].append(measured(session, image))
        each = {way: np.array(seconds) for way, seconds in times.items()}
        ratios = [np.median(each["fp32"] / each[way]) for way in ("integers", "float")]
        between = each["integers"] / each["float"]
        low, high = np.percentile(between, [25, 75])
        print(
            f"| {name} | {ratios[0]:.2f} | {ratios[1]:.2f} | "
            f"{np.median(between):.3f} ({low:.3f} to {high:.3f}, half of the rounds) |",
            flush=True,
        )


def measured(session: ort.InferenceSession, image: np.ndarray) -> float:
    """Seconds of a run: the tenth percentile of a block, for others on the core only ever add."""
    samples, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, {"input": image})
        samples.append(time.perf_counter() - start)
    return float(np.percentile(samples, 10))


if __name__ == "__main__":
    main()
