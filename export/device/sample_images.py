"""Synthetic images of the self-test: PNG, PNG with transparency, and a JPEG that is stored on its side."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SCALE, MAX_SIDE = 1.5, 640
"""Longer side of an image relative to that of the network's input, so that it is resized; limit in pixels."""
SHAPES = 12
_EXIF_ORIENTATION, _ON_ITS_SIDE = 0x0112, 6


def draw_images(side: int) -> list[bytes]:
    """Return image files for a network with inputs of `side` pixels, the same on each call."""
    long = min(MAX_SIDE, max(16, round(SCALE * side)))
    upright = Image.Exif()
    upright[_EXIF_ORIENTATION] = _ON_ITS_SIDE
    kinds: list[tuple[tuple[int, int], str, str, dict[str, Any]]] = [
        ((long, 3 * long // 4), "RGB", "PNG", {"optimize": True}),
        ((2 * long // 3, long), "RGBA", "PNG", {"optimize": True}),
        ((160, 120), "RGB", "JPEG", {"quality": 75, "exif": upright}),
    ]
    files = []
    for number, (size, mode, format, options) in enumerate(kinds):
        file = BytesIO()
        _draw(size, mode, np.random.default_rng(number)).save(file, format, **options)
        files.append(file.getvalue())
    return files


def _draw(size: tuple[int, int], mode: str, rng: np.random.Generator) -> Image.Image:
    """Draw rectangles and ellipses of random places and colors, with thin outlines."""
    image = Image.new(mode, size, (*map(int, rng.integers(0, 256, 3)), *([0] if mode == "RGBA" else [])))
    draw = ImageDraw.Draw(image)
    for index in range(SHAPES):
        corners = np.sort(rng.random((2, 2)), axis=0) * size
        fill, outline = (tuple(map(int, rng.integers(0, 256, 3))) for _ in range(2))
        shape = draw.rectangle if index % 2 else draw.ellipse
        shape([*map(float, corners.ravel())], fill=fill, outline=outline, width=2)
    return image
