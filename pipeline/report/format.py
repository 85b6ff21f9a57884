"""Numbers as people read them. Every number in the report, in HTML, Markdown and terminal, is written here.

A value that is missing is a dash, one that is not finite says so; sizes are megabytes of 1,000,000 bytes.
"""

import base64
import binascii
import re
import struct
from collections import Counter
from collections.abc import Sequence
from math import floor, isfinite, log10

MISSING = "–"


def significant(value: float, digits: int = 3) -> str:
    """``value`` with so many significant digits, never in exponent form: 0.0412, 1.92, 16.0, 1,230."""
    if not isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")  # first, so that 9.996 counts as 10.0 and not as 10.00
    decimals = max(0, digits - 1 - floor(log10(abs(rounded))))
    return minus(f"{rounded:,.{decimals}f}")


def minus(text: str) -> str:
    """With the typographic minus sign, as wide as the digits."""
    return text.replace("-", "−")


def percent(value: float | None, n: int | None = None) -> str:
    """A percentage; two decimals where ``n`` images can tell them apart (1,000 or more), else one."""
    if value is None:
        return MISSING
    if not isfinite(value):
        return "not finite"
    return f"{_rounded(value, n)} %"


def percent_interval(low: float, high: float, n: int | None = None) -> str:
    return f"{_rounded(low, n)}–{_rounded(high, n)} %"


def points(difference: float, n: int | None = None) -> str:
    """A difference of two percentages, signed: +0.4 points."""
    return minus(f"{difference:+.{_decimals(n)}f} points")


def _rounded(value: float, n: int | None) -> str:
    decimals = _decimals(n)
    if value < 100:  # 99.996 must not become a perfect 100.00
        value = min(value, 100 - 10**-decimals)
    return f"{value:.{decimals}f}"


def _decimals(n: int | None) -> int:
    return 2 if n is not None and n >= 1000 else 1


def megabytes(size: int | None) -> str:
    """Bytes as MB (1,000,000 bytes)."""
    return MISSING if size is None else f"{significant(size / 1e6)} MB"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{significant(value)} ms"


def times(ratio: float) -> str:
    """A ratio: 0.97×, 8.40×, 25.3×, 112×."""
    if not isfinite(ratio):
        return "not finite"
    return f"{ratio:.2f}×" if 0.1 <= ratio < 10 else f"{significant(ratio)}×"


def times_interval(low: float, high: float) -> str:
    return f"{times(low)[:-1]}–{times(high)}"


def count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def counted(value: int, singular: str, plural: str | None = None) -> str:
    """1 thread, 2 threads, 1,797 images."""
    return f"{value:,} {singular if value == 1 else plural or singular + 's'}"


def threads(number: str) -> str:
    return f"{number} thread" if number == "1" else f"{number} threads"


def millions(value: int | None) -> str:
    return MISSING if value is None else f"{significant(value / 1e6)} M"


def duration(seconds: float) -> str:
    """4.2 s, 3 min 12 s, 1 h 04 min."""
    if not isfinite(seconds):
        return "not finite"
    if seconds < 60:
        return f"{seconds:.1f} s" if round(seconds, 1) < 60 else "1 min 00 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def tiny(value: float) -> str:
    """A difference that should be near zero: 3.1e−06."""
    return minus(f"{value:.1e}") if isfinite(value) else "not finite"


def title(name: str) -> str:
    """Return a metric's name for a heading: Accuracy, mAP."""
    return name[:1].upper() + name[1:] if name.islower() else name


def together(names: Sequence[str]) -> str:
    """Several networks: ``resnet50 + resnet34``, ``5 × resnet56``."""
    counts = Counter(names)
    return " + ".join(f"{count} × {name}" if count > 1 else name for name, count in counts.items())


def number(value: float) -> str:
    """Any other number: whole ones with thousands separators, the rest with four significant digits."""
    if not isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return minus(f"{int(value):,}")
    if abs(value) < 1e-3:
        return minus(f"{value:.2e}")
    return significant(value, 4)


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
