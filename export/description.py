"""Describe the preprocessing and the tensors of a model for clients in other languages.

The manifest contains these descriptions; the runtime does not read them. docs/preprocessing.md explains them.
"""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from .runtime import Model, Preprocessing, height_width
from .runtime.outputs import RegionDecoder

_SUPPORTS = {"nearest": 0.0, "box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}
"""Pixels on either side of its center that a filter of Pillow extends to when it enlarges."""
_FITS = {"center": "cover", "border": "contain", "squash": "fill"}
_TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int64)": "int64"}


def describe_steps(p: Preprocessing, *, takes_pixels: bool) -> list[dict[str, Any]]:
    """Return the steps from an image file to the input, in order, each with all of its parameters."""
    height, width = height_width(p.resize)
    rows, columns = height_width(p.size)
    is_square_cover = p.crop_mode == "center" and height == width
    resize = {
        "step": "resize",
        "height": height,
        "width": width,
        "fit": _FITS[p.crop_mode],
        "rounding": "longer side down" if is_square_cover else "half to even",
        "filter": p.interpolation,
        "support": _SUPPORTS[p.interpolation],
        **({"a": -0.5} if p.interpolation == "bicubic" else {}),
        "antialias": True,
        "order": ["horizontal", "vertical"],
        "bits_between": 8,
    }
    is_border = p.crop_mode == "border"
    crop = {
        "step": "crop",
        "height": rows,
        "width": columns,
        "position": "center",
        "rounding": "half to even",
        "padding": [round(255 * value) if is_border else 0 for value in p.mean],
        "padding_rounding": "down",
    }
    decode = {
        "step": "decode",
        "color": "RGB",
        "bits": 8,
        "gray_bits": p.gray_bits,
        "orientation": "EXIF",
        "background": [255, 255, 255],
        "jpeg_scale": "1/8, 1/4 or 1/2 if each side keeps twice the resized pixels",
    }
    normalize = {"step": "normalize", "scale": 1 / 255, "mean": list(p.mean), "std": list(p.std)}
    return [decode, resize, crop, *([] if takes_pixels else [normalize])]


def describe_tensors(model: Model) -> dict[str, list[dict[str, Any]]]:
    """Return the inputs and outputs of a model: name, type and shape, with layout or activation."""
    [image] = [_describe(entry) for entry in model.session.get_inputs()]
    image |= {"layout": "NHWC" if model.takes_pixels else "NCHW", "color": "RGB"}
    has_anchors = model.decoder is not None and not isinstance(model.decoder, RegionDecoder)
    is_sigmoid = has_anchors or model.thresholds is not None
    outputs = [_describe(entry) for entry in model.session.get_outputs()]
    for output in outputs:
        is_raw = model.decoder is not None and output["name"] != "logits"
        output["activation"] = None if is_raw else "sigmoid" if is_sigmoid else "softmax"
    return {"inputs": [image], "outputs": outputs}


def _describe(entry: ort.NodeArg) -> dict[str, Any]:
    return {"name": entry.name, "dtype": _TYPES.get(entry.type, entry.type), "shape": list(entry.shape)}
