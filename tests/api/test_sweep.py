"""``compress sweep``: several students and sizes from one teacher, compared on one page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from questpress.pipeline import api
from questpress.pipeline.api.ranking import choose_winner
from questpress.pipeline.api.sweep import halve, record
from questpress.pipeline.errors import JobError
from questpress.pipeline.evaluation.results import ComparedFile, ComparedRun, Search, Trial, UntrainedLatency
from questpress.pipeline.report.comparison_page import describe_search
from questpress.pipeline.runs.artifacts import Predictions

from tests.support import comparisons, little, reports
from tests.support.little import compress, files, refused


def sweep(data: Path, out: Path, cache: Path, *more: str | Path) -> Any:
    networks = little.NETWORKS[:-2] if "--students" in more else little.NETWORKS
    method = () if "--methods" in more else ("--method", "kd")
    return compress(
        "sweep", *networks, *little.SMALL, *little.SHORT, *method, "--data", data,
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
    exported = [two_sizes / f"{little.STUDENT}-{size}" / "bench" / "teacher.onnx" for size in (12, 8)]
    assert exported[0].samefile(exported[1])


def test_comparison_contains_the_students_only(two_sizes: Path) -> None:
    page = (two_sizes / "comparison" / "comparison.md").read_text()
    assert f"{little.STUDENT}-8" in page and f"{little.STUDENT}-12" in page
    again = compress("compare", two_sizes, "--out", two_sizes.parent / "again")
    assert again.exit_code == 0 and "not finished" not in again.stdout


def test_each_method_is_a_run_of_the_same_teacher(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, Any] = {}

    def run(**options: Any) -> str:
        name = options["out"].name
        runs[name] = options
        if name.endswith("-kd"):
            raise JobError("The weights are not finite.")
        return "a report"

    monkeypatch.setattr("questpress.pipeline.api.sweep.compress", run)
    monkeypatch.setattr("questpress.pipeline.api.sweep.compare", lambda paths, search, **_: (paths, search))
    out = tmp_path / "sweep"
    compared, search = api.sweep.sweep(
        teacher=little.TEACHER,
        student=little.STUDENT,
        data=str(data),
        image_size=16,
        out=str(out),
        student_sizes=[8],
        methods=["kd", "kd+quest", "none"],
        settings=["quest.words=8", "kd.tau=3"],
        unlabeled=little.photos(tmp_path / "photos", {"any": 4}, first=500),
    )
    names = [f"{little.STUDENT}-8-{method}" for method in ("kd", "kd+quest", "none")]
    assert [*runs] == ["teacher", *names] and compared == [out / name for name in names[1:]]
    assert search.failed == {names[0]: "The weights are not finite."}
    assert runs["teacher"]["until"] == "teacher" and "settings" not in runs["teacher"]
    kd, both, none = (runs[name] for name in names)
    assert (kd["method"], both["method"], none["method"]) == ("kd", "kd+quest", "none")
    assert kd["settings"] == {"kd.tau": "3"} and both["settings"] == {"kd.tau": "3", "quest.words": "8"}
    assert "unlabeled" in kd and "unlabeled" not in runs["teacher"] and "unlabeled" not in none
    assert none["settings"] == {}
    for options in (kd, both, none):
        assert options["teacher_weights"] == [str(out / "teacher" / "teacher.safetensors")]
        assert options["teacher_head"] == ["keep"] and options["student_size"] == 8


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--student-sizes", "8,20"), ("--student-size 20", "--image-size 16")),
        (("--student-sizes", "8,x"), ("--student-sizes must be pixels of a side", "got 8,x")),
        (("--student-sizes", "4"), ("--student-sizes must be 8 to 4096 pixels",)),
        (("--student-sizes", "8,8x16"), ("--student-size 8x16 has another shape", "use 16, or")),
        (("--students", "no_network_xyz"), ("no_network_xyz",)),
        (("--methods", "none,kd", "--method", "kd"), ("--method and --methods",)),
        (("--students", "cifar_resnet8", "--student", "x"), ("--student and --students",)),
        (("--methods", "none,kd", "--baseline"), ("--baseline would repeat",)),
        (("--methods", "none,kd", "--set", "foo"), ("--set must be KEY=VALUE, got foo",)),
        (("--students", f"{little.STUDENT},ssdlite:resnet18"), ("one is a detector",)),
        (("--keep", "0"), ("--keep must be at least 1, got 0",)),
        (("--max-latency", "fast"), ("--max-latency must be milliseconds", "such as 5ms, got fast")),
        (("--max-latency", "nan"), ("got nan",)),
        (("--min-accuracy", "0.95"), ("--min-accuracy must be 1 to 100 percent", "got 0.95")),
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
    before = files(out)
    middle = f"{(max(small) * min(large)) ** 0.5}ms"
    search = ("--max-latency", middle, "--keep", "1")
    result = little.check_success(sweep(data, out, cache, *more, *search))
    after, finished = files(out), [name for name in before if name.endswith((".onnx", ".safetensors"))]
    assert finished and all(before[name] == after[name] for name in finished), "only what is missing runs"
    assert not (out / f"{big}-8").exists() and not (out / "trials" / "1-epochs" / f"{big}-8").exists()
    comparison = json.loads((out / "comparison" / "comparison.json").read_text())
    search_result = comparison["search"]
    assert search_result["over"] == [f"{big}-12", f"{big}-8"]
    trials = {trial["run"]: trial for trial in search_result["trials"]}
    for name, trial in trials.items():
        report = little.report(out / "trials" / "1-epochs" / name)
        score = report["student"]["val_score"]
        assert report["teacher_cache"]["computed"] == 0, "the views of the full trainings"
        assert (trial["epochs"], trial["val_score"]["percent"]) == (1, score["percent"])
    kept = [name for name, trial in trials.items() if trial["kept"]]
    scores = [trial["val_score"]["percent"] for trial in trials.values()]
    assert len(trials) == 2 and scores[0] == max(scores) and kept == [next(iter(trials))]
    assert search_result["winner"]["run"] == kept[0] == comparison["runs"][0]["name"]
    page = (out / "comparison" / "comparison.md").read_text()
    for text in (f"Ships: {kept[0]}", "Over the budget", "Dropped after a short training"):
        assert text in result.stdout and text in page


def test_halving_keeps_the_better_half_of_each_round() -> None:
    accuracy = dict(zip("abcdef", (10, 60, 30, 50, 40, 20), strict=True))
    calls = []

    def try_out(name: str, divisor: int) -> Trial:
        calls.append((name, divisor))
        return Trial(
            run=name, epochs=32 // divisor, val_score=reports.accuracy(accuracy[name], 100), kept=False
        )

    left, trials = halve(list("abcdef"), 2, try_out)
    assert left == ["b", "d"]
    assert calls == [*((name, 4) for name in "abcdef"), *((name, 2) for name in "bde")]
    assert [trial.run for trial in trials if not trial.kept] == ["c", "f", "a", "e"]


def candidate(name: str, correct: int, p50: float | None, val: int | None = None) -> ComparedRun:
    base = comparisons.comparison().runs[0]
    assert base.int8 is not None and base.fp32 is not None

    def file(original: ComparedFile, p50: float | None) -> ComparedFile:
        measured = {"score": reports.accuracy(correct, 372), "p50": p50, "p50_low": p50, "p50_high": p50}
        return original.model_copy(update=measured)

    fp32 = file(base.fp32, 2 * p50 if p50 else ord(name))
    val_score = None if val is None else reports.accuracy(val, 400)
    update = {"name": name, "int8": file(base.int8, p50), "fp32": fp32, "val_score": val_score}
    return base.model_copy(update=update)


@pytest.mark.parametrize(
    ("budget", "winner", "reason"),
    [(None, "b", "faster"), (5.0, "b", "faster"), (1.5, "c", "most accurate"), (0.5, None, None)],
)
def test_faster_student_ships_unless_it_is_worse(
    budget: float | None, winner: str | None, reason: str | None
) -> None:
    runs = [candidate("a", 350, 4.0), candidate("b", 349, 2.0), candidate("c", 250, 1.0)]
    chosen = choose_winner(Search(max_latency=budget), runs, {}, {}).winner
    assert (chosen and chosen.run, chosen and chosen.reason) == (winner, reason)
    assert chosen is None or (chosen.split, chosen.n, chosen.timed) == ("test", 372, "int8")


@pytest.mark.parametrize(
    ("least", "budget", "winner"),
    [(60.0, None, "c"), (90.0, None, "b"), (94.05, None, "a"), (90.0, 1.5, None), (95.0, None, None)],
)
def test_fastest_accurate_student_ships(least: float, budget: float | None, winner: str | None) -> None:
    runs = [candidate("a", 350, 4.0), candidate("b", 349, 2.0), candidate("c", 250, 1.0)]
    compared = comparisons.comparison().model_copy(update={"runs": runs})
    search = choose_winner(Search(max_latency=budget, min_accuracy=least), runs, {}, {})
    text = " ".join(describe_search(compared, search))
    assert (search.winner and search.winner.run) == winner
    assert f" with at least {least:g} %" in text
    assert ("No student ships: none with" in text) == (winner is None)


def test_student_is_judged_by_its_faster_file_and_its_test() -> None:
    run = candidate("a", 350, 6.0)
    assert run.fp32 is not None
    run = run.model_copy(update={"fp32": run.fp32.model_copy(update={"p50": 4.5})})
    compared = comparisons.comparison().model_copy(update={"runs": [run]})
    search = choose_winner(Search(max_latency=5.0), [run], {}, {})
    text = " ".join(describe_search(compared, search))
    assert "fp32, 4.50 ms; the most accurate within 5.00 ms" in text and "another processor" not in text
    # The intervals of mAP overlap, which is no test: the more accurate one ships.
    maps = reports.accuracy(80, 100).model_copy(update={"correct": None, "metric": "mAP"})
    runs = [candidate(name, 350, p50) for name, p50 in (("a", 4.0), ("b", 2.0))]
    runs[0] = runs[0].model_copy(update={"val_score": maps.model_copy(update={"n": 400})})
    lower = maps.model_copy(update={"n": 400, "percent": 78.0})
    runs[1] = runs[1].model_copy(update={"val_score": lower})
    winner = choose_winner(Search(), runs, {}, {}).winner
    assert winner is not None and (winner.run, winner.reason) == ("a", "most accurate")


def test_untimed_student_does_not_ship_as_the_fastest() -> None:
    runs = [candidate("a", 350, None).model_copy(update={"fp32": None}), candidate("b", 349, 2.0)]
    winner = choose_winner(Search(min_accuracy=90.0), runs, {}, {}).winner
    assert winner is not None and (winner.run, winner.reason) == ("a", "most accurate")


def right(correct: int) -> Predictions:
    """The first of 400 val images are classified correctly."""
    keys, labels = np.arange(400), np.zeros(400, dtype=np.int32)
    return Predictions(keys, labels, {"student": (keys >= correct).astype(np.int32)})


def test_student_is_chosen_by_val_images_with_each_test_at_5_percent() -> None:
    # On test images, c is the most accurate. On val images a is, and b is not worse. c is, with p = 2 / 2⁶,
    # which Holm's correction for two runs would raise above 0.05.
    runs = [candidate("a", 300, 4.0, 360), candidate("b", 301, 2.0, 357), candidate("c", 350, 1.0, 354)]
    val = {"a": right(360), "b": right(357), "c": right(354)}
    chosen = choose_winner(Search(), runs, {}, val).winner
    assert chosen is not None and (chosen.run, chosen.reason) == ("b", "faster")
    assert (chosen.split, chosen.n) == ("val", 400)
    assert chosen.difference is not None and chosen.difference.paired
    assert chosen.difference.p == pytest.approx(0.25) and chosen.difference.points == pytest.approx(-0.75)
    few = [run.model_copy(update={"val_score": reports.accuracy(90, 100)}) for run in runs]
    chosen = choose_winner(Search(), few, {}, val).winner
    assert chosen is not None and (chosen.run, chosen.split) == ("c", "test")


def test_student_for_another_processor_is_chosen_by_its_fp32_file() -> None:
    runs = [candidate("b", 340, None), candidate("a", 341, None)]
    compared = comparisons.comparison().model_copy(update={"runs": runs})
    for budget in (None, 5.0):
        search = choose_winner(Search(max_latency=budget), runs, {}, {})
        assert search.winner is not None
        assert (search.winner.run, search.winner.timed) == ("a", "fp32"), "it is also the faster one"
        text = " ".join(describe_search(compared, search))
        assert "Ships: a, 91.7 %" in text and "The int8 file is for another processor" in text


def test_record_keeps_what_earlier_commands_measured(tmp_path: Path) -> None:
    def latency(name: str, fp32: float) -> UntrainedLatency:
        return UntrainedLatency(candidate=name, fp32=fp32, int8=1.0)

    file = tmp_path / "search.json"
    record(file, Search(latencies=[latency("a", 2.0)]))
    record(file, Search(latencies=[latency("b", 3.0), latency("a", 4.0)]))
    record(file, Search(max_latency=5.0))
    search = Search.model_validate_json(file.read_text())
    assert search.max_latency == 5.0 and [m.fp32 for m in search.latencies] == [4.0, 3.0]


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
