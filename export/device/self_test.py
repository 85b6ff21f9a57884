"""Compare the outputs of this machine with those at export: `predict.py --self-test`.

`selftest.json` of an artifact folder has three images and what they gave at export:

    images   image files, base64
    pixels   of each image, `sample` of the rendered pixels
    files    of each model file, and of each of its outputs, `sample` for each image but the last, a JPEG,
             whose pixels depend on the decoder
"""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import PIL

from ..runtime import (
    CPU,
    ArtifactError,
    ImageError,
    Model,
    Preprocessing,
    decode_image,
    open_content,
    read_manifest,
    read_verified,
    render,
    runnable_targets,
)

SELF_TEST = "selftest.json"
MAX_SAMPLES = 64
LARGEST = 1e30  # in place of infinity, which JSON lacks
PIXELS, PIXEL_TOLERANCE = "pixels", 1.0
"""Largest difference of the pixels, root mean square in levels."""
TOLERANCES = {"fp32": 0.01, "fp16": 0.05, "int8": 0.1}
"""Largest difference of the outputs by precision of the file, see `compare_outputs`."""


def sample(values: np.ndarray) -> np.ndarray:
    """Return `MAX_SAMPLES` evenly spaced values, or all if they are fewer, as float64.

    Columns of anchors or regions, [N, columns], are sorted first: runtimes may order regions differently.
    """
    flat = (np.sort(values, axis=0) if values.ndim == 2 else values).ravel().astype(np.float64)
    flat = flat.clip(-LARGEST, LARGEST)
    return flat[np.linspace(0, len(flat) - 1, min(len(flat), MAX_SAMPLES)).round().astype(int)]


def render_images(images: Sequence[str | Path | bytes], p: Preprocessing) -> np.ndarray:
    """Return rendered images, uint8 [images, H, W, 3]."""
    return np.stack([render(decode_image(image, gray_bits=p.gray_bits), p) for image in images])


def sample_outputs(model: Model, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Return `sample` of each output of the model by its name, float64 [images − 1, n].

    `pixels` are rendered images, uint8 [images, H, W, 3].
    """
    runs = [model.run(model.to_input(image[None])) for image in pixels[:-1]]
    names = [output.name for output in model.session.get_outputs()]
    return {name: np.stack([sample(run[index][0]) for run in runs]) for index, name in enumerate(names)}


def compare_outputs(outputs: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> float:
    """Return the largest difference of an output, relative to the spread of the expected values.

    Both are root mean squares. NaN or infinity if outputs are not finite or of another shape.
    """
    errors = []
    for name, values in expected.items():
        reference, found = np.array(values, dtype=np.float64), outputs.get(name)
        if found is None or found.shape != reference.shape:
            return float("inf")
        spread = max(float(reference.std()), 1e-3 * float(np.abs(reference).max()), 1e-9)
        errors.append(float(np.sqrt(np.mean((found - reference) ** 2))) / spread)
    return float(np.max(errors))


def run_self_test(path: Path, threads: int | None = None, provider: str = CPU) -> str | None:
    """Print a line for the preprocessing and one for each model file of an artifact folder.

    Returns what is probably wrong, None if every difference is within its tolerance. Raises ArtifactError if
    the folder has no self-test, or a file is missing or damaged.
    """
    folder, manifest = read_manifest(path)
    if "self_test" not in manifest:
        raise ArtifactError(f"{folder} contains no {SELF_TEST}. Export the run again")
    try:
        test = json.loads(read_verified(folder, manifest["self_test"]))
        images = [base64.b64decode(image) for image in test["images"]]
        pixels = render_images(images, Preprocessing.from_dict(manifest["preprocessing"]))
        differences = np.stack([sample(image) for image in pixels]) - np.array(test["pixels"], np.float64)
        error, failures = float(np.sqrt(np.mean(differences**2))), []
        text = f"pixels differ by {error:.2f} levels, {PIXEL_TOLERANCE:g} is allowed"
        if not _print_result("preprocessing", error <= PIXEL_TOLERANCE, text):
            failures.append(PIXELS)
        for entry in manifest["files"]:
            name, precision = entry["name"], entry["precision"]
            if entry["target"] not in runnable_targets():
                print(f"{name}: skipped, it is for {entry['target']}")
                continue
            content = read_verified(folder, entry)
            model = open_content(content, name, threads=threads, manifest=manifest, providers=provider)
            error = compare_outputs(sample_outputs(model, pixels), test["files"][name])
            tolerance = TOLERANCES[precision]
            text = f"outputs differ by {error:.2%} of their spread, {tolerance:.0%} is allowed"
            if not _print_result(name, error <= tolerance, text):
                failures.append(precision)
    except (ImageError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArtifactError(f"{folder / SELF_TEST} cannot be used: {reason}") from error
    return _explain(failures, manifest.get("versions", {}))


def _print_result(name: str, passed: bool, text: str) -> bool:
    """Print a line; return `passed`."""
    print(f"{name}: {'ok' if passed else 'FAILED'}, {text}")
    return passed


def _explain(failures: Sequence[str], versions: Mapping[str, str]) -> str | None:
    """Return the likely cause of the first step that fails."""
    if PIXELS in failures:
        return (
            f"Pillow {PIL.__version__} decodes or resizes images differently from Pillow "
            f"{versions.get('pillow')} of the export. Install that version"
        )
    if "fp32" in failures:
        return (
            f"onnxruntime {ort.__version__} computes other outputs on this processor than onnxruntime "
            f"{versions.get('onnxruntime')} of the export. Install that version"
        )
    if "int8" in failures:
        return (
            f"the int8 kernels of onnxruntime {ort.__version__} are inexact on this processor, "
            f"{platform.machine()}. Use --file student.onnx, or export the run with its --target"
        )
    if failures:
        return (
            "the fp16 file computes other outputs on this processor than at export. Use --file student.onnx"
        )
    return None
