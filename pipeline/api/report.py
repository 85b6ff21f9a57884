"""Write the report of a run again, and the JSON schema of reports (`compress report`)."""

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from ..errors import UsageError
from ..report.assemble import assemble
from ..report.run_report import FILES, write, write_report
from ..runs.files import check_writable
from ..runs.folder import RunFolder
from ..runs.results import SCHEMA_VERSION, Report


def report(folder: str | Path, out: str | Path | None = None) -> tuple[Report, list[Path]]:
    """Write report.html, report.md and report.json of a run again.

    Args:
        folder: a run folder, finished or not.
        out: the folder to write to; the run folder by default.

    Returns:
        The content of report.json, and the files written.

    Raises:
        UsageError: the folder is not a run, or none of its stages is done.
        JobError: the files cannot be written, or another process is using the run.
    """
    run = RunFolder.read(Path(folder))
    if not run.record.stages:
        raise UsageError(
            f"No stage of {folder} is finished. Run the original command again ({run.record.command})."
        )
    if out is None:
        run.writes = True
        with run.locked():
            return write(run), [run.path / name for name in FILES]
    target = Path(out)
    check_writable(target)
    result = assemble(run)
    write_report(result, target)
    return result, [target / name for name in FILES]


class _Schema(GenerateJsonSchema):
    def float_schema(self, schema: Any) -> JsonSchemaValue:
        """Allow the strings of numbers that are not finite, see ``scores.Result``."""
        return {**super().float_schema(schema), "type": ["number", "string"], "pattern": "^(NaN|-?Infinity)$"}


def json_schema() -> str:
    """Return the JSON schema of report.json, which is the content of docs/report.schema.json."""
    schema = Report.model_json_schema(mode="serialization", schema_generator=_Schema)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": f"questpress report, schema version {SCHEMA_VERSION}",
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
