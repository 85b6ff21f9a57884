"""Which values an option may have: those that the arithmetic and the system behind it hold."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

LEAST, MOST = 1e-30, 1e30
"""Sizes of a float other than zero: what float32 holds, with room for a product."""

MOST_THREADS = 1024
"""Of ONNX Runtime, as in ``export/runtime.py``, which the command line does not load."""

MOST_WHOLE = 2**32 - 1
"""Of seeds, counts and sides: what random number generators take as a seed."""


def within(value: Any) -> Any:
    """
    Raises:
        ValueError: it is, or holds, a number beyond these limits or a text that cannot be written.
    """
    held = value.values() if isinstance(value, Mapping) else value
    for one in held if isinstance(value, Mapping | list | tuple) else [value]:
        if isinstance(one, float) and one and not LEAST <= abs(one) <= MOST:
            raise ValueError(f"a number is zero, or from {LEAST:g} to {MOST:g}")
        if isinstance(one, int) and abs(one) > MOST_WHOLE:
            raise ValueError(f"a whole number is at most {MOST_WHOLE}")
        if isinstance(one, str | Path):
            _refuse_half_characters(str(one))
    return value


def _refuse_half_characters(text: str) -> None:
    """Bytes of a file name that are no UTF-8 have a form of their own, and may stand in a path."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a character, which cannot be written") from error


def no_truth(value: Any, annotation: Any) -> Any:
    """YAML takes ``on`` and ``off`` for yes and no, and Python yes for 1.

    Args:
        annotation: of the option that has the value.

    Raises:
        ValueError: it is yes or no, and something else is wanted.
    """
    if not isinstance(value, bool) or annotation is bool or bool in get_args(annotation):
        return value
    words = {word for part in (annotation, *get_args(annotation)) for word in get_args(part)}
    if (word := "on" if value else "off") in words:
        return word
    raise ValueError("something other than yes or no is wanted")
