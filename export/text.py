"""Text from outside, such as the name of a file or a class, as it may be shown: characters that would steer a
terminal, turn the direction of writing or begin a line of their own are spelled out.
"""

from __future__ import annotations

import re

# Controls (ESC and the one-byte CSI among them), the two separators that end lines, the embeddings, overrides
# and isolates of writing from right to left, and halves of characters. Marks that only say of a letter which
# way it runs, and joiners, belong to the spelling of words and stay.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def spelled_out(text: str, but: str = "") -> str:
    """``text`` with such characters as a program would write them, ``\\x1b``; those in ``but`` stay. A byte
    of a file name that is no UTF-8 is that byte, ``\\xff``.
    """

    def spelled(found: re.Match[str]) -> str:
        number = ord(found[0])
        if found[0] in but:
            return found[0]
        if 0xDC80 <= number <= 0xDCFF:
            number -= 0xDC00
        return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"

    return _STEERING.sub(spelled, text)


def json_spelled_out(text: str) -> str:
    """The same JSON, with such characters as JSON writes them, ``\\u001b``."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
