"""The files that ``compare.py`` times: fp32, our int8 of it, and other tools' int8 as their users get it.

    python -m benchmarks.int8.files nncf FP32.onnx CALIBRATION.npy INPUTS.npy OUT.onnx

Each file is made by a separate process, from the same fp32 file and the same images (float32 [n, 3, S, S],
preprocessed). The process prints, as JSON, the signal to noise of the file's logits against those of fp32 on
the inputs, since the speed of a file that computes something else does not count.

What the tools do, each by its defaults (read in the versions named):

- onnxruntime 1.31: ``quant_pre_process`` (shape inference and the basic and extended graph optimizations, as
  its documentation recommends), then ``quantize_static``: QDQ, int8 activations, int8 weights with one scale
  a tensor, MinMax.
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
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from questpress import export
from questpress.export.conversion.rewrite import RULES
from questpress.export.runtime import Preprocessing, normalize, open_session
from questpress.models.build import geometry
from questpress.pipeline.data.decode import render_images
from questpress.pipeline.data.sources import open_data
from questpress.pipeline.runs.files import write_json
from questpress.pipeline.runs.hashes import digest, sha256


@dataclass(frozen=True)
class Kind:
    """A subject of the benchmark: how its file is made, from what, and in which runtime it is timed."""

    title: str
    packages: tuple[str, ...]
    """Packages that decide the file's bytes; those of other tools aren't dependencies of ours."""

    make: Callable[[Path, np.ndarray, Path], None] | None
    """Arguments: fp32 file, calibration images, path. None for fp32 itself, and if the file is ours."""

    file_of: str | None = None
    """The kind whose file it uses, if there is no separate one."""

    sources: str = ""
    """The files of our export whose code decides the bytes."""

    suffix: str = ".onnx"
    openvino: str | None = None
    """Instructions that oneDNN may use in OpenVINO; None if the file is run by ONNX Runtime."""


def ours(fp32: Path, images: np.ndarray, out: Path, without: str | None = None) -> None:
    from tests.support.networks import quantize_int8

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
        "OpenVINO without AMX", ("nncf", "openvino"), None, file_of="openvino", openvino="AVX512_CORE_VNNI"
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
    """Return an error message if packages that these need are not installed."""
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
    """Return the version of every package that decides these files' bytes or runs them."""
    names = {package for kind in kinds for package in KINDS[kind].packages}
    return {name: version(name) for name in sorted(names | {"onnxruntime", "numpy"})}


def write_fp32(name: str, images: np.ndarray, out: Path, seed: int) -> None:
    """Export a timm network with random weights and with batch norms like those of a trained one.

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
    """Return float32 [n, classes], one image at a time, in the runtime that the file is timed in."""
    if KINDS[kind].openvino:
        from questpress.export.latency.worker import load_openvino

        run = load_openvino(str(path), 1, (1, *images.shape[1:]))
        return np.concatenate([run(images[i : i + 1]) for i in range(len(images))])
    opened = open_session(path, 1)
    name = opened.get_inputs()[0].name
    return np.concatenate([opened.run(None, {name: images[i : i + 1]})[0] for i in range(len(images))])


def signal_to_noise(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return the variance of `expected` [n, classes] over the mean squared difference, in dB."""
    noise = float(np.mean((actual - expected) ** 2))
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


INPUTS = 64
"""Different images that a subject sees in turn; none of them is calibrated on."""


@dataclass(frozen=True)
class File:
    """A file to be timed, or the reason why there is none.

    `sha256` is of the file that is opened, and with an .xml of its .bin, too. `logits_db`: signal to noise of
    its logits against those of fp32, in dB; None for fp32 itself.
    """

    path: Path
    sha256: tuple[str, ...] = ()
    bytes: int = 0
    logits_db: float | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, of the path only the name."""
        return {**asdict(self), "path": self.path.name}


class Images:
    """Images to calibrate and to time with, drawn by a seed from the train and val roles.

    Raises:
        SystemExit: there are too few.
    """

    def __init__(self, data: str, count: int, seed: int, size: int) -> None:
        images = open_data(data)
        if len(images.train) < count or not images.val:
            raise SystemExit(
                f"{images.source} has {len(images.train)} images in its train role and {len(images.val)} in "
                f"its val role; calibration takes {count} of the first (--images), timing the second"
            )
        random = np.random.default_rng(seed)
        self.calibration = [images.train[i] for i in random.permutation(len(images.train))[:count]]
        self.inputs = [images.val[i] for i in random.permutation(len(images.val))[:INPUTS]]
        self.name, self.size = images.name, size

    def describe(self) -> dict[str, Any]:
        """Return a description that is equal for equal images in an equal order."""
        return {
            "data": self.name,
            "size": self.size,
            "calibration": len(self.calibration),
            "sha256": digest([[image.key for image in part] for part in (self.calibration, self.inputs)]),
        }

    def arrays(self, model: str) -> tuple[np.ndarray, np.ndarray]:
        """Return calibration images and inputs, float32 [n, 3, S, S] each, preprocessed for a network."""
        g = geometry(model, self.size)
        return self._rendered(
            Preprocessing.create(g.image_size, g.crop_fraction, g.interpolation, g.crop_mode, g.mean, g.std)
        )

    @functools.lru_cache(maxsize=1)  # noqa: B019  (one set of images in a process)
    def _rendered(self, how: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
        pixels = render_images([*self.calibration, *self.inputs], how).pixels.stack().numpy()
        images = normalize(pixels, how)
        return images[: len(self.calibration)], images[len(self.calibration) :]


def files_of(
    folder: Path, model: str, kinds: Sequence[str], images: Images, seed: int, has_time: Callable[[], bool]
) -> dict[str, File]:
    """Return each kind's file of a network, made if it is missing; no files if there was no time left."""
    own: dict[str, File] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for kind in dict.fromkeys(KINDS[kind].file_of or kind for kind in kinds):
        path = folder / f"{kind}{KINDS[kind].suffix}"
        made_from = {
            "kind": kind,
            "model": model,
            "seed": seed,
            "images": images.describe(),
            "versions": versions([kind]),
            "fp32": own["fp32"].sha256 if own else None,
            "ours": _sources(KINDS[kind].sources) if KINDS[kind].sources else None,
        }
        file = _load(path, made_from)
        if file is None and not has_time():
            return {}
        own[kind] = file or _make(kind, model, path, made_from, images, seed)
    return {kind: own[KINDS[kind].file_of or kind] for kind in kinds}


def _load(path: Path, made_from: dict[str, Any]) -> File | None:
    """Return the file of an earlier call if it was made from the same and has not changed."""
    facts = read(_facts(path))
    if facts is None or facts["made_from"] != json.loads(json.dumps(made_from)):
        return None
    parts = _parts(path)
    if not all(part.exists() for part in parts) or [sha256(part) for part in parts] != facts["sha256"]:
        return None
    return File(path, tuple(facts["sha256"]), facts["bytes"], facts["logits_db"])


def _make(kind: str, model: str, path: Path, made_from: dict[str, Any], images: Images, seed: int) -> File:
    print(f"== {model}: making {KINDS[kind].title}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="questpress-int8-") as scratch:
        arrays = []
        for name, array in zip(("calibration", "inputs"), images.arrays(model), strict=True):
            arrays.append(Path(scratch) / f"{name}.npy")
            np.save(arrays[-1], array)
        command = [
            sys.executable, "-m", "benchmarks.int8.files", kind, str(path.with_name("fp32.onnx")),
            *map(str, arrays), str(path),
            "--network", model, "--seed", str(seed),
        ]  # fmt: skip
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or ["no error message"])[-1]
        error = f"{KINDS[kind].title} made no file of {model}: {last}"
        if kind in ("fp32", "ours"):
            raise SystemExit(error)
        return File(path, error=error)
    parts = [sha256(part) for part in _parts(path)]
    facts = {
        "made_from": made_from,
        "sha256": parts,
        "bytes": sum(part.stat().st_size for part in _parts(path)),
        "logits_db": json.loads(process.stdout)["logits_db"],
    }
    write_json(_facts(path), facts)
    return File(path, tuple(parts), facts["bytes"], facts["logits_db"])


def read(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, or None if there is none."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _facts(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _parts(path: Path) -> list[Path]:
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


@functools.cache
def _sources(pattern: str) -> str:
    """Return a hash of the export code: another revision makes its files again."""
    folder = Path(next(iter(export.__path__)))
    return digest({str(f.relative_to(folder)): sha256(f) for f in sorted(folder.glob(pattern))})


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
    # What the tools print goes to stderr, since stdout is the result.
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
