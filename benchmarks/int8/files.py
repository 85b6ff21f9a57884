"""The files that ``compare.py`` times: fp32, our int8 of it, and other tools' int8 as their users get it.

    python -m benchmarks.int8.files nncf FP32.onnx CALIBRATION.npy INPUTS.npy OUT.onnx

Each file is made by a process of its own, from the same fp32 file and the same images (float32 [n, 3, S, S],
preprocessed). On its standard output it says, as JSON, the signal to noise of its logits against those of
fp32 on the inputs: a fast file that computes something else is none.

What the tools do, each by its defaults (read in the versions named):

- onnxruntime 1.31: ``quant_pre_process`` (shape inference and the basic and extended graph optimisations, as
  its documentation asks), then ``quantize_static``: QDQ, int8 activations, int8 weights with one scale a
  tensor, MinMax.
- ultralytics 8.4.190: onnxslim, then ``quantize_static`` by the same defaults, without the pre-processing,
  but only Conv, Gemm and MatMul; the rest stays float.
- nncf 3.4: ``nncf.quantize`` of the ONNX model: performance preset, any device, fast bias correction.
- openvino 2026.4: the same call on the model as OpenVINO converts it, run in OpenVINO. Where a processor has
  AMX, OpenVINO multiplies by it and ONNX Runtime's convolutions do not; so it is timed without it, too.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from questpress.export.int8.rewrite import RULES
from questpress.export.runtime import open_session


@dataclass(frozen=True)
class Kind:
    """A subject of the benchmark: how its file is made, from what, and in which runtime it is timed."""

    title: str
    packages: tuple[str, ...]
    """That decide the file's bytes; those of other tools aren't dependencies of ours."""

    make: Callable[[Path, np.ndarray, Path], None] | None
    """From the fp32 file and the calibration images; None for fp32 itself, and where the file is ours."""

    file_of: str | None = None
    """The kind whose file it is, where it has none of its own."""

    sources: str = ""
    """The files of our export whose code decides the bytes."""

    suffix: str = ".onnx"
    openvino: str | None = None
    """Which of oneDNN's instructions OpenVINO may use, where it runs there and not in ONNX Runtime."""


def ours(fp32: Path, images: np.ndarray, out: Path, without: str | None = None) -> None:
    from questpress.export.int8.quantizer import quantize_int8

    if without is not None:
        del RULES[without]  # in this process, which makes one file
    quantize_int8(fp32, out, list(np.array_split(images, max(1, len(images) // 8))))


def onnxruntime_defaults(fp32: Path, images: np.ndarray, out: Path) -> None:
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(fp32, prepared)
    quantize_static(prepared, out, _reader(fp32, images))
    prepared.unlink()


def ultralytics(fp32: Path, images: np.ndarray, out: Path) -> None:
    import onnx
    import onnxslim
    from onnxruntime.quantization import quantize_static

    model = onnxslim.slim(onnx.load(fp32))
    float_nodes = [n.name for n in model.graph.node if n.op_type not in ("Conv", "Gemm", "MatMul")]
    quantize_static(model, out, _reader(fp32, images), nodes_to_exclude=float_nodes)


def nncf(fp32: Path, images: np.ndarray, out: Path) -> None:
    import onnx
    from nncf import Dataset, quantize

    model = onnx.load(fp32)
    name = model.graph.input[0].name
    calibration = Dataset(images, lambda image: {name: image[None]})
    onnx.save(quantize(model, calibration, subset_size=len(images)), out)


def openvino(fp32: Path, images: np.ndarray, out: Path) -> None:
    import openvino as ov
    from nncf import Dataset, quantize

    # OpenVINO is at its best with a fixed shape; the .onnx files keep their dynamic batch.
    model = ov.convert_model(fp32, input=[(1, *images.shape[1:])])
    calibration = Dataset(images, lambda image: image[None])
    ov.save_model(quantize(model, calibration, subset_size=len(images)), out)


KINDS = {
    "fp32": Kind("fp32", ("torch", "timm", "onnx", "onnxscript"), None, sources="onnx_export.py"),
    "ours": Kind("ours", ("onnxruntime", "onnx"), ours, sources="**/*.py"),
    "onnxruntime": Kind("ONNX Runtime's defaults", ("onnxruntime", "onnx"), onnxruntime_defaults),
    "ultralytics": Kind("Ultralytics' recipe", ("onnxslim", "onnxruntime", "onnx"), ultralytics),
    "nncf": Kind("NNCF", ("nncf", "onnx"), nncf),
    "openvino": Kind("OpenVINO", ("nncf", "openvino"), openvino, suffix=".xml", openvino="ALL"),
    "openvino-vnni": Kind(
        "OpenVINO without AMX",
        ("nncf", "openvino"),
        None,
        file_of="openvino",
        openvino="AVX512_CORE_VNNI",
    ),
    "ours-in-openvino": Kind("ours in OpenVINO", ("openvino",), None, file_of="ours", openvino="ALL"),
}
PEERS = tuple(name for name in KINDS if name not in ("fp32", "ours"))

WITHOUT = {
    f"without-{rule}": replace(
        KINDS["ours"], title=f"without {rule}", make=functools.partial(ours, without=rule)
    )
    for rule in RULES
}
"""Our file with one rule of rewriting left out."""

KINDS |= WITHOUT


def missing(kinds: Sequence[str]) -> str | None:
    """One sentence, where packages aren't installed that these need."""
    needed = dict.fromkeys(package for kind in kinds for package in KINDS[kind].packages)
    absent = [package for package in needed if importlib.util.find_spec(package) is None]
    if not absent:
        return None
    affected = [kind for kind in kinds if set(KINDS[kind].packages) & set(absent)]
    rest = [kind for kind in kinds if kind in PEERS and kind not in affected]
    return (
        f"{', '.join(affected)} cannot be timed without {', '.join(absent)}: pip install {' '.join(absent)}, "
        f"or leave out what needs it with --peers {','.join(rest) or 'none'}"
    )


def versions(kinds: Sequence[str]) -> dict[str, str]:
    """Of every package that decides these files' bytes or runs them."""
    names = {package for kind in kinds for package in KINDS[kind].packages}
    return {name: version(name) for name in sorted(names | {"onnxruntime", "numpy"})}


def write_fp32(name: str, images: np.ndarray, out: Path, seed: int) -> None:
    """A timm network with random weights, its batch norms those of a trained one in kind.

    timm starts some of them at γ = 0, which would leave whole branches of nothing but zeros to quantize.
    """
    import torch
    from questpress.export.conversion.onnx_export import export_onnx
    from questpress.models.build import build

    size = images.shape[-1]
    network = build(name, num_classes=1000, image_size=size, seed=seed)
    random = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.weight.data.uniform_(0.5, 1.5, generator=random)
            layer.bias.data.normal_(0.0, 0.2, generator=random)
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over all batches
    network.train()
    torch.set_num_threads(1)  # the last bits of the statistics don't depend on how many cores there are
    with torch.no_grad():
        for batch in torch.from_numpy(images).split(16):
            network(batch)
    export_onnx(network.eval(), out, size, metadata={})


def logits(kind: str, path: Path, images: np.ndarray) -> np.ndarray:
    """Float32 [n, classes], one image at a time, in the runtime that the file is timed in."""
    if KINDS[kind].openvino:
        from questpress.export.latency.worker import load_openvino

        run = load_openvino(str(path), 1, (1, *images.shape[1:]))
        return np.concatenate([run(images[i : i + 1]) for i in range(len(images))])
    opened = open_session(path, 1)
    name = opened.get_inputs()[0].name
    return np.concatenate([opened.run(None, {name: images[i : i + 1]})[0] for i in range(len(images))])


def signal_to_noise(expected: np.ndarray, found: np.ndarray) -> float:
    """Of logits [n, classes], in dB: the variance of `expected` over the mean squared difference."""
    noise = float(np.mean((found - expected) ** 2))
    return math.inf if noise == 0 else 10 * math.log10(float(np.var(expected)) / noise)


def _reader(fp32: Path, images: np.ndarray) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    name = open_session(fp32, 1).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {name: image[None]}

    return Reader()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=[name for name, kind in KINDS.items() if kind.file_of is None])
    for name in ("fp32", "calibration", "inputs", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--network", help="to make fp32 of")
    parser.add_argument("--seed", type=int, default=0, help="of its weights")
    o = parser.parse_args()
    images, unseen = np.load(o.calibration), np.load(o.inputs)
    # What the tools print goes beside the answer, not into it.
    with contextlib.redirect_stdout(sys.stderr):
        make = KINDS[o.kind].make
        if make is None:
            write_fp32(o.network, images, o.out, o.seed)
        else:
            make(o.fp32, images, o.out)
        noise = signal_to_noise(logits("fp32", o.fp32, unseen), logits(o.kind, o.out, unseen))
    print(json.dumps({"logits_db": None if math.isinf(noise) else round(noise, 2)}))


if __name__ == "__main__":
    main()
