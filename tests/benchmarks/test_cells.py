"""The benchmarks' harness: cells that are done once, in slices of time, and a table of what they gave."""

import json
import statistics
import sys
from pathlib import Path

import pytest

from benchmarks import cells
from benchmarks.papers import crd
from tests.support import little


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return little.photos(
        tmp_path / "data", {"train/red": 12, "train/blue": 12, "test/red": 6, "test/blue": 6}
    )


def arguments(data: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        *little.NETWORKS, *little.SMALL, "--teacher-epochs", "1", "--epochs", "1", "--data", str(data),
        "--cache", str(tmp_path / "cache"), "--device", "cpu", *more,
    ]  # fmt: skip


def test_cell_is_done_once_and_its_figures_are_the_reports(data: Path, tmp_path: Path) -> None:
    plain = cells.Cell("a:b", "none", 3, arguments(data, tmp_path, "--method", "none"))
    teacher = cells.Cell("a", "teacher", 3, plain.arguments, until="teacher")
    out = tmp_path / "out"
    assert cells.Table(out, [teacher, plain]).run(None)
    report = out / "a-b.none.3" / "report.json"
    before = report.stat().st_mtime_ns
    again = cells.Table(out, [teacher, plain])
    assert again.run(None)
    assert report.stat().st_mtime_ns == before
    results = json.loads((out / "a.teacher.3" / "report.json").read_text())
    assert again.accuracies("a", "teacher") == [results["teacher"]["score"]["percent"]]
    assert results["config"]["seed"] == 3
    again.write(out / "results.json", {"benchmark": "little"})
    written = json.loads((out / "results.json").read_text())
    assert written["benchmark"] == "little"
    assert [(c["row"], c["method"], c["seed"]) for c in written["cells"]] == [
        ("a", "teacher", 3),
        ("a:b", "none", 3),
    ]
    assert set(written["cells"][1]["stage_seconds"]) > {"teacher", "student", "validate"}
    assert written["cells"][1]["train_images"] == 22 and written["cells"][1]["environment"]["torch"]
    assert "cpu (" in written["cells"][1]["environment"]["student computed on"]
    assert written["cells"][1]["arguments"][-2:] == ["--method", "none"]
    other = cells.Cell("a:b", "none", 3, [*plain.arguments, "--epochs", "2"])
    with pytest.raises(SystemExit, match="made with other options"):
        cells.Table(out, [other]).run(None)


STUBBORN = """#!/bin/sh
trap 'echo stopped > {folder}/stopped; exit 130' TERM
while :; do sleep 0.05; done
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")
def test_cell_is_interrupted_when_the_budget_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "command"
    command.write_text(STUBBORN.format(folder=tmp_path))
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    table = cells.Table(tmp_path / "out", [cells.Cell("a:b", "none", 0, [])])
    assert not table.run(0) and not (tmp_path / "stopped").exists()
    assert not table.run(2) and (tmp_path / "stopped").exists()
    assert table.accuracies("a:b", "none") == []


def test_finished_cells_are_tabulated_if_a_later_cell_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = cells.Table(tmp_path / "out", [])

    def run(_: float | None) -> bool:
        table.done["a"] = {"top1": 50.0}
        raise SystemExit("b failed")

    table.run = run
    with pytest.raises(SystemExit, match="b failed"):
        cells.run_and_write(table, "9m", {"benchmark": "little"}, lambda: "a 50 %")
    assert (tmp_path / "out" / "results.md").read_text() == "a 50 %"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["benchmark"] == "little"
    assert "the same command resumes" in capsys.readouterr().out


def test_seeds_are_spoken_as_mean_and_deviation() -> None:
    assert cells.spoken([]) == "–"
    assert cells.spoken([71.5]) == "71.50"
    values = [70.0, 71.0, 73.0]
    assert cells.spoken(values) == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def test_crd_table_names_networks_and_recipes_that_exist() -> None:
    from questpress.models.build import resolve
    from questpress.pipeline.config import recipes

    for teacher, student, published in crd.PAIRS.values():
        assert resolve(teacher) == teacher and resolve(student) == student
        assert 50 < published["none"] < published["teacher"] < 90
    assert set(crd.RECIPES.values()) <= set(recipes.list_recipes())


def test_crd_table_shows_the_difference_to_what_was_published(tmp_path: Path) -> None:
    built = crd.build_cells(tmp_path, ["r56:r20"], {"none": [], "quest": ["--cache-views", "30"]}, "0,1", [])
    assert [cell.name for cell in built] == [
        "cifar_resnet56.teacher.0",
        "r56-r20.none.0", "r56-r20.quest.0", "r56-r20.none.1", "r56-r20.quest.1",
    ]  # fmt: skip
    table = cells.Table(tmp_path, built)
    for cell, top1 in zip(built, (72.5, 69.0, 71.9, 69.4, 72.3), strict=True):
        table.done[cell.name] = {"top1": top1, "stage_seconds": {"student": 90.0}}
    rows = crd.build_rows(table, ["r56:r20"], ["none", "quest"])
    assert [(row[1], row[3], row[4]) for row in rows] == [
        ("teacher", "72.34", "+0.16"), ("none", "69.06", "+0.14"), ("quest", "71.84", "+0.26"),
    ]  # fmt: skip
