"""Pictures that a report carries: only what is a PNG gets into a page."""

import base64
import binascii
import re
import struct

PNG = b"\x89PNG\r\n\x1a\n"


def png(text: str) -> tuple[str, int]:
    """The text if it is a PNG in base64, and the image's longer side in pixels; else nothing and 0."""
    text = re.sub(r"\s", "", text)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return "", 0
    if not content.startswith(PNG) or len(content) < 24:
        return "", 0
    return text, max(struct.unpack(">II", content[16:24]))
