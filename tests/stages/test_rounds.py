"""Sequential rounds of distillation, in which each student teaches the next one."""

from pathlib import Path
from typing import Any

import pytest
from questpress.pipeline.config.stages import get_round, list_stages
from questpress.pipeline.stages import student
from questpress.pipeline.training import trackers

from tests.support import little
from tests.support.little import job, record, refused, report, weights

ROUNDS = ("--rounds", "2")
"""With QuEST, the default, so that each round has different words."""


@pytest.fixture(scope="module")
def rounds(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "rounds"
    little.check_success(job(data, out, cache, *ROUNDS, "--until", "export"))
    return out


def test_each_round_but_the_last_is_a_stage_before_prepare() -> None:
    assert list_stages(1)[:3] == ("teacher", "prepare", "student")
    assert list_stages(3)[:5] == ("teacher", "round 1", "round 2", "prepare", "student")
    assert [get_round(stage) for stage in list_stages(3)[:4]] == [None, 1, 2, None]


def test_first_round_equals_a_run_without_rounds(rounds: Path, finished: Path) -> None:
    assert list(record(rounds)["stages"]) == ["teacher", "round 1", "prepare", "student", "export"]
    assert weights(rounds / "round.1.safetensors") == weights(finished / "student.safetensors")


def test_second_round_is_taught_by_the_first_student(
    rounds: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    little.check_success(little.compress(
        "--teacher", little.STUDENT, "--teacher-weights", rounds / "round.1.safetensors",
        "--student", little.STUDENT, *little.SMALL, *little.SHORT, "--set", "quest.words=8", "--data", data,
        "--out", tmp_path / "run", "--cache", cache, "--seed", "1", "--until", "student",
    ))  # fmt: skip
    assert report(tmp_path / "run")["teachers"][0]["head"] == "kept"
    assert weights(tmp_path / "run" / "student.safetensors") == weights(rounds / "student.safetensors")
    assert weights(rounds / "student.safetensors") != weights(rounds / "round.1.safetensors")


def test_report_has_each_rounds_accuracy(rounds: Path) -> None:
    results = report(rounds)
    rows = [(entry["round"], entry["teacher"], entry["seed"], entry["file"]) for entry in results["rounds"]]
    assert rows == [(1, little.TEACHER, 0, "round.1.safetensors"), (2, "round 1", 1, "student.safetensors")]
    for entry in results["rounds"]:
        assert entry["val_score"]["n"] == results["data"]["val"]
        assert entry["score"]["n"] == results["data"]["test"]
    assert results["student"]["val_score"] == results["rounds"][1]["val_score"]
    assert {epoch["stage"] for epoch in results["epochs"]} == {"teacher", "round 1", "student"}
    for page in ("report.md", "report.html"):
        assert "2 (shipped)" in (rounds / page).read_text()


@pytest.mark.parametrize("stage", ["round 1", "student"])
def test_run_resumes_in_its_round(
    rounds: Path, data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    real = trackers.EpochLog.__call__

    def interrupting(log: trackers.EpochLog, epoch: Any) -> None:
        if (epoch.stage, epoch.epoch) == (stage, 2):
            raise KeyboardInterrupt
        real(log, epoch)

    monkeypatch.setattr(trackers.EpochLog, "__call__", interrupting)
    out = tmp_path / "run"
    assert job(data, out, cache, *ROUNDS, "--until", "student").exit_code == 130
    assert stage not in record(out)["stages"] and (out / "checkpoint" / f"{stage}.pt").exists()
    monkeypatch.undo()
    if stage == "round 1":  # its words are there
        monkeypatch.setattr(
            student, "prepare", lambda c, *rest: real_prepare(c, *rest) if c.round.ships else 1 / 0
        )
    resumed = little.check_success(job(data, out, cache, *ROUNDS, "--until", "student"))
    assert resumed.stderr.count("(kept)") == (1 if stage == "round 1" else 3)
    for name in ("round.1.safetensors", "student.safetensors"):
        assert weights(out / name) == weights(rounds / name)
    losses = [(epoch["stage"], epoch["losses"]) for epoch in report(out)["epochs"]]
    assert losses == [(epoch["stage"], epoch["losses"]) for epoch in report(rounds)["epochs"]]
    assert report(out)["rounds"] == report(rounds)["rounds"]
    assert not list((out / "checkpoint").iterdir())


real_prepare = student.prepare


def test_repeated_rounds_are_kept_and_other_rounds_refused(rounds: Path, data: Path, cache: Path) -> None:
    again = job(data, rounds, cache, *ROUNDS, "--until", "export")
    assert again.exit_code == 0 and again.stderr.count("(kept)") == 5
    refused(job(data, rounds, cache, "--rounds", "3"), 2, "rounds was 2, now 3")


def test_rounds_require_one_teacher_and_a_method(data: Path, cache: Path, tmp_path: Path) -> None:
    def run(*more: str) -> Any:
        return little.compress(
            *little.NETWORKS, *little.SMALL, "--data", data, "--out", tmp_path / "run", "--cache", cache,
            *ROUNDS, *more,
        )  # fmt: skip

    result = run("--teacher", little.STUDENT)
    refused(result, 2, "--rounds 2 requires one teacher, got 2 teachers", "name one --teacher")
    refused(run("--teachers-from-seeds", "3"), 2, "--rounds 2 requires one teacher, got 3 teachers")
    refused(run("--method", "none"), 2, "--rounds 2", "--method none")
    assert not (tmp_path / "run").exists()


def test_estimate_counts_the_rounds(data: Path, cache: Path, tmp_path: Path) -> None:
    result = job(data, tmp_path / "run", cache, "--rounds", "4", "--dry-run")
    assert result.exit_code == 0 and ", 4 rounds" in result.stderr
