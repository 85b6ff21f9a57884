"""The files that transformers.js reads, in the browser and in Node.js: a classifier under its names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir

from .. import runtime
from ..errors import ExportError
from ..files import write_bytes
from .onnx_export import write_onnx

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
FP32, INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"
INPUT = "pixel_values"
LANCZOS = 1
"""Pillow's number of the only filter that transformers.js antialiases, in Node.js; browsers ignore it."""


def write_transformers_js(artifact: Path, manifest: Mapping[str, Any], folder: Path) -> None:
    """Write `CONFIG`, `PREPROCESSOR`, `FP32`, and `INT8` if the artifact has an int8 file, into a folder.

    Raises ExportError if transformers.js cannot run the model or preprocess its images.
    """
    preprocessing = runtime.Preprocessing.from_dict(manifest["preprocessing"])
    if (reason := _explain_unsuited(manifest, preprocessing)) is not None:
        raise ExportError(f"transformers.js {reason}")
    fp32 = next(file for file in manifest["files"] if file["precision"] == "fp32")
    int8 = [file for file in manifest["files"] if file["precision"] == "int8"]
    # The file for x86 has weights of 7 bits, with which no kernel saturates.
    int8.sort(key=lambda file: file["target"] != "x86")
    _write_json(folder / CONFIG, describe_model(manifest["labels"], has_int8=bool(int8)))
    _write_json(folder / PREPROCESSOR, describe_processor(preprocessing))
    (folder / FP32).parent.mkdir()
    for entry, name in ((fp32, FP32), *((file, INT8) for file in int8[:1])):
        proto = onnx.load_model_from_string(runtime.read_verified(artifact, entry))
        model = onnx_ir.from_proto(proto)
        model.graph.inputs[0].name = INPUT
        write_onnx(onnx_ir.to_proto(model), folder / name)


def describe_model(labels: list[str], *, has_int8: bool) -> dict[str, Any]:
    """Return `CONFIG`; the type is that of a class which runs any classifier of `INPUT`."""
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        # Browsers would request the int8 file.
        **({} if has_int8 else {"transformers.js_config": {"dtype": "fp32"}}),
    }


def describe_processor(p: runtime.Preprocessing) -> dict[str, Any]:
    """Return `PREPROCESSOR`."""
    (height, width), (rows, columns) = runtime.height_width(p.resize), runtime.height_width(p.size)
    size = {"shortest_edge": height} if p.crop_mode == "center" else {"height": height, "width": width}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": LANCZOS,
        "do_center_crop": True,
        "crop_size": {"height": rows, "width": columns},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }


def _explain_unsuited(manifest: Mapping[str, Any], p: runtime.Preprocessing) -> str | None:
    """Return why transformers.js cannot use a model, None if it can."""
    if "task" in manifest:
        return f"runs classifiers with one label per image, this is a model for {manifest['task']}"
    if manifest.get("input") == runtime.UINT8:
        return "passes normalized images, this model takes pixels. Export the run with --input float"
    if p.crop_mode == "border":
        return "cannot add a border, which this run does by --resize pad"
    if p.crop_mode == "center" and not isinstance(p.resize, int):
        return "crops to squares only, this model has another aspect ratio"
    return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
