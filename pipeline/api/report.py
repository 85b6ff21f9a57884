"""Write a run's report again from its folder, and the JSON schema of reports (`compress report`)."""

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from ..errors import UsageError
from ..report.write import write_report
from ..runs.folder import RunFolder
from ..runs.results import SCHEMA_VERSION, Report

SCHEMA = "https://json-schema.org/draft/2020-12/schema"


def report_again(folder: str | Path, out: str | Path | None = None) -> tuple[Report, list[Path]]:
    """Write report.html, report.md and report.json of a run anew, into its own folder or another.

    Returns:
        What report.json holds, and the files that were written.

    Raises:
        UsageError: the folder holds no run, or no stage of it is done.
        JobError: the files cannot be written, or another process works on the run.
    """
    from ..stages import report

    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise UsageError(f"{folder} holds no run: name a folder that compress has made.")
    run = RunFolder(folder, writes=False)
    run.open(fresh=False)
    if not run.record["stages"]:
        raise UsageError(
            f"{folder} holds a run of which nothing is done yet: repeat the command that began it "
            f"({run.record.get('command', 'compress …')})."
        )
    if out is None:
        out = folder
        with RunFolder(folder).locked():
            found = report.write(run)
    else:
        out = Path(out)
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file; name a folder.")
        found = report.assemble(run)
        write_report(found, out)
    return found, [out / name for name in report.FILES]


class _Schema(GenerateJsonSchema):
    def float_schema(self, schema: Any) -> JsonSchemaValue:
        """A number that is not finite is a text in JSON, see ``scores.Result``."""
        return {**super().float_schema(schema), "type": ["number", "string"], "pattern": "^(NaN|-?Infinity)$"}


def schema() -> str:
    """The JSON schema of report.json, as docs/report.schema.json holds it."""
    made = Report.model_json_schema(mode="serialization", schema_generator=_Schema)
    titled = {"$schema": SCHEMA, **made, "title": f"questpress report, schema version {SCHEMA_VERSION}"}
    return json.dumps(titled, indent=2, ensure_ascii=False) + "\n"
