"""``run.json``: what a run has done and found, with a checksum, and once more beside it."""

import logging
from pathlib import Path
from typing import Any

from .errors import UsageError
from .sealed import read_sealed, write_sealed

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RECORD = "run.json"
COPY = ".run.json"
"""It stands in where the first is damaged: without its record, days of training would be lost."""


def write_record(run: Path, record: dict[str, Any]) -> None:
    for name in (RECORD, COPY):
        write_sealed(run / name, record)


def read_record(run: Path) -> dict[str, Any]:
    """
    Raises:
        UsageError: neither file is as it was written, or another version has written them.
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
    return record


def _copy(run: Path) -> Any:
    try:
        return read_sealed(run / COPY)
    except (OSError, ValueError):
        return None
