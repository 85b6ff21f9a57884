"""Little pictures for the report."""

import base64
import io

import numpy as np
from PIL import Image


def thumbnail(image: np.ndarray, side: int) -> str:
    """An image uint8 [H,W,3] at ``side`` pixels, as base64 of a PNG."""
    small = Image.fromarray(np.ascontiguousarray(image)).resize((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
