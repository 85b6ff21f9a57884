"""How large images are, as the headers of some of them say; nothing is decoded."""

import io
from collections.abc import Sequence

from PIL import Image as PillowImage

from ...export.runtime import no_pillow_warnings
from .dataset import Image

SAMPLE = 256
"""Images whose headers are read, evenly spread."""


def sampled_sizes(images: Sequence[Image]) -> list[tuple[int, int]]:
    """Height and width of about ``SAMPLE`` of the images, or of all where they are fewer; what cannot be read
    is left out, since decoding will tell of it.
    """
    sizes = (_size(image) for image in images[:: max(1, len(images) // SAMPLE)])
    return [size for size in sizes if size is not None]


def _size(image: Image) -> tuple[int, int] | None:
    try:
        content = image.read()
        if not isinstance(content, bytes):
            return content.shape[0], content.shape[1]
        with no_pillow_warnings(), PillowImage.open(io.BytesIO(content)) as header:
            return header.height, header.width
    except Exception:  # a damaged file makes Pillow raise nearly anything; decoding will tell of it
        return None
