"""Which numbers an option may have: those that the arithmetic behind it holds."""

from collections.abc import Mapping
from typing import Any

LEAST, MOST = 1e-30, 1e30
"""Sizes of a float other than zero: what float32 holds, with room for a product."""

MOST_WHOLE = 2**32 - 1
"""Of seeds, counts and sides: what random number generators take as a seed."""


def within(value: Any) -> Any:
    """
    Raises:
        ValueError: it is, or holds, a number beyond these limits.
    """
    held = value.values() if isinstance(value, Mapping) else value
    for one in held if isinstance(value, Mapping | list | tuple) else [value]:
        if isinstance(one, float) and one and not LEAST <= abs(one) <= MOST:
            raise ValueError(f"a number is zero, or from {LEAST:g} to {MOST:g}")
        if isinstance(one, int) and abs(one) > MOST_WHOLE:
            raise ValueError(f"a whole number is at most {MOST_WHOLE}")
    return value
