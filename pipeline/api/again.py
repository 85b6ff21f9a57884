"""`compress report`: the report of a run from its folder alone, and the schema of its JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from rich.table import Table
from rich.text import Text

from ...export.errors import ExportError
from ...export.predict_cli import ask
from ...export.runtime import ArtifactError, Classifier
from ...models.catalogue import describe
from ...models.errors import ModelError, UnknownModel
from ...models.names import matching, nearest
from ..data.sources.folders import EXTENSIONS
from ..errors import UsageError
from ..report.write import write_report
from ..runs.console import safe_console
from ..runs.folder import RunFolder, read_config, refuse_unfinished
from ..runs.results import SCHEMA_VERSION, Report
from .run import compress


def export_again(folder: str | Path, **options: Any) -> Report:
    """Do a run's stages from export on with other options of theirs; the teacher and the student stay.

    Raises:
        UsageError: the folder holds no run, one whose student is not finished, or other options than those.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise UsageError(f"{folder} holds no run: name a folder that compress has made.")
    run = RunFolder(folder, writes=False)
    run.open(fresh=False)
    if "student" not in run.record["stages"]:
        raise UsageError(
            f"{folder} holds a run whose student is not finished: repeat the command that began it, without "
            f"--until ({run.record.get('command', 'compress …')})."
        )
    read_config(folder)  # as the run has left it
    return compress(config=folder / "config.yaml", out=folder, **options)


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


def predict(
    artifact: Path,
    images: Sequence[Path],
    *,
    top: int,
    file: str | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """Print each image's labels and probabilities, of a folder those of all images below it; the number of
    images that could not be read.

    Raises:
        UsageError: the artifact cannot be loaded.
    """
    refuse_unfinished(artifact)
    if artifact.suffix.lower() in EXTENSIONS and artifact.is_file():
        raise UsageError(
            f"{artifact} is an image: name the run or its artifact first, then the images, as in "
            f"compress predict RUN {artifact.name}."
        )
    if artifact.is_file() and file is not None:
        raise UsageError(f"--file chooses a file of an artifact; {artifact} is one already.")
    try:
        if artifact.is_file():
            from ...export.conversion.untrusted import read_foreign  # with onnx, which the folders do without

            content, _ = read_foreign(artifact)
            classifier = Classifier(content, artifact.name, threads=threads)
        else:
            classifier = Classifier.load(artifact, file=file, threads=threads)
    except (ArtifactError, ExportError) as error:
        raise UsageError(f"{error}.") from error
    return ask(classifier, images, top=top, as_json=as_json)


COUNTED = 60
"""Up to so many networks are built (without memory) to count their parameters and GMACs."""


def list_models(pattern: str, image_size: int | None) -> None:
    """Print the networks that match.

    Raises:
        UsageError: none does.
    """
    names = matching(pattern)
    if not names:
        near = nearest(pattern.strip("*?"))
        advice = f" The nearest are {', '.join(near)}." if near else ""
        raise UsageError(f"No model matches '{pattern}'.{advice}")
    console = safe_console(highlight=False)
    if len(names) > COUNTED:
        for name in names:
            console.print(Text(name))
        console.print(
            f"{len(names)} networks; a narrower pattern ({COUNTED} or fewer) shows their sizes.", style="dim"
        )
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    for column in ("parameters", "GMACs", "image size"):
        table.add_column(column, justify="right")
    table.add_column("pretrained weights")
    for name in names:
        try:
            entry = describe(name, image_size)
        except UnknownModel:
            raise
        except ModelError as error:
            table.add_row(Text(name), "", "", "", Text(str(error)))
            continue
        shown = entry.name if entry.name == name else f"{name} = {entry.name}"
        licence = (entry.licence or "licence not stated") if entry.has_weights else "none"
        table.add_row(
            Text(shown),
            f"{entry.parameters / 1e6:.2f} M",
            "–" if entry.gmacs is None else f"{entry.gmacs:.3f}",
            str(entry.image_size),
            licence,
        )
    console.print(table)
