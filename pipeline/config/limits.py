"""Limits on option values that keep arithmetic and file names valid."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

MIN_FLOAT, MAX_FLOAT = 1e-30, 1e30
"""Absolute values of nonzero floats: the range of float32, with room for a product."""

MAX_THREADS = 1024
"""Threads of ONNX Runtime, as in ``export/runtime.py``, which imports numpy."""

MAX_INTEGER = 2**32 - 1
"""The largest seed of the random number generators."""


def check_limits(value: Any) -> Any:
    """Return an option's value.

    Raises:
        ValueError: the value, or a part of it, is a number outside of the limits or a text that cannot be
            encoded.
    """
    parts = value.values() if isinstance(value, Mapping) else value
    for part in parts if isinstance(value, Mapping | list | tuple) else [value]:
        if isinstance(part, float) and part and not MIN_FLOAT <= abs(part) <= MAX_FLOAT:
            raise ValueError(f"must be 0 or from {MIN_FLOAT:g} to {MAX_FLOAT:g}")
        if isinstance(part, int) and abs(part) > MAX_INTEGER:
            raise ValueError(f"must be at most {MAX_INTEGER}")
        if isinstance(part, str | Path):
            try:
                os.fsencode(str(part))  # accepts the surrogates of file names that are not UTF-8
            except UnicodeEncodeError as error:
                raise ValueError("must not contain half a character (a lone surrogate)") from error
    return value


def check_not_boolean(value: Any, annotation: Any) -> Any:
    """Return an option's value, with YAML's booleans ``on`` and ``off`` as text if these are choices.

    Raises:
        ValueError: the value is a boolean, which Python accepts as 0 or 1, and the option is not.
    """
    if not isinstance(value, bool) or annotation is bool or bool in get_args(annotation):
        return value
    choices = {choice for part in (annotation, *get_args(annotation)) for choice in get_args(part)}
    if (choice := "on" if value else "off") in choices:
        return choice
    raise ValueError("must not be yes or no")
