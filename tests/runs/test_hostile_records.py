"""Invalid records of runs, benches and the cache: one error each, and no other file is read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from questpress.pipeline.api.cache import list_cache
from questpress.pipeline.errors import JobError, UsageError
from questpress.pipeline.runs import record as bounded_json
from questpress.pipeline.runs.cache import Cache
from questpress.pipeline.runs.folder import RunFolder
from questpress.pipeline.runs.record import add_checksum
from questpress.pipeline.runs.results import Subject

from tests.support.little import compress, refused

STAGE = {"key": "k", "summary": "s", "seconds": 1.0, "outputs": {}, "warnings": [], "facts": {}}
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]


def record(**more: Any) -> dict[str, Any]:
    return {"schema_version": 1, "stages": {"teacher": STAGE}, "config": {}, "command": "compress", **more}


def stage(**more: Any) -> dict[str, Any]:
    return record(stages={"teacher": {**STAGE, **more}})


def run(folder: Path, content: Any) -> Path:
    """A run folder with a record whose checksum holds."""
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(add_checksum(content))
    (folder / "run.json").write_text(text)
    (folder / "config.yaml").write_text("teacher: a\nstudent: b\ndata: digits\n")
    return folder


TEACHER = {"name": "resnet18", "weights": "scratch"}
WORDS = {
    "teacher": "a", "words": 3, "requested": 3, "features": 9, "features_used": 9, "perplexity": 3.0,
    "mu": 1.0,
}  # fmt: skip
SCORE = {"metric": "accuracy", "percent": 50.0, "low": 20.0, "high": 80.0, "n": 10}
BIN = {"low": 0.0, "high": 10.0, "n": 10, "confidence": 5.0, "accuracy": 5.0}
CALIBRATION = {
    "ece": 0.0, "ece_low": 0.0, "ece_high": 1.0, "confidence": 5.0, "accuracy": 5.0, "gap_low": 0.0,
    "gap_high": 0.0, "entropy": 1.0, "nll": 1.0, "n": 10, "bins": [BIN],
}  # fmt: skip

HOSTILE = [
    record(schema_version=2), record(schema_version="1"), record(stages=[]), record(stages={"teacher": 1}),
    stage(facts=[]), stage(outputs=["a"]), stage(outputs={"../../etc/passwd": "0"}),
    stage(outputs={"/etc/passwd": "0"}), stage(outputs={"a\0b": "0"}), stage(warnings="none"),
    record(config={"rounds": 10**12}), record(config={"rounds": "many"}), record(config=[]),
    record(engines={"teacher": 3}), record(command=["rm"]), record(deep=DEEP), "[" * 200_000, "null", "\x00",
    "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_invalid_record_is_refused_by_every_command(content: Any, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", content)
    (folder / "artifact").mkdir()
    (folder / "artifact" / "manifest.json").write_text("{}")
    for command in ("report", "export", "compare"):
        assert "run.json" in refused(compress(command, folder), 2)


@pytest.mark.parametrize(
    "facts",
    [
        {"teacher": 3},
        {"data": {"name": 1}},
        {"int8": {}},
        {"unknown": 1},
        {"environment": 3},
        {"teacher": {"name": "x\x1b[2J", "accuracy": "high"}},
        {"words": [{**WORDS, "features_used": 0}]},
        {"teacher": {**TEACHER, "bytes": -1}},
        {"teacher": {**TEACHER, "parameters": 10**400}},
        {"teacher": {**TEACHER, "gmacs": 1e308}},
        {"teacher": {**TEACHER, "score": {**SCORE, "high": math.inf}}},
        {"teacher": {**TEACHER, "score": {**SCORE, "low": math.nan}}},
        {"teacher": {**TEACHER, "score": {**SCORE, "correct": 11}}},
        {"teacher": {**TEACHER, "calibration": {**CALIBRATION, "bins": [{**BIN, "n": 10**19}]}}},
        {"teacher": {**TEACHER, "calibration": {**CALIBRATION, "bins": [{**BIN, "accuracy": None}]}}},
        {"teacher": {**TEACHER, "calibration": {**CALIBRATION, "bins": [{**BIN, "accuracy": 200.0}]}}},
    ],
)
def test_invalid_results_are_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    folder = run(tmp_path / "run", stage(facts=facts))
    refused(compress("report", folder), 2, "the record of the run cannot be read")


def test_result_with_plausible_numbers_is_accepted() -> None:
    Subject.model_validate({**TEACHER, "bytes": 10, "score": SCORE, "calibration": CALIBRATION})


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "[]", "{}", '{"schema_version": 99}', "9" * 5000, json.dumps(DEEP)]
)
def test_invalid_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    for place in (tmp_path, tmp_path / "report.json"):
        assert "report.json" in refused(compress("compare", place, "--out", tmp_path / "out"), 2)


def test_no_record_is_read_without_end(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", record())
    with (folder / "run.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="more than 268,435,456 bytes"):
        RunFolder(folder, writes=False).open(fresh=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "too deeply"),
        ("[" * 61 + "]" * 61, "too deeply"),
        ("{", "Expecting"),
        ("9" * 5000, "digits"),
    ],
)
def test_invalid_json_is_a_value_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounded_json.parse_json(text)
    assert bounded_json.parse_json("[" * 60 + "]" * 60)


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_DEPTH"])
def test_record_that_could_not_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    small, large = (bounded_json.RunRecord(command="compress", tools=tools) for tools in ({}, {"torch": "2"}))
    large.config = {"settings": {"kd": {"t": 1}}}
    bounded_json.write_record(tmp_path, small)
    size = {"MAX_BYTES": (tmp_path / "run.json").stat().st_size, "MAX_DEPTH": 2}[limit]
    monkeypatch.setattr(bounded_json, limit, size)
    with pytest.raises(JobError, match=r"run\.json could not be read again \(it "):
        bounded_json.write_record(tmp_path, large)
    assert bounded_json.read_record(tmp_path) == small


def about(**more: Any) -> dict[str, Any]:
    content = {"teacher": "t", "data": "d", "source": "s", "images": 2, "view": 0, "bytes_per_image": 4}
    return {**content, "output": {"readout": "logits"}, "lost_mass": None, **more}


@pytest.mark.parametrize(
    "content",
    [
        [],
        about(teacher=3),
        about(output={}),
        about(output=[]),
        about(images="many"),
        about(lost_mass="much"),
        about(view=None),
        about(source=DEEP),
        "[" * 200_000,
    ],
)
def test_entry_of_the_store_of_another_form_is_counted_as_unreadable(content: Any, tmp_path: Path) -> None:
    for name, entry in (("a", about()), ("b", content)):
        (tmp_path / "teacher-outputs" / name).mkdir(parents=True)
        text = entry if isinstance(entry, str) else json.dumps(entry)
        (tmp_path / "teacher-outputs" / name / "about.json").write_text(text)
    outputs, unreadable = list_cache(tmp_path)
    assert len(outputs) == 1 and unreadable == 1
    assert "1 entry cannot be read" in compress("cache", "list", "--cache", tmp_path).stdout


def test_cache_listing_has_no_control_characters(tmp_path: Path) -> None:
    (tmp_path / "teacher-outputs" / "a").mkdir(parents=True)
    (tmp_path / "teacher-outputs" / "a" / "about.json").write_text(
        json.dumps(about(teacher="t\x1b[2J\u202e"))
    )
    output = compress("cache", "list", "--cache", tmp_path).stdout
    assert "t\\x1b[2J" in output and "\x1b" not in output and "\u202e" not in output


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", '"x"', "null", "{}", '{"../../x": "0"}', '{"a": []}'])
def test_checksums_of_another_form_are_a_damaged_entry(text: str, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "a").write_text("b")

    cache = Cache(tmp_path)
    entry = cache.put("kind", "key", write)
    (entry / "sha256.json").write_text(text)
    assert cache.get("kind", "key") is None and not entry.exists()
