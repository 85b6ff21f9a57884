"""The artifact folder: model files, a manifest that describes them, and the runtime.

`manifest.json`, schema version 1, is read on the device by `runtime.read_manifest`:

    schema_version   1
    preprocessing    `runtime.Preprocessing.to_dict()`: library, filter, antialias, sizes, crop, mean, std
    input            "uint8" if the models take rendered pixels, uint8 [batch, H, W, 3] RGB, and normalize
                     them; absent if they take normalized float32 [batch, 3, H, W]
    steps            `description.describe_steps`: decode, resize, crop, normalize with all parameters
    inputs, outputs  `description.describe_tensors`: name, dtype, shape; layout and color of the input,
                     "softmax", "sigmoid" or null as `activation` of an output
    labels           class names in the order of the logits
    task             "multi-label" (sigmoid), "detection"; absent for one label per image (softmax)
    thresholds       for multi-label: the smallest probability at which each label is predicted
    decoder          for detection: how the outputs `logits` [batch, A, classes] (sigmoid) and `boxes` [batch,
                     A, 4] of the A anchors become boxes; see `runtime.Decoder`
        kind             "retinanet", "ssdlite" or "fasterrcnn". The last has no anchors: `logits` (softmax,
                         background first) and `boxes` are those of R regions, a third output `regions`
                         [batch, R, 4] in pixels of the input; unused ones are 0, and `candidates` is R
        anchors          levels in the order of the outputs: `grid`, rows and columns; `stride`, pixels from
                         column to column and from row to row; `cells`, the boxes x1, y1, x2, y2 of row 0 and
                         column 0 in pixels of the input. Order: rows, columns, cells
        box_weights      divisors of a box's output (dx, dy, dw, dh): its center is the anchor's plus (dx, dy)
                         times the anchor's sides, its sides are the anchor's times exp(dw) and exp(dh)
        score_threshold  smaller scores are dropped, then all but the best `candidates` of each level
        nms_iou          a box is dropped if a better one of its class has a larger IoU with it
        detections       largest number of boxes per image
    origin           teachers and student with their licenses, method, data, and the temperature folded into
                     the model, if any; any JSON
    versions         versions of the tools that wrote the files
    self_test        name, bytes, sha256 of `self_test.SELF_TEST`
    files            for each model file:
        name             name in the folder
        precision        "fp32", "int8" or "fp16"
        target           processor family, null for any
        bytes, sha256    of its content
        opset            version of ONNX's operator set
        ir_version       version of the ONNX format, which the device's runtime must support; of .ort that of
                         `source`
        quantization     the recipe of int8, null otherwise
        accuracy         of this file in ONNX Runtime, percent: top1 (multi-label: map), n, low, high (95 %
                         interval), and more; null if not measured. Of fp16 with all tensors rounded to fp16,
                         see `conversion.half`
        parity           of fp16, and of files in ONNX Runtime's own format (.ort): `source`, the file that it
                         was made of; `max_abs`, largest difference of a logit; `same`, images with the same
                         prediction; `n`, images. Absent for others
    checksum         `runtime.compute_checksum` of the other fields

The manifest contains no user name, host name or local path. It does not list `predict.py`, the folder
`RUNTIME`, `labels.txt` and `README.md`, which a later version of questpress may write again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from . import runtime
from .conversion.onnx_export import OnnxFile
from .description import describe_steps, describe_tensors
from .device import self_test
from .device.sample_images import draw_images
from .errors import ExportError
from .files import write_bytes
from .int8.targets import is_exact_here
from .text import escape_controls

PREDICT, LABELS, CARD = "predict.py", "labels.txt", "README.md"
RUNTIME = "questpress_runtime"
"""Folder of an artifact that `predict.py` imports: copies of this package's files that run on a device."""

_HOME = re.compile(r"~[^/\\]*[/\\]")
_TOOLS = ("questpress", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class ShippedFile:
    """A model file of the artifact; `accuracy` in percent: top1 or map, n, low, high."""

    file: OnnxFile
    precision: str
    accuracy: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    target: str | None = None
    parity: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the file's entry in the manifest."""
        return {
            "name": self.file.path.name,
            "precision": self.precision,
            "target": self.target,
            "bytes": self.file.bytes,
            "sha256": self.file.sha256,
            "opset": self.file.opset,
            "ir_version": self.file.ir_version,
            "quantization": None if self.quantization is None else dict(self.quantization),
            "accuracy": None if self.accuracy is None else dict(self.accuracy),
            **({} if self.parity is None else {"parity": dict(self.parity)}),
        }


def write_manifest(
    folder: str | Path,
    *,
    files: Sequence[ShippedFile],
    preprocessing: runtime.Preprocessing,
    labels: Sequence[str],
    origin: Mapping[str, Any],
    thresholds: Sequence[float] | None = None,
    decoder: runtime.Decoder | None = None,
    takes_pixels: bool = False,
) -> Path:
    """Verify every file and write `folder`/manifest.json atomically.

    Raises ExportError if a file in the folder differs from its description, a name occurs twice, or `origin`
    contains an absolute path.
    """
    folder = Path(folder)
    names = [shipped.file.path.name for shipped in files]
    if len(set(names)) != len(names):
        raise ExportError(f"file names in an artifact must be distinct, got {', '.join(names)}")
    paths = [text for text in _find_strings(origin) if Path(text).is_absolute() or _HOME.match(text)]
    if paths:
        raise ExportError(f"the origin in an artifact must not contain a local path, got {paths[0]}")
    manifest: dict[str, Any] = {
        "schema_version": runtime.SCHEMA_VERSION,
        "preprocessing": preprocessing.to_dict(),
        **({"input": runtime.UINT8} if takes_pixels else {}),
        "steps": describe_steps(preprocessing, takes_pixels=takes_pixels),
        "labels": list(labels),
        **({} if thresholds is None else {"task": runtime.MULTI_LABEL, "thresholds": list(thresholds)}),
        **({} if decoder is None else {"task": runtime.DETECTION, "decoder": decoder.to_dict()}),
        "origin": dict(origin),
        "versions": tool_versions(),
        "files": [shipped.to_dict() for shipped in files],
    }
    path = folder / runtime.MANIFEST
    try:
        test, tensors = _run_files(folder, manifest)
        manifest.update(tensors)
        sha256 = hashlib.sha256(test).hexdigest()
        manifest["self_test"] = {"name": self_test.SELF_TEST, "bytes": len(test), "sha256": sha256}
        # Of the content as a reader gets it: JSON has no tuples.
        manifest["checksum"] = runtime.compute_checksum(json.loads(json.dumps(manifest)))
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        write_bytes(folder / self_test.SELF_TEST, test)
        write_bytes(folder / LABELS, "".join(f"{escape_controls(label)}\n" for label in labels).encode())
        write_bytes(path, f"{text}\n".encode())
    except runtime.ArtifactError as error:
        raise ExportError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise ExportError(f"{path} cannot be written as JSON: {error}") from error
    return path


def _run_files(folder: Path, manifest: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Verify and run every model file; return the content of the self-test, and `describe_tensors`."""
    preprocessing = runtime.Preprocessing.from_dict(manifest["preprocessing"])
    images = draw_images(max(runtime.height_width(preprocessing.size)))
    pixels = self_test.render_images(images, preprocessing)
    files, tensors = {}, {}
    for entry in manifest["files"]:
        content, name = runtime.read_verified(folder, entry), entry["name"]
        model = runtime.open_content(content, name, manifest=manifest)
        if entry["target"] is not None and not is_exact_here(entry["target"]):
            model.session = runtime.open_session(content, model.threads, fuse=False, name=name)
        tensors = describe_tensors(model)
        outputs = self_test.sample_outputs(model, pixels)
        files[name] = {output: _round(values) for output, values in outputs.items()}
    test = {
        "images": [base64.b64encode(image).decode() for image in images],
        "pixels": [self_test.sample(image).astype(int).tolist() for image in pixels],
        "files": files,
    }
    return json.dumps(test, separators=(",", ":"), allow_nan=False).encode(), tensors


def _round(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in row] for row in values]


def tool_versions() -> dict[str, str]:
    """Return the versions of the tools that write the files."""
    versions = {}
    for tool in _TOOLS:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:  # questpress from a source tree that is not installed
            versions[tool] = "unknown"
    return versions


def _find_strings(value: Any) -> list[str]:
    """Return all strings in a JSON value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _find_strings(part)]
    if isinstance(value, Sequence):
        return [text for item in value for text in _find_strings(item)]
    return []


_PARTS = ("__init__.py", "text.py", "predict_cli.py", "runtime/*.py", "device/*.py")

_PREDICT_PY = f'''"""Apply the model of this folder.

    python predict.py photo.jpg
    from predict import Classifier, Detector, open_model

It requires the folder {RUNTIME} and the packages numpy, Pillow and onnxruntime.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))
if __name__ == "__main__":
    sys.dont_write_bytecode = True  # the folder stays as it was shipped
    from {RUNTIME}.device.packages import check_packages

    check_packages()

from {RUNTIME}.runtime import *

if __name__ == "__main__":
    from {RUNTIME}.predict_cli import run

    run(FOLDER)
'''


def runtime_files() -> dict[str, bytes]:
    """Return predict.py and the files that it imports by their paths in an artifact, the same in each."""
    root = Path(__file__).parent
    sources = [path for part in _PARTS for path in sorted(root.glob(part))]
    return {
        PREDICT: _PREDICT_PY.encode(),
        **{f"{RUNTIME}/{path.relative_to(root).as_posix()}": path.read_bytes() for path in sources},
    }


def write_runtime(folder: Path) -> None:
    """Write those of `runtime_files` that are not up to date into an artifact folder. Raises ExportError."""
    for name, content in runtime_files().items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)


def list_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the paths of an artifact's files, and of no others that the folder may contain."""
    names = [runtime.MANIFEST, CARD, LABELS, PREDICT, self_test.SELF_TEST]
    names += [str(entry["name"]) for entry in manifest["files"]]
    names += [path.relative_to(folder).as_posix() for path in (folder / RUNTIME).rglob("*.py")]
    return sorted(name for name in names if (folder / name).is_file())
