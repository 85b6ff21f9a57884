"""Latency by input: a network in ONNX Runtime fed with normalized floats, with floats that numpy normalizes,
with pixels and the normalization folded, and with pixels and the normalization before it in float.

    taskset -c 1 python -m benchmarks.latency.pixel_input --network mobilenetv2_100
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from questpress.export.conversion import pixel_input
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.conversion.pixel_input import Outside
from questpress.export.runtime import Preprocessing, normalize, open_session

from benchmarks.cells import markdown
from tests.support.networks import quantize_int8

SIDE, IMAGES = 224, 16
P = Preprocessing.create(SIDE)


def files(network: torch.nn.Module, pixels: np.ndarray, folder: Path) -> dict[str, dict[str, Path]]:
    """Return, by precision, files for floats, folded pixels, and pixels normalized before the network."""
    fp32 = {name: folder / f"{name}.onnx" for name in ("floats", "folded", "before")}
    export_onnx(network, fp32["floats"], SIDE, metadata={})
    export_onnx(network, fp32["folded"], SIDE, metadata={}, pixels=P)
    model = onnx.load(str(fp32["floats"]))
    fold, pixel_input.fold_normalization = pixel_input.fold_normalization, lambda *_: None
    assert isinstance(pixel_input.take_pixels(model, P.mean, P.std), Outside)
    pixel_input.fold_normalization = fold
    onnx.save(model, str(fp32["before"]))
    int8 = {name: folder / f"{name}.int8.onnx" for name in fp32}
    for name, file in fp32.items():
        shown = normalize(pixels, P) if name == "floats" else pixels
        quantize_int8(file, int8[name], [shown])
    return {"fp32": fp32, "int8": int8}


def subjects(made: dict[str, Path], pixels: np.ndarray) -> dict[str, Callable[[int], object]]:
    floats, folded, before = (open_session(made[name], 1) for name in ("floats", "folded", "before"))
    ready = normalize(pixels, P)
    return {
        "floats, normalized beforehand": lambda i: floats.run(None, {"input": ready[i : i + 1]}),
        "floats, normalized by numpy": lambda i: floats.run(None, {"input": normalize(pixels[i : i + 1], P)}),
        "pixels, folded": lambda i: folded.run(None, {"input": pixels[i : i + 1]}),
        "pixels, in float before the network": lambda i: before.run(None, {"input": pixels[i : i + 1]}),
    }


def medians(
    subjects: dict[str, Callable[[int], object]], rounds: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return ms [rounds], the median over the images; each round has all subjects in random order."""
    rng = np.random.default_rng(seed)
    measured: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds + 1):
        for name in rng.permutation(list(subjects)):
            times = []
            for i in range(IMAGES):
                start = time.perf_counter()
                subjects[name](i)
                times.append(1000 * (time.perf_counter() - start))
            measured[name].append(float(np.median(times)))
    return {name: np.array(times[1:]) for name, times in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="mobilenetv2_100", help="timm's name [default: mobilenetv2_100]")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = timm.create_model(options.network).eval()
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal(120, 60, (IMAGES, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision, made in files(network, pixels, Path(folder)).items():
            times = medians(subjects(made, pixels), options.rounds)
            base, *_ = times.values()
            for name, milliseconds in times.items():
                low, middle, high = np.percentile(milliseconds / base, (25, 50, 75))
                shown = f"{middle:.3f} ({low:.3f} to {high:.3f})"
                rows.append([precision, name, f"{np.median(milliseconds):.2f}", shown])
    columns = [options.network, "takes", "ms", "by the first row (quartiles over rounds)"]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
