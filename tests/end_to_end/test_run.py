"""`compress run` on small networks: its outputs, and what a second run repeats."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import questpress.pipeline
import yaml
from questpress.export.artifact import runtime_files
from questpress.pipeline.config.options import STAGES
from questpress.pipeline.runs.results import Report

from tests.support import little
from tests.support.little import compress, files, job, record, refused, report, weights

# Files that a repeated run rewrites even if none is missing: the options and the command.
REWRITTEN = ("config.yaml", "run.json", ".run.json")
CALLED = (*REWRITTEN, "report.html", "report.md", "report.json")


def test_run_folder_has_the_documented_files(finished):
    names = set(files(finished))
    assert names >= {
        "config.yaml", "run.json", "teacher.safetensors", "student.safetensors", "metrics.jsonl",
        "bench/teacher.onnx", "bench/latency.npz",
        "artifact/student.onnx", "artifact/student.int8.onnx", "artifact/manifest.json",
        "report.html", "report.md", "report.json",
    }  # fmt: skip
    assert {name for name in names if name.startswith("artifact/")} == {
        "artifact/student.onnx",
        "artifact/student.int8.onnx",
        "artifact/manifest.json",
        "artifact/selftest.json",
        "artifact/labels.txt",
        "artifact/README.md",
        *(f"artifact/{name}" for name in runtime_files()),
    }
    assert not [name for name in names if name.startswith("checkpoint/") or ".part" in name]


def test_terminal_shows_a_line_for_each_stage(finished):
    lines = (finished.parent / "stderr.txt").read_text().splitlines()
    done = [line.split()[1] for line in lines if line.startswith("✓")]
    assert done == list(STAGES)
    end = (finished.parent / "stdout.txt").read_text()
    assert str(finished / "report.html") in end.replace("\n", "")
    assert str(finished / "artifact") in end.replace("\n", "")


def test_built_in_digits_are_named_as_such_in_one_line(digits):
    first = (digits.parent / "stderr.txt").read_text().splitlines()[0]
    assert "built-in" in first and "--data" in first


def test_digits_are_split_80_10_10_percent(digits):
    data = report(digits)["data"]
    assert (data["train"], data["val"], data["test"]) == (1439, 179, 179)
    assert all(min(counts.values()) > 0 for counts in data["per_class"].values())


@pytest.mark.parametrize("subject", ["teacher", "student", "student_int8"])
def test_report_has_all_fields_of_each_subject(digits, subject):
    content = report(digits)[subject]
    accuracy = content["score"]
    assert accuracy["n"] == 179
    assert accuracy["percent"] == pytest.approx(100 * accuracy["correct"] / 179)
    assert accuracy["low"] < accuracy["percent"] < accuracy["high"]
    file = digits / content["file"]
    assert content["bytes"] == file.stat().st_size and file.suffix == ".onnx"
    assert set(content["latency_ms"]) == {"1", "2"}
    for latency in content["latency_ms"].values():
        p50, p90 = (latency["percentiles"][name]["value"] for name in ("p50", "p90"))
        assert 0 < p50 <= p90 and latency["n"] >= 20


def test_report_names_its_schema_its_teachers_and_the_parity_of_the_export(digits):
    content = report(digits)
    assert content["schema_version"] == 3
    assert [teacher["name"] for teacher in content["teachers"]] == [little.TEACHER]
    assert content["teachers"][0] == content["teacher"]
    parity = content["student"]["parity"]
    assert min(parity["max_abs"], parity["max_rel"]) <= 1e-4
    Report.model_validate(content)


def test_teacher_of_the_digits_is_trained_from_scratch_and_learns(digits):
    teacher = report(digits)["teacher"]
    assert teacher["weights"] == "scratch"
    assert teacher["score"]["percent"] > 50
    curve = [e for e in report(digits)["epochs"] if e["stage"] == "teacher"]
    assert [e["epoch"] for e in curve] == [1, 2, 3]
    assert curve[-1]["losses"]["loss"] < curve[0]["losses"]["loss"]


def test_students_losses_add_up_in_every_epoch(digits):
    curve = [e for e in report(digits)["epochs"] if e["stage"] == "student"]
    assert len(curve) == 2
    for epoch in curve:
        assert set(epoch["losses"]) == {"loss", "ce", "quest"}
        assert epoch["losses"]["loss"] == pytest.approx(epoch["losses"]["ce"] + epoch["losses"]["quest"])
        assert {"perplexity", "max_p_t", "word_accuracy", "gamma"} <= set(epoch["metrics"])


def test_report_has_words_features_and_perplexity(digits):
    [words] = report(digits)["words"]
    assert words["words"] == words["requested"] == 64
    # 16 pixels over a stride of 4: a grid of 4 × 4 positions.
    assert words["features"] == words["features_used"] == 1439 * 16
    assert 1 < words["perplexity"] <= 64


def test_int8_file_is_smaller_and_the_manifest_has_both_checksums(digits):
    import hashlib

    manifest = json.loads((digits / "artifact/manifest.json").read_text())
    by_name = {entry["name"]: entry for entry in manifest["files"]}
    assert set(by_name) == {"student.onnx", "student.int8.onnx"}
    for name, entry in by_name.items():
        content = (digits / "artifact" / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["bytes"] == len(content)
        assert {"top1", "n", "low", "high"} <= set(entry["accuracy"])
    assert manifest["labels"] == [str(digit) for digit in range(10)]
    assert manifest["origin"]["method"] == "quest"
    assert manifest["origin"]["teachers"][0]["name"] == little.TEACHER
    assert by_name["student.int8.onnx"]["bytes"] < by_name["student.onnx"]["bytes"] / 2.5


@pytest.mark.parametrize("place", ["", "artifact", "artifact/student.int8.onnx", "artifact/student.onnx"])
def test_predict_accepts_run_artifact_or_file(finished, data, tmp_path, place):
    source = finished / place
    if source.is_file():  # alone: without the rest of the artifact
        source = Path(shutil.copy(source, tmp_path))
    image = next((data / "red").iterdir())
    result = compress("predict", source, image, data / "blue" / "000.png", "--json", "--top", "3")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(image), str(data / "blue" / "000.png")]
    for line in lines:
        assert {entry["label"] for entry in line["top"]} == set(little.CLASSES)
        probabilities = [entry["probability"] for entry in line["top"]]
        assert math.isclose(sum(probabilities), 1, abs_tol=1e-6)
        assert probabilities == sorted(probabilities, reverse=True)


def test_predict_with_swapped_arguments_is_refused(finished, data):
    photo = data / "red" / "000.png"
    refused(compress("predict", photo, finished), 2, "is an image", "compress predict RUN 000.png")


def test_predict_reports_an_unreadable_image_and_continues(finished, data, tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    result = compress("predict", finished, tmp_path / "text.jpg", data / "red" / "000.png")
    assert result.exit_code == 1
    assert "text.jpg" in result.stderr and "Traceback" not in result.stderr
    assert len(result.stdout.splitlines()) == 1 and "000.png" in result.stdout


def test_predict_without_an_artifact_is_refused(tmp_path):
    refused(compress("predict", tmp_path, "a.png"), 2, str(tmp_path))
    refused(compress("predict", tmp_path / "none", "a.png"), 2, "none")


def test_second_run_of_the_same_command_changes_nothing(a_run, data, cache):
    job(data, a_run, cache)  # whose report names this copy
    before, stages = files(a_run, REWRITTEN), record(a_run)["stages"]
    result = little.check_success(job(data, a_run, cache))
    assert files(a_run, REWRITTEN) == before
    assert record(a_run)["stages"] == stages
    assert result.stderr.count("(kept)") == len(STAGES)


def test_moved_data_folder_with_the_same_images_is_the_same_data(a_run, data, cache, tmp_path):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    assert job(moved, a_run, cache).stderr.count("(kept)") == len(STAGES)


def test_other_options_are_refused_and_the_difference_is_named(a_run, data, cache):
    before = files(a_run)
    line = refused(job(data, a_run, cache, "--epochs", "3"), 2, "epochs", "2", "3", "--fresh")
    assert "teacher-epochs" not in line
    assert files(a_run) == before
    refused(job(data, a_run, cache, "--set", "quest.tau=0.2"), 2, "quest.tau was null, now 0.2")
    line = refused(
        job(data, a_run, cache, "--set", "quest.iterations=5"), 2, "quest.iterations was 20, now 5"
    )
    assert "quest.tau" not in line
    refused(job(data, a_run, cache, "--weight", "ce=0.5"), 2, "weight ce was null, now 0.5")
    refused(job(data, a_run, cache, "--method", "quest", "--seed", "5"), 2, "seed was 0, now 5")


def test_other_images_are_refused(a_run, data, cache, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    little.PillowImage.fromarray(little.picture(2, 999_999)).save(other / "red/another.png")
    refused(job(other, a_run, cache), 2, "images")


@pytest.mark.parametrize("option", [("--until", "export"), ("--device", "cpu"), ("--quiet",), ("--json",)])
def test_options_that_change_no_result_are_not_refused(a_run, data, cache, option):
    before = files(a_run, CALLED)
    little.check_success(job(data, a_run, cache, *option))
    assert files(a_run, CALLED) == before


def test_until_stops_after_its_stage_and_can_resume(data, cache, tmp_path):
    out = tmp_path / "run"
    assert job(data, out, cache, "--until", "prepare").exit_code == 0
    assert list(record(out)["stages"]) == ["teacher", "prepare"]
    assert not (out / "student.safetensors").exists()
    early = report(out)
    assert early["teacher"]["score"]["n"] == 6 and early["student"] is None
    teacher = files(out)["teacher.safetensors"]
    result = job(data, out, cache, "--until", "export")
    assert result.stderr.count("(kept)") == 2
    assert files(out)["teacher.safetensors"] == teacher
    assert list(record(out)["stages"]) == ["teacher", "prepare", "student", "export"]


@pytest.mark.parametrize(
    ("name", "harm", "kept"),
    [
        ("student.safetensors", "damaged", 5),
        ("artifact/student.onnx", "damaged", 3),
        ("artifact/student.int8.onnx", "damaged", 4),
        ("artifact/manifest.json", "deleted", 5),
        ("bench/teacher.onnx", "deleted", 6),
    ],
)
def test_missing_or_damaged_output_is_made_again(a_run, data, cache, tmp_path, name, harm, kept):
    whole = (a_run / name).read_bytes()
    if harm == "deleted":
        (a_run / name).unlink()
    else:
        (a_run / name).write_bytes(whole[:-100])
    until = ("--until", "bench" if name.startswith("bench") else "validate")
    result = little.check_success(job(data, a_run, cache, *until))
    assert result.stderr.count("(kept)") >= kept
    if name.endswith(".safetensors"):
        (tmp_path / "whole.safetensors").write_bytes(whole)
        assert weights(a_run / name) == weights(tmp_path / "whole.safetensors")
    elif name != "artifact/manifest.json":
        assert (a_run / name).read_bytes() == whole
    again = job(data, a_run, cache, *until).stderr
    assert again.count("(kept)") == again.count("✓")


def test_fresh_starts_over_and_gives_the_same_student(a_run, data, cache):
    student = weights(a_run / "student.safetensors")
    result = job(data, a_run, cache, "--fresh", "--until", "student")
    assert "(kept)" not in result.stderr
    assert list(record(a_run)["stages"]) == ["teacher", "prepare", "student"]
    assert weights(a_run / "student.safetensors") == student
    assert len(report(a_run)["epochs"]) == 4


def test_fresh_takes_other_options(a_run, data, cache):
    little.check_success(job(data, a_run, cache, "--fresh", "--seed", "1", "--until", "teacher"))
    assert report(a_run)["config"]["seed"] == 1


def test_another_seed_gives_another_student(finished, data, cache, tmp_path):
    out = tmp_path / "run"
    assert job(data, out, cache, "--seed", "1", "--until", "student").exit_code == 0
    assert weights(out / "student.safetensors") != weights(finished / "student.safetensors")


def test_method_none_trains_the_student_without_a_teachers_loss(data, cache, tmp_path):
    out = tmp_path / "run"
    little.check_success(compress(
        *little.NETWORKS, *little.SMALL, *little.SHORT, "--method", "none", "--data", data, "--out", out,
        "--cache", cache,
    ))  # fmt: skip
    content = report(out)
    assert content["method"] == "none" and content["words"] == []
    student = [e for e in content["epochs"] if e["stage"] == "student"]
    assert all(set(e["losses"]) == {"loss", "ce"} for e in student)
    assert content["student_int8"]["score"]["n"] == 6


def test_runs_config_gives_the_same_run_elsewhere(finished, cache, tmp_path):
    out = tmp_path / "again"
    result = compress(
        "--config", finished / "config.yaml", "--out", out, "--cache", cache, "--until", "student"
    )
    assert result.exit_code == 0, result.output
    assert weights(out / "student.safetensors") == weights(finished / "student.safetensors")
    assert record(out)["config"] == record(finished)["config"]


def test_command_line_wins_over_the_config(finished, cache, tmp_path):
    out = tmp_path / "again"
    little.check_success(compress(
        "--config", finished / "config.yaml", "--out", out, "--cache", cache, "--until", "teacher",
        "--seed", "3", "--teacher-epochs", "1", "--set", "quest.tau=0.2",
    ))  # fmt: skip
    config = yaml.safe_load((out / "config.yaml").read_text())
    before = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config.pop("seed"), config.pop("teacher_epochs")) == (3, 1)
    assert (before.pop("seed"), before.pop("teacher_epochs")) == (0, 2)
    assert config["settings"].pop("quest.tau") == 0.2
    before["settings"].pop("quest.tau", None)
    assert config == before


def test_method_none_on_the_command_line_wins_over_a_config_with_quest(finished, cache, tmp_path):
    out = tmp_path / "again"
    little.check_success(compress(
        "--config", finished / "config.yaml", "--out", out, "--cache", cache, "--until", "teacher",
        "--method", "none",
    ))  # fmt: skip
    assert report(out)["method"] == "none"


def comparable(content: dict[str, Any]) -> Report:
    """Return a report without its command, since this run's folder is a copy."""
    config = {**content["config"], "out": ""}
    return Report.model_validate({**content, "command": "", "config": config})


def test_json_prints_only_the_report(a_run, data, cache):
    result = job(data, a_run, cache, "--json")
    assert comparable(json.loads(result.stdout)) == comparable(report(a_run))


def test_quiet_prints_only_the_result(a_run, data, cache):
    result = job(data, a_run, cache, "--quiet")
    assert result.stderr == "" and "Student int8" in result.stdout


def test_dry_run_estimates_time_and_disk_and_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = little.check_success(job(data, tmp_path / "run", tmp_path / "cache", "--dry-run"))
    assert "minute" in result.stderr and "GB" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_run_folder_is_named_after_teacher_student_and_data(data, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = compress(
        *little.NETWORKS, *little.SMALL, *little.SHORT, "--data", data, "--cache", cache, "--until", "teacher"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / f"{little.TEACHER}-{little.STUDENT}-colors" / "run.json").exists()


def test_python_function_is_the_command_and_returns_the_typed_report(a_run, data, cache):
    returned = questpress.pipeline.compress(
        teacher=little.TEACHER, teacher_weights="none", student=little.STUDENT, data=data, out=a_run,
        cache=cache, image_size=16, batch_size=16, bench_seconds=0.1, calibration_images=16,
        teacher_epochs=2, epochs=2, settings={"quest.words": 8}, quiet=True,
    )  # fmt: skip
    assert isinstance(returned, Report)
    assert comparable(returned.model_dump()) == comparable(report(a_run))
    assert returned.student_int8 is not None and returned.student_int8.score is not None
    assert returned.student_int8.score.n == 6


def test_val_fraction_0_trains_on_everything_but_the_test_images(cache, tmp_path):
    given = little.photos(
        tmp_path / "data", {f"{r}/{c}": n for r, n in (("train", 12), ("val", 4)) for c in little.CLASSES}
    )
    out = tmp_path / "run"
    little.check_success(job(given, out, cache, "--val-fraction", "0", "--until", "validate"))
    content = report(out)
    assert (content["data"]["train"], content["data"]["val"], content["data"]["test"]) == (36, 0, 12)
    assert content["student"]["val_score"] is None and content["student"]["score"]["n"] == 12


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")
def test_run_does_not_depend_on_the_folder_it_is_started_in(a_run, data, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = job(data, Path(os.path.relpath(a_run)), cache)
    assert result.stderr.count("(kept)") == len(STAGES), result.output
