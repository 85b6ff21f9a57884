"""``run.json``: what a run has done and found, with a checksum, and once more beside it."""

import json
import os
from pathlib import Path
from typing import Any
from typing import Any, TypeVar
from pydantic import BaseModel
from .files import digest, write_text
import logging
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from ..errors import UsageError



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
    content = read(path)
    if isinstance(content, dict) and content.get(CHECKSUM) not in (None, _of(content)):
        raise ValueError("it is not as it was written: its checksum does not hold")
    return content


def with_checksum(result: R) -> R:
    """A result that is written as JSON, with the checksum of that in its field ``checksum``."""
    said = json.loads(result.model_dump_json())
    return result.model_copy(update={CHECKSUM: _of(said)})


def _of(content: dict[str, Any]) -> str:
    return digest({key: value for key, value in content.items() if key != CHECKSUM})


_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RECORD = "run.json"
COPY = ".run.json"
"""It stands in where the first is damaged: without its record, days of training would be lost."""


def _inside(name: str) -> str:
    """A file of the run, and nothing outside of its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} is not in the run's folder")
    return name


class _Stage(BaseModel):
    key: str
    summary: str
    seconds: float
    outputs: dict[Annotated[str, AfterValidator(_inside)], str]
    warnings: list[str]
    curve: list[str] = []
    facts: dict[str, Any]


class _Config(BaseModel):
    rounds: Annotated[int, Field(ge=1, le=1000)] = 1
    qat: bool = False


class _Record(BaseModel):
    """The form of a record, as far as it is read without asking."""

    stages: dict[str, _Stage]
    config: _Config = _Config()
    command: str = ""
    options: dict[str, Any] = {}
    tools: dict[str, str] = {}
    engines: dict[str, dict[str, Any]] = {}
    micro_batches: dict[str, Any] = {}


def write_record(run: Path, record: dict[str, Any]) -> None:
    for name in (RECORD, COPY):
        write_sealed(run / name, record)


def read_record(run: Path) -> dict[str, Any]:
    """
    Raises:
        UsageError: neither file is as it was written, another version has written them, or somebody else.
    """
    file = run / RECORD
    try:
        record = read_sealed(file)
    except (OSError, ValueError) as error:
        record = _copy(run)
        if record is None:
            raise UsageError(
                f"{file} cannot be read as a run's record ({error}); name another --out, or start this one "
                "over with --fresh."
            ) from error
        _log.warning("%s is damaged (%s): its copy %s is read instead.", file, error, COPY)
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{file} was not written by this version of questpress; name another --out.")
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{file} is no record that compress has written ({where}: {first['msg']}); name another --out."
        ) from error
    return record


def _copy(run: Path) -> Any:
    try:
        return read_sealed(run / COPY)
    except (OSError, ValueError):
        return None
