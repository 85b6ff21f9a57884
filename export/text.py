"""Escape control characters of untrusted text, such as file names and labels, before it is printed."""

from __future__ import annotations

import re

# Control characters (including ESC and one-byte CSI), line and paragraph separators, bidirectional
# embeddings, overrides and isolates, and surrogates. Direction marks and joiners belong to the spelling of
# words and are kept.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str, keep: str = "") -> str:
    r"""Escape control characters as in Python, ``\x1b``, except those in `keep`.

    A byte of a file name that is not UTF-8 becomes that byte, ``\xff``.
    """

    def escape(match: re.Match[str]) -> str:
        number = ord(match[0])
        if match[0] in keep:
            return match[0]
        if 0xDC80 <= number <= 0xDCFF:
            number -= 0xDC00
        return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"

    return _CONTROL.sub(escape, text)


def escape_json(text: str) -> str:
    r"""Escape control characters in JSON, ``\u001b``; its value stays the same."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def encodable_json(text: str, encoding: str | None) -> str:
    r"""Escape JSON to ASCII, ``\u6587``, if the encoding lacks a character; its value stays the same."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return re.sub("[^\x00-\x7f]", _escape_utf16, text)
    return text


def _escape_utf16(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
