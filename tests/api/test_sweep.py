"""``compress sweep``: several students and sizes from one teacher, compared on one page."""

import json
from pathlib import Path
from typing import Any

import pytest
from questpress.pipeline.api import run
from questpress.pipeline.api.compare import choose_winner
from questpress.pipeline.api.sweep import halve
from questpress.pipeline.evaluation.results import ComparedRun, Search, Trial

from tests.support import comparisons, little, reports
from tests.support.little import compress, files, refused


def sweep(data: Path, out: Path, cache: Path, *more: str | Path) -> Any:
    return compress(
        "sweep", *little.NETWORKS, *little.SMALL, *little.SHORT, "--method", "kd", "--data", data,
        "--out", out, "--cache", cache, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_sizes(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sweep"
    result = little.check_success(sweep(data, out, out.parent / "cache", "--student-sizes", "8,12"))
    for text in (f"{little.STUDENT}-8", f"{little.STUDENT}-12", "comparison.html"):
        assert text in result.stdout
    return out


def test_each_size_is_a_run_and_all_share_one_teacher(two_sizes: Path) -> None:
    reports = {size: little.report(two_sizes / f"{little.STUDENT}-{size}") for size in (12, 8)}
    teacher = little.report(two_sizes / "teacher")["teacher"]["score"]
    assert all(report["teacher"]["score"] == teacher for report in reports.values())
    assert all(report["teacher"]["head"] == "kept" for report in reports.values())
    assert {size: report["image_size"] for size, report in reports.items()} == {8: 8, 12: 12}
    assert {report["teacher_image_size"] for report in reports.values()} == {16}
    computed = [reports[size]["teacher_cache"]["computed"] for size in (12, 8)]
    assert computed[0] > 0 == computed[1], "the second student reads the cache"


def test_comparison_contains_the_students_only(two_sizes: Path) -> None:
    page = (two_sizes / "comparison" / "comparison.md").read_text()
    assert f"{little.STUDENT}-8" in page and f"{little.STUDENT}-12" in page
    again = compress("compare", two_sizes, "--out", two_sizes.parent / "again")
    assert again.exit_code == 0 and "not finished" not in again.stdout


def test_repeated_command_adds_only_the_new_student(two_sizes: Path, data: Path) -> None:
    before = files(two_sizes)
    more = ("--students", f"cifar_resnet20,{little.STUDENT}", "--student-sizes", "12,8")
    little.check_success(sweep(data, two_sizes, two_sizes.parent / "cache", *more))
    after = files(two_sizes)
    kept = [name for name in before if name.endswith((".onnx", ".safetensors"))]
    assert kept and all(before[name] == after[name] for name in kept)
    assert (two_sizes / "cifar_resnet20-8" / "report.json").is_file()


def test_each_method_is_a_run_of_the_same_teacher(
    two_sizes: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = []
    original = run.compress
    monkeypatch.setattr(
        "questpress.pipeline.api.sweep.compress",
        lambda **options: stages.append(options["out"].name) or original(**options),
    )
    out, cache = two_sizes, two_sizes.parent / "cache"
    config = tmp_path / "sweep.yaml"
    config.write_text("{cache_views: 1, set: {kd.tau: 3}}")
    methods = ("--methods", "kd, quest+kd", "--config", config, "--set", "quest.words=8")
    arguments = [
        "sweep", *little.NETWORKS, *little.SMALL, *little.SHORT, "--data", data, "--out", out, "--cache",
        cache, "--student-sizes", "8", *methods,
    ]  # fmt: skip
    result = little.check_success(compress(*arguments))
    names = [f"{little.STUDENT}-8-{method}" for method in ("kd", "quest+kd")]
    assert stages == ["teacher", *names] and all(name in result.stdout for name in names)
    reports = [little.report(out / name) for name in names]
    assert [report["method"] for report in reports] == ["kd", "quest+kd"]
    teacher = little.report(out / "teacher")["teacher"]["score"]
    assert all(report["teacher"]["score"] == teacher for report in reports)
    assert reports[0]["config"]["settings"]["kd.tau"] == 3
    assert "quest.words" not in reports[0]["config"]["settings"]
    assert reports[1]["config"]["settings"]["quest.words"] == 8


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--student-sizes", "8,20"), ("--student-sizes 20", "--image-size 16")),
        (("--student-sizes", "8,x"), ("--student-sizes must be pixels of a side", "got 8,x")),
        (("--student-sizes", "4"), ("--student-sizes must be 8 to 4096 pixels",)),
        (("--student-sizes", "8,8x16"), ("--student-sizes 8x16 has another shape", "use 16, or")),
        (("--students", "no_network_xyz"), ("no_network_xyz",)),
        (("--methods", "none,kd"), ("--method and --methods",)),
        (("--keep", "0"), ("--keep must be at least 1, got 0",)),
        (("--max-latency", "fast"), ("--max-latency must be milliseconds", "such as 5ms, got fast")),
        (("--max-latency", "nan"), ("got nan",)),
        (("--students", "auto", "--max-latency", "5ms"), ("--students auto and --student", "Remove")),
    ],
)
def test_invalid_sweep_is_refused(
    data: Path, tmp_path: Path, cache: Path, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(sweep(data, tmp_path / "run", cache, *more), 2, *words)
    assert not (tmp_path / "run").exists()


def test_auto_requires_a_budget_or_a_number(data: Path, tmp_path: Path, cache: Path) -> None:
    arguments = ("--teacher", little.TEACHER, "--data", data, "--out", tmp_path / "run", "--cache", cache)
    result = compress("sweep", *arguments, "--students", "auto")
    refused(result, 2, "--students auto requires --max-latency or --keep")


def test_search_drops_slow_and_inaccurate_students(
    two_sizes: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache, big = two_sizes, two_sizes.parent / "cache", "cifar_resnet56"
    more = ("--students", f"{little.STUDENT},{big}", "--student-sizes", "8,12")
    budget = ("--max-latency", "0.0001")
    line = refused(sweep(data, out, cache, *more, *budget), 2, "no student is within 0.0001 ms", "nearest")
    latencies = {row["candidate"]: row for row in json.loads((out / "search.json").read_text())["latencies"]}
    best = {name: min(row["fp32"], row["int8"]) for name, row in latencies.items()}
    assert set(best) == {f"{name}-{size}" for name in (little.STUDENT, big) for size in (8, 12)}
    small, large = ([best[f"{name}-{size}"] for size in (8, 12)] for name in (little.STUDENT, big))
    assert max(small) < min(large), "seven times as many layers"
    assert min(best, key=lambda name: best[name]) in line

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("questpress.pipeline.api.sweep.measure_untrained", refuse)
    middle = f"{(max(small) * min(large)) ** 0.5}ms"
    search = ("--max-latency", middle, "--keep", "1")
    result = little.check_success(sweep(data, out, cache, *more, *search))
    assert not (out / f"{big}-8").exists() and not (out / "trials" / "1-epochs" / f"{big}-8").exists()
    comparison = json.loads((out / "comparison" / "comparison.json").read_text())
    found = comparison["search"]
    assert found["over"] == [f"{big}-12", f"{big}-8"]
    trials = {trial["run"]: trial for trial in found["trials"]}
    for name, trial in trials.items():
        report = little.report(out / "trials" / "1-epochs" / name)
        own = report["student"]["val_score"]
        assert report["teacher_cache"]["computed"] == 0, "the views of the full trainings"
        assert (trial["epochs"], trial["val_score"]["percent"]) == (1, own["percent"])
    kept = [name for name, trial in trials.items() if trial["kept"]]
    scores = [trial["val_score"]["percent"] for trial in trials.values()]
    assert len(trials) == 2 and scores[0] == max(scores) and kept == [next(iter(trials))]
    assert found["winner"]["run"] == kept[0] == comparison["runs"][0]["name"]
    page = (out / "comparison" / "comparison.md").read_text()
    for text in (f"Ships: {kept[0]}", "Over the budget", "Dropped after a short training"):
        assert text in result.stdout and text in page
    before = files(out / "trials")
    little.check_success(sweep(data, out, cache, *more, *search))
    after = files(out / "trials")
    weights = [name for name in before if name.endswith(".safetensors")]
    assert weights and all(before[name] == after[name] for name in weights)


def test_halving_keeps_the_better_half_of_each_round() -> None:
    accuracy = dict(zip("abcdef", (10, 60, 30, 50, 40, 20), strict=True))
    asked = []

    def try_out(name: str, divisor: int) -> Trial:
        asked.append((name, divisor))
        return Trial(
            run=name, epochs=32 // divisor, val_score=reports.accuracy(accuracy[name], 100), kept=False
        )

    left, trials = halve(list("abcdef"), 2, try_out)
    assert left == ["b", "d"]
    assert asked == [*((name, 4) for name in "abcdef"), *((name, 2) for name in "bde")]
    assert [trial.run for trial in trials if not trial.kept] == ["c", "f", "a", "e"]


@pytest.mark.parametrize(
    ("budget", "winner", "reason"),
    [(None, "b", "faster"), (5.0, "b", "faster"), (1.5, "c", "most accurate"), (0.5, None, None)],
)
def test_faster_student_ships_unless_it_is_worse(
    budget: float | None, winner: str | None, reason: str | None
) -> None:
    base = comparisons.comparison().runs[0]

    def run(name: str, correct: int, p50: float) -> ComparedRun:
        measured = {"score": reports.accuracy(correct, 372), "p50": p50, "p50_low": p50, "p50_high": p50}
        assert base.int8 is not None
        return base.model_copy(update={"name": name, "int8": base.int8.model_copy(update=measured)})

    runs = [run("a", 350, 4.0), run("b", 349, 2.0), run("c", 250, 1.0)]
    chosen = choose_winner(Search(max_latency=budget), runs, {}).winner
    assert (chosen and chosen.run, chosen and chosen.reason) == (winner, reason)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--methods", "none,kdd"), ("'kdd'", "Did you mean kd")),
        (("--methods", "none,kd", "--set", "quest.words=8"), ("--set quest.words=8", "none, kd")),
        (("--methods", "none,kd", "--set", "kd.words=8"), ("kd has no parameter 'words'",)),
    ],
)
def test_invalid_methods_are_refused_before_the_teacher_is_trained(
    data: Path, tmp_path: Path, cache: Path, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    arguments = ("--data", data, "--out", tmp_path / "run", "--cache", cache)
    refused(compress("sweep", *little.NETWORKS, *little.SMALL, *arguments, *more), 2, *words)
    assert not (tmp_path / "run").exists()


def test_torchrun_is_refused(
    data: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refused(sweep(data, tmp_path / "run", cache, "--student-sizes", "8"), 2, "without torchrun")
