"""What each rewriting rule brings: int8 with all rules, and without one at a time, against fp32.

    taskset -c 1 python -m benchmarks.int8.rewriting mobilenetv3_large_100 mobilenetv2_100

Networks of timm with random weights at 224 px ('NAME:relu6' with ReLU6 for its activation), one image at a
time on one thread, in rounds that take the files in turn: what else the machine does strikes all of them. The
speed-up is the median over rounds of fp32's time by the file's own, the range its 95 % bootstrap interval. A
round's time is the tenth percentile of its images': others on the same core only ever add to it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import timm
import torch
from questpress.export import runtime
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.int8.quantizer import quantize_int8
from questpress.export.int8.rewrite import RULES
from torch import nn

ROUNDS, SECONDS, SIZE = 15, 0.2, 224


def files(name: str, folder: Path) -> dict[str, Path]:
    """fp32, and int8 by what was rewritten."""
    torch.manual_seed(0)
    model, _, activation = name.partition(":")
    options = {"act_layer": nn.ReLU6} if activation == "relu6" else {}
    fp32 = export_onnx(timm.create_model(model, **options), folder / "fp32.onnx", SIZE, metadata={}).path
    images = [np.random.default_rng(0).standard_normal((8, 3, SIZE, SIZE), dtype=np.float32)]
    made = {"fp32": fp32}
    whole = quantize_int8(fp32, folder / "all.onnx", images)
    made["int8, all rules"] = whole.path
    for rule in whole.recipe["rewritten"]:
        path = folder / f"{rule}.onnx"
        made[f"without {rule}"] = quantize_int8(fp32, path, images, rules=RULES.keys() - {rule}).path
    made["no rule"] = quantize_int8(fp32, folder / "none.onnx", images, rules=[]).path
    return made


def block(session: ort.InferenceSession, images: np.ndarray) -> float:
    """Milliseconds for one image, the tenth percentile of a block."""
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        image = images[len(times) % len(images)][None]
        before = time.perf_counter()
        session.run(None, {"input": image})
        times.append(time.perf_counter() - before)
    return 1e3 * float(np.percentile(times, 10))


def speed_ups(paths: dict[str, Path]) -> None:
    rng = np.random.default_rng(1)
    images = rng.standard_normal((16, 3, SIZE, SIZE), dtype=np.float32)
    sessions = {name: runtime.open_session(path, 1) for name, path in paths.items()}
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for round_ in range(ROUNDS + 1):
        for index in rng.permutation(len(sessions)):
            name = list(sessions)[index]
            milliseconds = block(sessions[name], images)
            if round_ > 0:  # the first warms up
                taken[name].append(milliseconds)
    for name, times in taken.items():
        ratios = np.array(taken["fp32"]) / np.array(times)
        drawn = np.median(rng.choice(ratios, (2000, ROUNDS)), axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        print(
            f"  {name:36} {np.median(times):7.3f} ms  {np.median(ratios):.2f}×  {low:.2f}–{high:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for network in sys.argv[1:]:
        print(network, flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            speed_ups(files(network, Path(temporary)))
