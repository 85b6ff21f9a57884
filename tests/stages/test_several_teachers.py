"""Several teachers: different networks, one network from several seeds, and invalid combinations."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from questpress.models.build import build
from questpress.models.checkpoint import save_weights
from questpress.pipeline.report.format import join_names
from questpress.pipeline.stages import teacher

from tests.support import little
from tests.support.little import CLASSES, STUDENT, TEACHER, compress, refused, report, weights

COMMON = ("--student", STUDENT, *little.SMALL, *little.SHORT)


def distill(data: Path, out: Path, cache: Path, *more: str | Path) -> Result:
    return compress(*COMMON, "--data", data, "--out", out, "--cache", cache, *more)


@pytest.fixture(scope="module")
def seeds(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers of one architecture."""
    out = tmp_path_factory.mktemp("runs") / "seeds"
    little.check_success(distill(
        data, out, cache, "--teacher", TEACHER, "--teacher-weights", "none", "--teachers-from-seeds", "2",
        "--method", "feed+kd", "--set", "feed.transform=linear", "--until", "student",
    ))  # fmt: skip
    return out


def test_teachers_from_seeds_have_their_own_seeds(
    seeds: Path, finished: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    assert weights(seeds / "teacher.0.safetensors") == weights(finished / "teacher.safetensors")
    other = distill(
        data, tmp_path / "run", cache, "--teacher", TEACHER, "--teacher-weights", "none", "--seed", "1",
        "--until", "teacher",
    )  # fmt: skip
    assert other.exit_code == 0
    assert weights(seeds / "teacher.1.safetensors") == weights(tmp_path / "run" / "teacher.safetensors")


def test_resumed_run_takes_its_finished_teacher_from_the_cache(
    seeds: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_first(context: Any, data: Any, t: int, *more: Any) -> Any:
        if t == 1:
            raise KeyboardInterrupt
        return train(context, data, t, *more)

    train, out = teacher._train, tmp_path / "run"
    monkeypatch.setattr(teacher, "_train", train_first)
    options = ("--teacher-weights", "none", "--teachers-from-seeds", "2", "--until", "teacher")
    arguments = (data, out, tmp_path / "cache", "--teacher", TEACHER, *options)
    assert distill(*arguments).exit_code == 130
    monkeypatch.undo()
    assert little.check_success(distill(*arguments)).stderr.count("taken from the cache") == 1
    for name in ("teacher.0.safetensors", "teacher.1.safetensors"):
        assert weights(out / name) == weights(seeds / name)
    assert [epoch["epoch"] for epoch in report(out)["epochs"]] == [1, 2, 1, 2]


def test_report_has_each_teacher_and_the_ensemble(seeds: Path) -> None:
    results = report(seeds)
    assert [entry["name"] for entry in results["teachers"]] == [TEACHER] * 2
    assert all(entry["score"]["n"] == results["data"]["test"] for entry in results["teachers"])
    assert results["teacher"]["name"] == f"2 × {TEACHER}" and results["teacher"]["weights"] == "ensemble"
    assert results["title"] == f"{STUDENT} from 2 × {TEACHER}"
    for page in ("report.md", "report.html"):
        text = (seeds / page).read_text()
        assert "Teacher 0" in text and "Teacher 1" in text and "Teacher ensemble" in text


def test_run_from_seeds_is_repeated_by_its_config(seeds: Path, cache: Path) -> None:
    assert yaml.safe_load((seeds / "config.yaml").read_text())["teacher"] == [TEACHER] * 2
    again = compress(
        "--config", seeds / "config.yaml", "--out", seeds, "--cache", cache, "--until", "student"
    )
    assert again.exit_code == 0 and again.stderr.count("(kept)") == 3


def test_one_teacher_from_seeds_is_one_teacher(finished: Path, data: Path, cache: Path) -> None:
    result = little.job(data, finished, cache, "--teachers-from-seeds", "1")
    assert result.exit_code == 0 and result.stderr.count("(kept)") == 8


@pytest.mark.parametrize("method", ["feed", "kd", "quest"])
def test_teachers_of_different_networks_teach_together(
    data: Path, cache: Path, tmp_path: Path, method: str
) -> None:
    words = ("--set", "quest.words=8") if method == "quest" else ()
    little.check_success(distill(
        data, tmp_path / "run", cache, "--teacher", TEACHER, "--teacher", "cifar_vgg8", "--teacher-weights",
        "none", "--method", method, *words, "--until", "student",
    ))  # fmt: skip
    results = report(tmp_path / "run")
    assert [entry["name"] for entry in results["teachers"]] == [TEACHER, "cifar_vgg8"]
    assert all(epoch["losses"].get(method, 1) > 0 for epoch in results["epochs"])
    assert len(results["words"]) == (2 if method == "quest" else 0)


def trained(file: Path, labels: tuple[str, ...], name: str = TEACHER) -> Path:
    network = build(name, num_classes=len(labels), image_size=16, seed=0)
    save_weights(network, file, {"labels": json.dumps(labels)})
    return file


def distill_two(data: Path, out: Path, cache: Path, *more: str | Path) -> Any:
    return distill(data, out, cache, "--teacher", TEACHER, "--teacher", "cifar_resnet20", *more)


@pytest.mark.parametrize("option", ["--teacher-weights", "--teacher-head"])
def test_weights_and_heads_are_given_once_or_per_teacher(
    data: Path, cache: Path, tmp_path: Path, option: str
) -> None:
    value = {"--teacher-weights": "none", "--teacher-head": "auto"}[option]
    given = [option, value] * 3
    line = refused(distill_two(data, tmp_path / "run", cache, *given), 2, option, "3 times for 2 teachers")
    assert "Repeat it for each --teacher" in line


def test_weights_and_heads_belong_to_the_teachers_in_their_order(
    finished: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    two = trained(tmp_path / "two.safetensors", ("cat", "dog", "horse"), "cifar_resnet20")
    little.check_success(distill_two(
        data, tmp_path / "run", cache, "--teacher-weights", finished / "teacher.safetensors",
        "--teacher-weights", two, "--teacher-head", "keep", "--teacher-head", "replace", "--until", "teacher",
    ))  # fmt: skip
    first, second = report(tmp_path / "run")["teachers"]
    assert (first["head"], second["head"]) == ("kept", "replaced")
    assert first["weights"].startswith("teacher.safetensors") and second["weights"].startswith("two.safetens")
    assert weights(tmp_path / "run" / "teacher.0.safetensors") == weights(finished / "teacher.safetensors")


@pytest.mark.parametrize("others", [("cat", "dog", "horse"), ("blue", "red", "green"), ("one", "two")])
@pytest.mark.parametrize("head", ["auto", "keep"])
def test_weights_for_different_classes_are_refused(
    data: Path, cache: Path, tmp_path: Path, others: tuple[str, ...], head: str
) -> None:
    one = trained(tmp_path / "one.safetensors", CLASSES)
    two = trained(tmp_path / "two.safetensors", others, "cifar_resnet20")
    files = ("--teacher-weights", one, "--teacher-weights", two)
    result = distill_two(data, tmp_path / "run", cache, *files, "--teacher-head", head)
    refused(result, 2, "different classes", "one.safetensors has blue, green, red", ", ".join(others))
    assert not (tmp_path / "run").exists()


def test_head_that_does_not_fit_is_found_before_another_teacher_is_trained(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    two = trained(tmp_path / "two.safetensors", ("a", "b", "c", "d"), "cifar_resnet20")
    result = distill_two(
        data, tmp_path / "run", cache, "--teacher-weights", "none", "--teacher-weights", two,
        "--teacher-head", "auto", "--teacher-head", "keep",
    )  # fmt: skip
    refused(result, 1, "two.safetensors has 4 classes", "--teacher-head replace")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_teachers_from_seeds_are_of_one_network_and_each_is_trained(
    finished: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    seeds = ("--teachers-from-seeds", "3")
    refused(distill_two(data, out, cache, *seeds), 2, "--teachers-from-seeds 3", "one --teacher, got 2")

    def run(*more: str | Path) -> Any:
        return distill(data, out, cache, "--teacher", TEACHER, *seeds, *more)

    fits = ("--teacher-weights", finished / "teacher.safetensors")
    for head in ("keep", "none"):
        refused(run(*fits, "--teacher-head", head), 2, "--teachers-from-seeds 3", f"--teacher-head {head}")
    refused(run(*fits), 1, "--teachers-from-seeds 3", f"the head of {TEACHER}", "--teacher-head replace")


def test_names_of_teachers_are_joined() -> None:
    assert join_names(["a"]) == "a" and join_names(["a", "b"]) == "a + b"
    assert join_names(["a", "b", "a"]) == "2 × a + b"
