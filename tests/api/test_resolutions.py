"""``compress resolutions``: one teacher, a student for each size, one report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from questpress.models.catalogue import multiply_adds
from questpress.pipeline.runs.results import Resolutions
from questpress.pipeline.stages.quantize import Budget

from tests.support import little
from tests.support.little import compress, files, refused


def of_sizes(data: Path, out: Path, cache: Path, sizes: str, *more: str | Path) -> Any:
    return compress(
        "resolutions", "--sizes", sizes, *little.NETWORKS, *little.SMALL, *little.SHORT, "--method", "kd",
        "--data", data, "--out", out, "--cache", cache, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_sizes(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sizes"
    result = of_sizes(data, out, out.parent / "cache", "8,12")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "8 px" in result.stdout and "report.html" in result.stdout
    return out


def found(out: Path) -> Resolutions:
    return Resolutions.model_validate(json.loads((out / "resolutions.json").read_text()))


def test_each_size_is_a_run_with_the_same_teacher(two_sizes: Path) -> None:
    reports = {size: little.report(two_sizes / size) for size in ("8", "12")}
    teachers = [one["teacher"]["score"] for one in reports.values()]
    assert teachers[0] == teachers[1] == little.report(two_sizes / "teacher")["teacher"]["score"]
    assert all(one["teacher"]["head"] == "kept" for one in reports.values())
    assert {size: one["image_size"] for size, one in reports.items()} == {"8": 8, "12": 12}
    assert {one["teacher_image_size"] for one in reports.values()} == {16}
    assert reports["12"]["teacher_cache"]["computed"] > 0 == reports["8"]["teacher_cache"]["computed"], (
        "answered once"
    )


def test_report_has_accuracy_gmacs_and_latency_of_each_file(two_sizes: Path) -> None:
    told = found(two_sizes)
    assert [one.size for one in told.sizes] == [12, 8] and told.teacher_image_size == 16
    for one in told.sizes:
        report = little.report(two_sizes / str(one.size))
        assert one.gmacs == multiply_adds(little.STUDENT, one.size, 3)
        for key in ("student", "student_int8"):
            subject = getattr(one, key)
            assert subject.score.model_dump(exclude_none=True) == {
                name: value for name, value in report[key]["score"].items() if value is not None
            }
            assert all(measured.n > 0 for measured in subject.latency_ms.values())
    assert told.sizes[0].student.speedups == []
    [speedup] = told.sizes[1].student.speedups
    assert speedup.over == "student 12" and 0 < speedup.low <= speedup.ratio <= speedup.high
    html, markdown = ((two_sizes / name).read_text() for name in ("report.html", "report.md"))
    for text in (html, markdown):
        assert "12 px" in text and "8 px" in text and "the same crops scaled down to 8, 12" in text
    assert html.count('<svg viewBox="0 0 340') == 1 + len(told.threads) and "<script" not in html


def test_same_command_again_changes_nothing(two_sizes: Path, data: Path) -> None:
    before = files(two_sizes, but=("report.html", "report.md"))
    result = of_sizes(data, two_sizes, two_sizes.parent / "cache", "8,12")
    assert result.exit_code == 0, (result.output, result.exception)
    after = files(two_sizes, but=("report.html", "report.md"))
    kept = [name for name in before if name.endswith((".onnx", ".safetensors")) or name == "resolutions.json"]
    assert kept and all(before[name] == after[name] for name in kept)


def test_size_over_the_int8_budget_ships_fp32(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = Budget.verdict
    monkeypatch.setattr(
        Budget, "verdict", lambda self, logits: replace(verdict(self, logits), lost=3.25, holds=False)
    )
    result = of_sizes(data, tmp_path / "sizes", tmp_path / "cache", "8")
    assert result.exit_code == 0, (result.output, result.exception)
    [one] = found(tmp_path / "sizes").sizes
    assert one.student_int8 is None and one.student.latency_ms
    told = "No int8 file kept within the budget at 8 px: the fp32 file ships there."
    assert all(told in (tmp_path / "sizes" / name).read_text() for name in ("report.html", "report.md"))
    own = (tmp_path / "sizes" / "8" / "report.md").read_text()
    assert own.split("\n\n")[1].startswith("The fp32 file ships: of ")
    assert "loses 3.2 points. Method kd" in own


@pytest.mark.parametrize(
    ("sizes", "more", "words"),
    [
        ("8,20", (), ("--sizes 20", "--image-size 16")),
        ("8,x", (), ("--sizes 8,x", "64,96,128")),
        ("4", (), ("--sizes 4", "8 or more")),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    data: Path, tmp_path: Path, cache: Path, sizes: str, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(of_sizes(data, tmp_path / "run", cache, sizes, *more), 2, *words)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(
    data: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refused(of_sizes(data, tmp_path / "run", cache, "8"), 2, "by one process alone", "without torchrun")
