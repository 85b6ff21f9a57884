"""JSON files with the checksum of what they say: damage and careless edits are found when they are read."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from . import bounded_json
from .runs.files import digest, write_text

R = TypeVar("R", bound=BaseModel)

CHECKSUM = "checksum"
"""The key of it: the SHA-256 of all the rest in its canonical form (``files.digest``)."""


def sealed(content: Any) -> dict[str, Any]:
    """A JSON object with its checksum as the last entry."""
    plain = json.loads(json.dumps(content))  # as a reader gets it
    plain.pop(CHECKSUM, None)
    return {**plain, CHECKSUM: _of(plain)}


def write_sealed(path: Path, content: Any) -> None:
    """Write a JSON object with its checksum, whole or not at all.

    Raises:
        JobError: the place cannot be written.
    """
    write_text(path, json.dumps(sealed(content), indent=2, ensure_ascii=False) + "\n")


def read_sealed(path: Path) -> Any:
    """What was written; files of older versions have no checksum, and are read as they are.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, is too large or nested too deep, or is not as it was written.
    """
    content = bounded_json.read(path)
    if isinstance(content, dict) and content.get(CHECKSUM) not in (None, _of(content)):
        raise ValueError("it is not as it was written: its checksum does not hold")
    return content


def with_checksum(result: R) -> R:
    """A result that is written as JSON, with the checksum of that in its field ``checksum``."""
    said = json.loads(result.model_dump_json())
    return result.model_copy(update={CHECKSUM: _of(said)})


def _of(content: dict[str, Any]) -> str:
    return digest({key: value for key, value in content.items() if key != CHECKSUM})
