"""The artifact folder: model files, and a manifest that says what they are, how good, and whence.

`manifest.json`, schema version 1 (`runtime.read_manifest` is its reader on the device):

    schema_version   1
    preprocessing    `runtime.Preprocessing.to_dict()`: library, filter, antialias, sizes, crop, mean, std
    input            "uint8" where the files take pixels, uint8 [batch, S, S, 3] RGB, rendered but not
                     normalised (mean and std are in the files); absent where they take float32
                     [batch, 3, S, S], normalised
    labels           class names, in the order of the logits
    task             "multi-label" where an image may have several labels (a sigmoid for each); absent where
                     it has one (softmax)
    thresholds       for multi-label: of each label, the least probability at which an image has it
    origin           whence the network: teachers and student with their licences, method, data, and the
                     temperature that was folded into it, if any; free JSON
    versions         of the tools that wrote the files
    files            for each file:
        name             within the folder
        precision        "fp32" or "int8"
        target           the processor family it is meant for; null: any
        bytes            its size
        sha256           of its content
        opset            version of ONNX's operator set
        ir_version       ONNX's format version: what the device's runtime must read at least
        quantization     the recipe, for int8; null otherwise
        accuracy         of this very file in ONNX Runtime, percent: top1 (multi-label: map), n, low, high
                         (95 % interval), and what else was measured; null where it was not
    checksum         sha256 of all of the above, as `runtime.checksum` writes it; older ones have none

Nothing in it names a user, a host or a local path. `predict.py` and `README.md` lie beside and are not in it:
no answer depends on them, and the README is written anew whenever more is known.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import runtime
from .conversion.onnx_export import OnnxFile
from .errors import ExportError
from .files import write_bytes

_HOME = re.compile(r"~[^/\\]*[/\\]")

_TOOLS = ("questpress", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class ShippedFile:
    """A model file in the artifact folder, and what is known of it. `accuracy` in percent: top1 or map, n,
    low, high.
    """

    file: OnnxFile
    precision: str
    accuracy: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    target: str | None = None

    def to_dict(self) -> dict[str, Any]:
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
        }


def write_manifest(
    folder: str | Path,
    *,
    files: Sequence[ShippedFile],
    preprocessing: runtime.Preprocessing,
    labels: Sequence[str],
    origin: Mapping[str, Any],
    thresholds: Sequence[float] | None = None,
    takes_pixels: bool = False,
) -> Path:
    """Write `folder`/manifest.json, whole or not at all, and verify every file against it.

    Raises ExportError where a file isn't in the folder as described, a name is given twice, or `origin` holds
    an absolute path.
    """
    folder = Path(folder)
    names = [shipped.file.path.name for shipped in files]
    if len(set(names)) != len(names):
        raise ExportError(f"an artifact cannot hold two files of one name: {', '.join(names)}")
    local = [text for text in _strings(origin) if Path(text).is_absolute() or _HOME.match(text)]
    if local:
        raise ExportError(f"an artifact may not name a path of this machine, and its origin does: {local[0]}")
    manifest: dict[str, Any] = {
        "schema_version": runtime.SCHEMA_VERSION,
        "preprocessing": preprocessing.to_dict(),
        **({"input": runtime.UINT8} if takes_pixels else {}),
        "labels": list(labels),
        **({} if thresholds is None else {"task": runtime.MULTI_LABEL, "thresholds": list(thresholds)}),
        "origin": dict(origin),
        "versions": tool_versions(),
        "files": [shipped.to_dict() for shipped in files],
    }
    path = folder / runtime.MANIFEST
    try:
        for entry in manifest["files"]:
            runtime.read_verified(folder, entry)
        manifest["checksum"] = runtime.checksum(json.loads(json.dumps(manifest)))  # of what a reader gets
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        write_bytes(path, f"{text}\n".encode())
    except runtime.ArtifactError as error:
        raise ExportError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise ExportError(f"{path} cannot hold what it was given: {error}") from error
    return path


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an artifact (or run) folder, every file verified. Raises runtime.ArtifactError."""
    found, manifest = runtime.read_manifest(folder)
    for entry in manifest["files"]:
        runtime.read_verified(found, entry)
    return manifest


def tool_versions() -> dict[str, str]:
    """The installed version of every tool that has a part in the files."""
    versions = {}
    for tool in _TOOLS:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:  # questpress from a source tree that isn't installed
            versions[tool] = "unknown"
    return versions


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    if isinstance(value, Sequence):
        return [text for item in value for text in _strings(item)]
    return []


PREDICT = "predict.py"

_FUTURE = "from __future__ import annotations\n"

_HEAD = "# Of a questpress artifact: python predict.py photo.jpg, or from predict import Classifier.\n"

_NEEDS = """
if __name__ == "__main__":
    import importlib.util
    import sys

    lacking = {"numpy": "numpy", "PIL": "pillow", "onnxruntime": "onnxruntime"}
    lacking = {name: package for name, package in lacking.items() if not importlib.util.find_spec(name)}
    if lacking:
        needed = " ".join(lacking.values())
        sys.exit(f"Error: not installed here: {', '.join(lacking.values())}; try: pip install {needed}")
"""

_END = """

if __name__ == "__main__":
    run()
"""


def predict_py() -> str:
    """The text of predict.py; the same questpress gives the same bytes."""
    before, after = _read("runtime.py").split(_FUTURE, 1)
    line = "# " + "-" * 105
    command = f"{_without_ours('text.py')}\n\n{_without_ours('predict_cli.py')}"
    return f"{_HEAD}{before}{_FUTURE}{_NEEDS}{after}\n\n{line}\n# The command\n\n{command}{_END}"


def write_predict(folder: Path) -> Path:
    """Write `folder`/predict.py, whole or not at all; nothing is written where it is there already.

    Raises ExportError where that fails.
    """
    path, text = folder / PREDICT, predict_py().encode()
    if not path.is_file() or path.read_bytes() != text:
        write_bytes(path, text)
    return path


def _without_ours(name: str) -> str:
    """A module without its docstring and what it imports from those that stand before it."""
    source = _read(name)
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        ours = isinstance(node, ast.ImportFrom) and (node.level > 0 or node.module == "__future__")
        said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if ours or said:
            del lines[node.lineno - 1 : node.end_lineno]
    return "".join(lines).strip() + "\n"


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
