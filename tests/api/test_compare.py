"""Comparison of runs: the best run, significant differences, the Pareto front, tables."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from questpress.export.results import Percentile
from questpress.pipeline.api.compare import compare, comparison_csv
from questpress.pipeline.cli.main import cli
from questpress.pipeline.errors import UsageError
from questpress.pipeline.evaluation.results import Comparison
from questpress.pipeline.report.charts import Chart
from questpress.pipeline.report.comparison_page import comparison_page, measured_files, render_comparison
from questpress.pipeline.runs import artifacts
from questpress.pipeline.runs.results import Report

from tests.support import reports
from tests.support.pages import shapes

N = 372

Made = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Made:
    """Return a function that writes a synthetic run: a report and, with ``right``, its predictions."""

    def write(
        name: str,
        correct: int,
        *,
        p50: float = 0.7,
        right: np.ndarray | None = None,
        fingerprint: str = "5fd1c0a9",
        cpu: str = "AMD EPYC 9555",
        **more: object,
    ) -> Path:
        report = reports.full()
        assert report.student_int8 is not None and report.data is not None
        latency = report.student_int8.latency_ms["1"].model_copy(
            update={"percentiles": {"p50": Percentile(value=p50, low=p50 - 0.001, high=p50 + 0.001)}}
        )
        ships = report.student_int8.model_copy(
            update={"score": reports.accuracy(correct, N), "latency_ms": {"1": latency}}
        )
        update = {
            "student_int8": ships,
            "data": report.data.model_copy(update={"fingerprint": fingerprint}),
            "environment": {**report.environment, "cpu": cpu},
            "config": {**report.config, "seed": 7},
        }
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text('{"schema_version": 1, "stages": {}}')
        report = report.model_copy(update={**update, **more})
        (folder / "report.json").write_text(report.model_dump_json(), encoding="utf-8")
        if right is not None:
            logits = np.stack([~right, right], 1).astype(np.float32)
            keys = np.random.default_rng(len(name)).permutation(N)
            # Each run stores them in a different order.
            artifacts.write_predictions(
                folder / artifacts.PREDICTIONS_FILE,
                keys,
                np.ones(N, dtype=np.int64),
                {"student_int8": logits[keys], "student": logits[keys]},
            )
        return folder

    return write


def right(correct: int, wrong: range) -> np.ndarray:
    """Return bool [N] with ``correct`` True values; those in ``wrong`` and the last ones are False."""
    result = np.ones(N, dtype=bool)
    result[list(wrong)] = False
    result[N - (int(result.sum()) - correct) :] = False
    assert result.sum() == correct
    return result


def test_paired_images_are_compared(make: Made, tmp_path: Path) -> None:
    # 11 images that only the best has right, none the other way round: p = 2 / 2^11, doubled by Holm.
    make("best", 340, right=right(340, range(0)))
    make("worse", 329, right=right(329, range(11)))
    make("noise", 338, right=right(338, range(2)))
    comparison = compare(tmp_path / "runs", out=tmp_path / "out")
    [group] = comparison.groups
    assert group.best == "best" and group.runs == ["best", "noise", "worse"]
    noise, worse = group.accuracies
    assert (noise.run, noise.within_noise, noise.paired) == ("noise", True, True)
    assert noise.p == noise.p_holm == pytest.approx(0.5)
    assert worse.p == pytest.approx(2 / 2**11) and worse.p_holm == pytest.approx(4 / 2**11)
    assert not worse.within_noise and worse.points == pytest.approx(-1100 / N)
    for page in render_comparison(comparison).values():
        assert "Not significantly different: noise (−0.5 points, p = 0.500)." in page
        assert "Significantly worse: worse (−3.0 points, p = 0.002)." in page
        assert "McNemar" in page and "chi-squared" not in page


def test_number_of_unlabeled_images_is_shown(make: Made, tmp_path: Path) -> None:
    data = reports.full().data
    assert data is not None
    make("with", 340, data=data.model_copy(update={"fingerprint": "5fd1c0a9", "unlabeled": 2760}))
    make("without", 330)
    comparison = compare(tmp_path / "runs", out=tmp_path / "out")
    [group] = comparison.groups
    assert group.runs == ["with", "without"]
    assert all("quest, 2,760 unlabeled" in page for page in render_comparison(comparison).values())


def test_unpaired_runs_are_compared_by_proportions(make: Made, tmp_path: Path) -> None:
    make("best", 340, right=right(340, range(0)))
    make("worse", 329)
    comparison = compare(tmp_path / "runs", out=tmp_path / "out")
    [row] = comparison.groups[0].accuracies
    pooled = 669 / (2 * N)
    z = (11 / N) / (pooled * (1 - pooled) * 2 / N) ** 0.5
    assert not row.paired and row.within_noise  # a paired test would be significant
    assert row.p == pytest.approx(float(np.exp(-(z**2) / 2)), rel=0.6) and row.p > 0.05
    assert row.low is not None and row.high is not None and row.low < row.points < row.high
    text = render_comparison(comparison)["comparison.md"]
    assert ", unpaired" in text and "compress validate RUN RUN" in text


def test_predictions_of_another_report_are_ignored(make: Made, tmp_path: Path) -> None:
    make("best", 340, right=right(340, range(0)))
    make("changed", 335, right=right(338, range(2)))
    [row] = compare(tmp_path / "runs", out=tmp_path / "out").groups[0].accuracies
    assert not row.paired


def test_latencies_are_compared_by_interval_on_one_machine(make: Made, tmp_path: Path) -> None:
    make("fast", 330, p50=0.700)
    make("same", 330, p50=0.7001)
    make("slow", 330, p50=0.9)
    make("elsewhere", 330, p50=0.1, cpu="Cortex-A76")
    comparison = compare(tmp_path / "runs", out=tmp_path / "out")
    here, there = sorted(comparison.groups[0].machines, key=lambda machine: -len(machine.runs))
    assert here.runs == ["fast", "same", "slow"] and there.runs == ["elsewhere"]
    same, slow = here.latencies
    assert (same.verdict, slow.verdict) == ("no difference", "slower")
    assert slow.ratio == pytest.approx(0.9 / 0.7)
    assert "different machines" in comparison.warnings[0] and "compress bench" in comparison.warnings[0]
    assert "together" in " ".join(comparison.notes)


def test_runs_on_other_images_form_their_own_group(make: Made, tmp_path: Path) -> None:
    make("photos", 330)
    make("other", 371, fingerprint="0badcafe")
    comparison = compare(tmp_path / "runs", out=tmp_path / "out")
    assert [group.best for group in comparison.groups] == ["other", "photos"]
    assert all(not group.accuracies for group in comparison.groups)
    assert "2 different data sets" in comparison.warnings[0]


def test_unfinished_run_is_shown_with_its_results(make: Made, tmp_path: Path) -> None:
    make("done", 330)
    make("begun", 330, student_int8=None, int8=[])
    comparison = compare(tmp_path / "runs", out=tmp_path / "out")
    assert "begun is not finished; missing: int8 file." in comparison.warnings
    begun = comparison.run("begun")
    assert begun.int8 is None and begun.fp32 is not None and begun.ships == begun.fp32
    assert all("begun" in page for page in render_comparison(comparison).values())


def test_run_folders_and_reports_are_listed_once(make: Made, tmp_path: Path) -> None:
    first, second = make("a/64", 330), make("b/64", 331)
    make("a/teacher", 330)  # of a sweep: not compared
    given = [tmp_path / "runs" / "a", first, second / "report.json", tmp_path / "runs" / "b"]
    comparison = compare(given, out=tmp_path / "out")
    assert sorted(run.name for run in comparison.runs) == ["a/64", "b/64"]
    alone = tmp_path / "alone.json"
    alone.write_text((first / "report.json").read_text(), encoding="utf-8")
    assert compare(alone, out=tmp_path / "out").runs[0].source == str(alone)


def test_report_of_another_version_is_refused(make: Made, tmp_path: Path) -> None:
    file = make("newer", 330) / "report.json"
    content = json.loads(file.read_text())
    content["unknown"] = {"x": 1}
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="written by another version"):
        compare(file, out=tmp_path / "out")


@pytest.mark.parametrize("given", ["nowhere", "empty", "empty/file.txt"])
def test_path_without_a_run_is_refused(given: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file.txt").write_text("no report")
    result = CliRunner().invoke(cli, ["compare", str(tmp_path / given), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and not result.stdout
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_image_is_not_a_run_or_report(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UsageError, match=r"photo\.jpg is not a report"):
        compare(tmp_path / "photo.jpg", out=tmp_path / "out")


def test_untimed_thread_count_is_refused(make: Made, tmp_path: Path) -> None:
    make("one", 330)
    with pytest.raises(UsageError, match=r"--threads 3: no run was timed with it\. Available: 1"):
        compare(tmp_path / "runs", out=tmp_path / "out", threads=3)


def test_command_prints_the_table_or_json(make: Made, tmp_path: Path) -> None:
    make("one", 330)
    make("two", 331)
    arguments = ["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    stdout = CliRunner().invoke(cli, arguments).stdout
    for words in ("On clothing, 372 test images", "two", "best", "not significant", "comparison.html"):
        assert words in stdout, words
    comparison = Comparison.model_validate_json(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert comparison == Comparison.model_validate_json((tmp_path / "out" / "comparison.json").read_text())
    assert CliRunner().invoke(cli, [*arguments, "--quiet"]).stdout == ""


def test_table_for_programs_has_full_numbers_and_no_formula(make: Made, tmp_path: Path) -> None:
    make("=cmd()", 330, method="+quest")
    comparison = compare(tmp_path / "runs", out=tmp_path / "out")
    [row] = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert row["run"] == "'=cmd()" and row["method"] == "'+quest" and row["seed"] == "7"
    assert float(row["int8_score"]) == pytest.approx(100 * 330 / N)
    assert float(row["int8_p50_low"]) < float(row["int8_p50_high"])
    assert float(row["training_seconds"]) == pytest.approx(8.4 + 1260.9)


def test_names_are_escaped(make: Made, tmp_path: Path) -> None:
    report = reports.full()
    assert report.data is not None
    evil = "<script>alert(1)</script>"
    make("<img src=x>", 330, method=evil, data=report.data.model_copy(update={"name": evil}))
    texts = render_comparison(compare(tmp_path / "runs", out=tmp_path / "out"))
    for text in texts.values():
        assert "<script" not in text and "<img" not in text and "alert(1)" in text


def test_tables_and_picture_have_one_frontier(make: Made, tmp_path: Path) -> None:
    make("fast", 300, p50=0.5)
    make("twin", 300, p50=0.5)
    make("beaten", 299, p50=0.6)
    make("unknown", 372, p50=float("inf"), student=None)
    comparison = compare(tmp_path / "runs", out=tmp_path / "out")
    [machine] = comparison.groups[0].machines
    fp32 = ["fast fp32", "twin fp32", "beaten fp32"]
    assert machine.frontier == ["fast int8", "twin int8", *fp32, "resnet34 teacher"]
    front = f"(no file is both faster and more accurate): {', '.join(machine.frontier)}."
    for text in render_comparison(comparison).values():
        assert front in " ".join(text.split())
    [chart] = comparison_page(comparison).sections[0].figures
    assert isinstance(chart, Chart)
    for i in range(2):
        assert sorted(dot.tooltip.split(":")[0] for dot in shapes(chart, "dot", i)) == sorted(
            machine.frontier
        )


def test_teacher_of_several_runs_has_its_lowest_latency(make: Made, tmp_path: Path) -> None:
    teacher = reports.full().teacher
    assert teacher is not None
    latency = teacher.latency_ms["1"]
    for name, p50 in (("disturbed", 20.0), ("quiet", 9.0), ("restless", 12.0)):
        slower = latency.model_copy(update={"percentiles": {"p50": Percentile(value=p50)}})
        make(name, 300, teacher=teacher.model_copy(update={"latency_ms": {"1": slower}}))
    comparison = compare(tmp_path / "runs", out=tmp_path / "out")
    [(name, file)] = [entry for entry in measured_files(comparison.runs) if entry[0].endswith("teacher")]
    assert name == "resnet34 teacher" and file.p50 == 9.0


def test_reports_alone_are_enough(tmp_path: Path) -> None:
    files = []
    for i, report in enumerate((reports.full(), reports.bare(), reports.teacher_only())):
        file = tmp_path / f"{i}.json"
        file.write_text(Report.model_dump_json(report), encoding="utf-8")
        files.append(file)
    comparison = compare(files, out=tmp_path / "out")
    assert len(comparison.runs) == 3 and sum("not finished" in text for text in comparison.warnings) == 2
