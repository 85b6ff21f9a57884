"""``compress sweep``: several students and sizes from one teacher, compared on one page."""

from pathlib import Path
from typing import Any

import pytest
from questpress.pipeline.api import run

from tests.support import little
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
    ],
)
def test_invalid_sweep_is_refused(
    data: Path, tmp_path: Path, cache: Path, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(sweep(data, tmp_path / "run", cache, *more), 2, *words)
    assert not (tmp_path / "run").exists()


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
