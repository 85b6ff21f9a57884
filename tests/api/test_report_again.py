import json
from pathlib import Path

from questpress.export.artifact import runtime_files
from questpress.pipeline.api.report import json_schema
from questpress.pipeline.runs.folder import RunFolder
from questpress.pipeline.runs.results import Report

from tests.support import little

RUNTIME = [f"artifact/{name}" for name in runtime_files()]

DOCS = Path(__file__).parents[2] / "docs"


def test_schema_in_docs_is_current() -> None:
    """To update it: compress report --schema > docs/report.schema.json."""
    assert (DOCS / "report.schema.json").read_text(encoding="utf-8") == json_schema()


def test_schema_describes_every_field(finished: Path) -> None:
    made = json.loads(json_schema())
    assert set(made["properties"]) == set(Report.model_fields)
    assert set(little.report(finished)) <= set(made["properties"])
    assert made["properties"]["confusion"]["description"].startswith("(index of the true class")


def test_command_prints_the_schema_alone() -> None:
    assert little.compress("report", "--schema").stdout == json_schema()
    assert little.compress("report", "--schema", "somewhere").exit_code == 2


def test_report_is_rendered_again_from_the_run_folder(a_run: Path) -> None:
    names = ("report.html", "report.md", "report.json", "artifact/README.md", *RUNTIME)
    before = {name: (a_run / name).read_bytes() for name in names}
    for name in names:
        (a_run / name).unlink()
    done = little.check_success(little.compress("report", a_run))
    assert done.stdout.splitlines() == [str(a_run / name) for name in names[:3]]
    # Paths of the run folder apart, which was copied, they are the same.
    assert before["artifact/README.md"] == (a_run / "artifact/README.md").read_bytes()
    assert all(before[name] == (a_run / name).read_bytes() for name in RUNTIME)
    assert json.loads(before["report.json"]).keys() == little.report(a_run).keys()


def test_report_of_an_unfinished_run_is_rendered(a_run: Path) -> None:
    record = little.record(a_run)
    for stage in list(record["stages"])[2:]:
        del record["stages"][stage]
    (a_run / "run.json").write_text(json.dumps(record))
    assert little.compress("report", a_run, "--quiet").stdout == ""
    assert little.report(a_run)["student_int8"] is None
    assert "Not in this report yet: student" in (a_run / "report.md").read_text(encoding="utf-8")


def test_report_in_another_folder_leaves_the_run_unchanged(a_run: Path, tmp_path: Path) -> None:
    before = little.files(a_run)
    done = little.compress("report", a_run, "--out", tmp_path / "new" / "place", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["title"] == little.report(a_run)["title"]
    assert sorted(file.name for file in (tmp_path / "new" / "place").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert little.files(a_run) == before


def test_versions_in_the_report_are_those_of_the_measurement(a_run: Path) -> None:
    record = little.record(a_run)
    record["tools"]["torch"] = "0.1.2"
    (a_run / "run.json").write_text(json.dumps(record))
    little.compress("report", a_run)
    assert little.report(a_run)["environment"]["torch"] == "0.1.2"


def test_folder_without_a_run_is_refused(tmp_path: Path, a_run: Path) -> None:
    little.refused(little.compress("report", tmp_path), 2, "is not a run folder")
    file = tmp_path / "file"
    file.touch()
    little.refused(little.compress("report", a_run, "--out", file), 2, "Not a directory")
    for name in ("run.json", ".run.json"):
        (a_run / name).write_text("{")
    little.refused(little.compress("report", a_run), 2, "run.json cannot be read")
    started = tmp_path / "started"
    started.mkdir()
    (started / "run.json").write_text(
        json.dumps({"schema_version": 1, "stages": {}, "command": "compress -x"})
    )
    little.refused(little.compress("report", started), 2, "No stage of", "compress -x")


def test_changed_manifest_is_reported(a_run: Path) -> None:
    manifest = a_run / "artifact" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("colors", "shapes"))
    little.refused(little.compress("report", a_run), 1, "was modified after it was written")


def test_stage_no_longer_requested_is_omitted(a_run: Path) -> None:
    folder = RunFolder(a_run)
    folder.open(fresh=False)
    student = folder.record.stages["student"]
    line = json.dumps(json.loads(folder.curves()[-1]) | {"stage": "qat"})
    folder.record.stages["qat"] = student.model_copy(update={"summary": "trained further as int8"})
    folder.save()
    (a_run / "metrics.jsonl").write_text((a_run / "metrics.jsonl").read_text() + line + "\n")
    assert little.compress("report", a_run).exit_code == 0
    report = json.loads((a_run / "report.json").read_text())
    assert all(row["stage"] != "qat" for row in (*report["stages"], *report["epochs"]))
    assert "trained further as int8" not in (a_run / "report.md").read_text()
