"""Speed-up of each rewriting rule, and of a first convolution that stays in float, in int8 networks.

    taskset -c 1 python -m benchmarks.int8.rewriting mobilenetv3_large_100 mobilenetv2_100
    taskset -c 1 python -m benchmarks.int8.rewriting --stem mobilenetv2_100 resnet18

Networks of timm with random weights at 224 px ('NAME:relu6' with ReLU6 as its activation), one image at a
time on one thread. Rounds interleave the files, so that other load affects all of them. The speed-up is the
median over rounds of fp32's time divided by the file's, with a bootstrap 95 % interval; with --stem,
"integers" is the file whose first convolution runs in integers. A round's time is the tenth percentile of
its images', since other processes on the core only add to it.
"""

import argparse
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
from questpress.export.conversion.rewrite import RULES
from questpress.export.int8.quantizer import calibrate_ranges, prepare, quantize, write_int8
from questpress.export.int8.targets import find_target
from torch import nn

from tests.support.networks import quantize_int8

ROUNDS, SECONDS, SIZE = 15, 0.2, 224
IMAGES = np.random.default_rng(0).standard_normal((8, 3, SIZE, SIZE), dtype=np.float32)


def export_network(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model, _, activation = name.partition(":")
    options = {"act_layer": nn.ReLU6} if activation == "relu6" else {}
    return export_onnx(timm.create_model(model, **options), folder / "fp32.onnx", SIZE, metadata={}).path


def quantize_by_rules(fp32: Path, folder: Path) -> dict[str, Path]:
    """Return int8 files with all rules, without each that changed the graph, and with none."""
    whole = quantize_int8(fp32, folder / "all.onnx", [IMAGES])
    made = {"int8, all rules": whole.path}
    for rule in whole.recipe["rewritten"]:
        rest = RULES.keys() - {rule}
        made[f"without {rule}"] = quantize_int8(fp32, folder / f"{rule}.onnx", [IMAGES], rules=rest).path
    made["no rule"] = quantize_int8(fp32, folder / "none.onnx", [IMAGES], rules=[]).path
    return made


def quantize_by_stem(fp32: Path, folder: Path) -> dict[str, Path]:
    """Return int8 files with the first convolution in integers and in float."""
    prepared = prepare(fp32)
    ranges, _ = calibrate_ranges(prepared.model, [IMAGES], "minmax", prepared.scope.op_types)
    types = replace(find_target(runtime.detect_target()), float_stem=False)
    first = next(node.name for node in prepared.model.graph.node if node.op_type == "Conv")
    made = {}
    for name, kept in {"integers": (), "float": (first,)}.items():
        model = quantize(prepared, ranges, types, kept_float=kept)
        made[name] = write_int8(prepared, model, folder / f"{name}.onnx", {}).path
    return made


def measure_block(session: ort.InferenceSession, images: np.ndarray) -> float:
    """Return the tenth percentile of a block's times of one image, in milliseconds."""
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        image = images[len(times) % len(images)][None]
        before = time.perf_counter()
        session.run(None, {"input": image})
        times.append(time.perf_counter() - before)
    return 1e3 * float(np.percentile(times, 10))


def print_speedups(paths: dict[str, Path]) -> None:
    rng = np.random.default_rng(1)
    images = rng.standard_normal((16, 3, SIZE, SIZE), dtype=np.float32)
    sessions = {name: runtime.open_session(path, 1) for name, path in paths.items()}
    measured: dict[str, list[float]] = {name: [] for name in sessions}
    for round_ in range(ROUNDS + 1):
        for index in rng.permutation(len(sessions)):
            name = list(sessions)[index]
            milliseconds = measure_block(sessions[name], images)
            if round_ > 0:  # the first warms up
                measured[name].append(milliseconds)
    for name, times in measured.items():
        ratios = np.array(measured["fp32"]) / np.array(times)
        low, high = np.percentile(np.median(rng.choice(ratios, (2000, ROUNDS)), axis=1), [2.5, 97.5])
        print(f"  {name:36} {np.median(times):7.3f} ms  {np.median(ratios):.2f}×  {low:.2f}–{high:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--stem", action="store_true", help="compare the first convolution only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for network in arguments.networks:
        print(network, flush=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fp32 = export_network(network, folder)
            make = quantize_by_stem if arguments.stem else quantize_by_rules
            print_speedups({"fp32": fp32, **make(fp32, folder)})


if __name__ == "__main__":
    main()
