"""JSON that somebody else may have written: no more of it, and no deeper, than ours is."""

import json
import os
from pathlib import Path
from typing import Any

LARGEST = 1 << 28
"""Bytes. A report of a thousand classes with its pictures has some ten million."""

DEEPEST = 60
"""Lists and objects inside each other."""


def read(path: Path) -> Any:
    """What a file holds, UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or is too large or too deep.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        return loads(file.read(LARGEST).decode("utf-8"))


def loads(text: str) -> Any:
    """
    Raises:
        ValueError: it is no JSON, or too deep.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("it is nested too deep")
        level = [inner for one in level for inner in _children(one) if isinstance(inner, dict | list)]
    return content


def _children(content: Any) -> Any:
    if isinstance(content, dict):
        return content.values()
    return content if isinstance(content, list) else ()
