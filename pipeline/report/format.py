"""Format the numbers of reports and of the terminal.

A missing value is a dash, a value that is not finite is "not finite". Sizes are in MB of 1,000,000 bytes.
"""

from collections import Counter
from collections.abc import Sequence
from math import floor, isfinite, log10

from ...export.results import Speedup
from ...export.runtime import Size, height_width
from ..runs.scores import Proportion, Score

MISSING = "–"
SPLITS = {"train": "training", "val": "validation", "test": "test", "all": ""}


def significant(value: float, digits: int = 3) -> str:
    """Format with this number of significant digits, never in exponent form: 0.0412, 1.92, 16.0, 1,230."""
    if not isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")  # first, so that 9.996 counts as 10.0 and not as 10.00
    decimals = max(0, digits - 1 - floor(log10(abs(rounded))))
    return minus(f"{rounded:,.{decimals}f}")


def minus(text: str) -> str:
    """Replace hyphens by the minus sign, which is as wide as a digit."""
    return text.replace("-", "−")


def percent(value: float | None, n: int | None = None) -> str:
    """Format a percentage: with two decimals if it was measured on ``n`` >= 1,000 images, otherwise one."""
    if value is None:
        return MISSING
    return f"{_rounded(value, n)} %" if isfinite(value) else "not finite"


def percent_interval(low: float, high: float, n: int | None = None) -> str:
    return f"{_rounded(low, n)}–{_rounded(high, n)} %"


def points(difference: float, n: int | None = None) -> str:
    """Format a difference of two percentages: +0.4 points."""
    return minus(f"{difference:+.{_decimals(n)}f} points")


def _rounded(value: float, n: int | None) -> str:
    decimals = _decimals(n)
    if value < 100:  # 99.996 must not become a perfect 100.00
        value = min(value, 100 - 10**-decimals)
    return f"{value:.{decimals}f}"


def _decimals(n: int | None) -> int:
    return 2 if n is not None and n >= 1000 else 1


def pixels(size: Size) -> str:
    """Format a size: 224 × 224 pixels, 96 × 36 pixels (height × width)."""
    height, width = height_width(size)
    return f"{height} × {width} pixels{'' if height == width else ' (height × width)'}"


def megabytes(size: int | None) -> str:
    return MISSING if size is None else f"{significant(size / 1e6)} MB"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{significant(value)} ms"


def times(ratio: float) -> str:
    """Format a ratio: 0.97×, 8.40×, 25.3×, 112×."""
    if not isfinite(ratio):
        return "not finite"
    return f"{ratio:.2f}×" if 0.1 <= ratio < 10 else f"{significant(ratio)}×"


def times_interval(low: float, high: float) -> str:
    return f"{times(low)[:-1]}–{times(high)}"


def speedup(value: Speedup | None) -> str:
    """Format a speed-up with its interval: 1.76× (1.73–1.79×); of processor time, with that name."""
    if value is None:
        return MISSING
    text = f"{times(value.ratio)} ({times_interval(value.low, value.high)})"
    return text if value.clock == "wall" else f"{text} processor time"


def count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def plural(value: int, singular: str, many: str | None = None) -> str:
    """Format a number of things: 1 thread, 2 threads, 1,797 images."""
    return f"{value:,} {singular if value == 1 else many or singular + 's'}"


def images(n: int, split: str) -> str:
    """Format a number of images of a split: 179 validation images."""
    return plural(n, f"{SPLITS.get(split, split)} image".lstrip())


def threads(number: int | str) -> str:
    return plural(int(number), "thread")


def millions(value: int | None) -> str:
    return MISSING if value is None else f"{significant(value / 1e6)} M"


def duration(seconds: float) -> str:
    """Format seconds: 4.2 s, 3 min 12 s, 1 h 04 min."""
    if not isfinite(seconds):
        return "not finite"
    if seconds < 60:
        return f"{seconds:.1f} s" if round(seconds, 1) < 60 else "1 min 00 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def scientific(value: float) -> str:
    """Format a difference that should be near zero: 3.1e−06."""
    return minus(f"{value:.1e}") if isfinite(value) else "not finite"


def title(name: str) -> str:
    """Return the name of a metric for a heading: Accuracy, mAP."""
    return capitalize(name) if name.islower() else name


def capitalize(text: str) -> str:
    """Make the first letter upper-case and keep the others."""
    return text[:1].upper() + text[1:]


def join_names(names: Sequence[str]) -> str:
    """Join names of networks: ``resnet50 + resnet34``, ``5 × resnet56``."""
    counts = Counter(names)
    return " + ".join(f"{count} × {name}" if count > 1 else name for name, count in counts.items())


def number(value: float) -> str:
    """Format any other number: integers with thousands separators, others with four significant digits."""
    if not isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return minus(f"{int(value):,}")
    if abs(value) < 1e-3:
        return minus(f"{value:.2e}")
    return significant(value, 4)


def p_value(p: float) -> str:
    """Format a p-value: 0.041, < 0.001."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float) -> str:
    """Format a p-value for a sentence: p = 0.041, p < 0.001."""
    return f"p {p_value(p)}" if p < 0.001 else f"p = {p_value(p)}"


def score(value: Score | Proportion | None) -> str:
    """Format a score with its 95 % interval: 97.2 % (93.7–98.8 %)."""
    return MISSING if value is None else f"{score_percent(value)} ({score_interval(value)})"


def score_interval(value: Score | Proportion | None) -> str:
    return MISSING if value is None else percent_interval(value.low, value.high, value.n)


def score_percent(value: Score | Proportion | None) -> str:
    return MISSING if value is None else percent(value.percent, value.n)
