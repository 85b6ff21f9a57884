"""``run.json``: the options and finished stages of a run, with a checksum and a backup copy."""

import json
import logging
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from ..errors import JobError, UsageError
from .files import write_text
from .hashes import digest

_log = logging.getLogger(__name__)

MAX_BYTES = 1 << 28
"""A run of 10,000 classes has a report of about 20 MB."""

MAX_DEPTH = 60

CHECKSUM = "checksum"
"""Key of the SHA-256 of all other entries in canonical form, see ``hashes.digest``."""

SCHEMA_VERSION = 1
RECORD = "run.json"
BACKUP = ".run.json"
"""Read if ``run.json`` is damaged: without a record, days of training would be lost."""

R = TypeVar("R", bound=BaseModel)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or raise ValueError if it is too large; see ``parse_json``."""
    with path.open("rb") as file:
        _check_size(os.fstat(file.fileno()).st_size)
        return parse_json(file.read(MAX_BYTES).decode("utf-8"))


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")


def parse_json(text: str) -> Any:
    """Return the content of a JSON text, or raise ValueError if it is not JSON or too deeply nested."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level, depth = [content], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        level = [part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer)]
    return content


def check_readable(path: Path, text: str) -> None:
    """Raise JobError if a JSON text for ``path`` exceeds the limits of ``read_json``."""
    try:
        _check_size(len(text.encode()))
        parse_json(text)
    except ValueError as error:
        raise JobError(f"{path} could not be read again ({error}) and is not written.") from error


def _compute_checksum(content: dict[str, Any]) -> str:
    return digest({key: value for key, value in content.items() if key != CHECKSUM})


def add_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum as the last entry."""
    content = json.loads(json.dumps(content))  # with the keys that a reader gets
    return {**content, CHECKSUM: _compute_checksum(content)}


def with_checksum(result: R) -> R:
    """Return a result with the checksum of its JSON form in its field ``checksum``."""
    return result.model_copy(update={CHECKSUM: _compute_checksum(json.loads(result.model_dump_json()))})


def read_checked(path: Path) -> Any:
    """Return the content of a JSON file, or raise ValueError if its checksum is wrong; see ``read_json``."""
    content = read_json(path)
    if isinstance(content, dict) and content.get(CHECKSUM) not in (None, _compute_checksum(content)):
        raise ValueError("its checksum does not match")
    return content


def _check_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} is outside the run folder")
    return name


class StageEntry(BaseModel):
    """A finished stage. Written by ``RunFolder.finish``."""

    key: str
    summary: str
    seconds: float
    finished: str = ""
    outputs: dict[Annotated[str, AfterValidator(_check_inside)], str]
    """SHA-256 of each file, by its path in the run folder."""
    warnings: list[str]
    curves: str = ""
    """SHA-256 of the stage's lines in ``metrics.jsonl``."""
    facts: dict[str, Any]


class EngineEntry(BaseModel):
    """The engine of a training (see ``device.Engine``). Written by ``training/trainer.py``."""

    key: str
    device: str
    name: str
    """Name of the GPU or processor."""
    threads: int
    raced_threads: int | None = None
    """The number before other load on the machine changed it; None if it has not been changed."""
    precision: str
    layout: str
    compile: str
    heads: str
    trial: dict[str, float] | None = None
    """Images per second of each engine that was timed; None before that."""


class MicroBatchEntry(BaseModel):
    """The micro-batch that fits into memory. Written by ``training/trainer.py``."""

    key: str
    size: int


class TrackerEntry(BaseModel):
    """A tracker's run for a training. Written by ``training/trackers.py``."""

    key: str
    run: str


class _StageOptions(BaseModel):
    rounds: Annotated[int, Field(ge=1, le=1000)] = 1
    qat: bool = False
    baseline: bool = False


def _check_stage_options(config: dict[str, Any]) -> dict[str, Any]:
    _StageOptions.model_validate(config)
    return config


class RunRecord(BaseModel):
    """The content of ``run.json``. Sections without a writer here are written by ``RunFolder``."""

    schema_version: int = SCHEMA_VERSION
    config: Annotated[dict[str, Any], AfterValidator(_check_stage_options)] = {}
    """The options that enter the stages' keys."""
    options: dict[str, Any] = {}
    """The options of ``config.yaml``."""
    command: str = ""
    tools: dict[str, str] = {}
    """Versions of Python and packages. Written by ``api/run.py``."""
    stages: dict[str, StageEntry] = {}
    engines: dict[str, EngineEntry] = {}
    micro_batches: dict[str, MicroBatchEntry] = {}
    trackers: dict[str, TrackerEntry] = {}
    threads: int | None = None
    """Number of threads of the last command (``--threads``); that of each training is in ``engines``."""
    placement: str | None = None
    """Where training images are kept (``--resident``). Written by ``training/context.py``."""


def write_record(run: Path, record: RunRecord) -> None:
    """Write ``run.json`` and its backup."""
    text = json.dumps(add_checksum(record.model_dump()), indent=2, ensure_ascii=False) + "\n"
    check_readable(run / RECORD, text)
    for name in (RECORD, BACKUP):
        write_text(run / name, text)


def read_record(run: Path) -> RunRecord:
    """Return the record of a run, from the backup if ``run.json`` is damaged, or raise UsageError.

    An OSError of the machine is raised as it is: it is no sign of damage.
    """
    file = run / RECORD
    try:
        content = read_checked(file)
    except (FileNotFoundError, ValueError) as error:
        try:
            content = read_checked(run / BACKUP)
        except (FileNotFoundError, ValueError):
            raise UsageError(
                f"{file} cannot be read ({error}). Set another --out, or start the run over with --fresh."
            ) from error
        _log.warning("%s is damaged (%s). Its backup %s is used.", file, error, BACKUP)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{file} was written by another version of questpress. Set another --out.")
    try:
        return RunRecord.model_validate({key: value for key, value in content.items() if key != CHECKSUM})
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{file} is not valid ({location}: {first['msg']}). Set another --out.") from error
