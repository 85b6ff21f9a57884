"""``run.json``: what a run has done and found, with a checksum, and once more beside it."""

import logging
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from ..errors import UsageError
from ..sealed import read_sealed, write_sealed

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
