"""Whole runs with cached teacher outputs, and the commands that list and prune them."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from questpress.pipeline.api.cache import parse_size
from questpress.pipeline.api.options import read_options
from questpress.pipeline.api.resolve import resolve
from questpress.pipeline.config.network import NetworkSpec
from questpress.pipeline.data.training_data import TrainingData
from questpress.pipeline.errors import UsageError
from questpress.pipeline.runs.cache import Cache
from questpress.pipeline.runs.hashes import digest
from questpress.pipeline.training.student import source_key
from safetensors.torch import load_file, save_file

from tests.support import little
from tests.support.little import refused, report, weights

VIEWS = (
    "--cache-views", "2", "--mixup", "1", "--cutmix", "1", "--epochs", "3", "--precision", "fp32",
    "--until", "student",
)  # fmt: skip


def wide(*arguments: str | Path) -> Any:
    return little.check_success(little.compress(*arguments))


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a separate cache: two cached views of words and logits."""
    root = tmp_path_factory.mktemp("stored")
    result = little.job(data, root / "run", root / "cache", *VIEWS, "--method", "quest+kd")
    assert result.exit_code == 0, (result.output, result.exception)
    (root / "stderr.txt").write_text(result.stderr)
    return root


@pytest.fixture
def copied(first: Path, tmp_path: Path) -> Path:
    """A copy of run and cache that a test may change."""
    for name in ("run", "cache"):
        shutil.copytree(first / name, tmp_path / name)
    return tmp_path


def entries(cache: Path) -> dict[tuple[str, int], Path]:
    """Return the entries by feature and view."""
    folders = {}
    for file in (cache / "teacher-outputs").rglob("about.json"):
        about = json.loads(file.read_text())
        folders[about["output"]["readout"], about["view"]] = file.parent
    return folders


def test_run_reports_its_cached_outputs(first: Path):
    [line] = [line for line in (first / "stderr.txt").read_text().splitlines() if "are cached in" in line]
    run = report(first / "run")
    top, used = run["words"][0]["top"], run["teacher_cache"]
    # 16 positions of m words (2 + 2 bytes each) and the mass lost, and 3 logits.
    per_image = 16 * (4 * top + 2) + 3 * 2
    images = run["data"]["train"]
    assert used == {
        "views": 2, "complete": False, "computed": 2,
        "bytes_per_view": per_image * images, "lost_mass": used["lost_mass"],
    }  # fmt: skip
    assert f"2 fixed views of each image are cached in {first / 'cache'}: {per_image} bytes per image" in line
    assert 0 <= used["lost_mass"] < 0.05 and "% of p_T" in line
    for word in ("Cached teacher outputs", "probability mass of p_T not cached"):
        assert word in (first / "run" / "report.md").read_text()
        assert word in (first / "run" / "report.html").read_text()


def never(*_: Any) -> None:
    raise AssertionError("the teacher was loaded")


@pytest.mark.parametrize(
    "more",
    [
        ("--seed", "7", "--method", "quest"),
        ("--seed", "3", "--method", "dkd", "--batch-size", "12"),
        ("--method", "quest+dist", "--student", "cifar_resnet20", "--optimizer", "sgd"),
    ],
)
def test_other_runs_reuse_cached_outputs_without_the_teacher(
    copied: Path, data: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
):
    for module in ("training.student", "stages.student"):
        monkeypatch.setattr(f"questpress.pipeline.{module}.load_teacher", never)
    teacher = copied / "run" / "teacher.safetensors"
    little.check_success(little.compress(
        "--teacher", little.TEACHER, "--teacher-weights", teacher, "--student", little.STUDENT, *little.SMALL,
        "--set", "quest.words=8" if "quest" in "".join(more) else "dkd.beta=2", "--data", data,
        "--out", copied / "other", "--cache", copied / "cache", *VIEWS, *more,
    ))  # fmt: skip
    assert report(copied / "other")["teacher_cache"]["computed"] == 0
    assert len(entries(copied / "cache")) == 4


def test_cached_outputs_give_the_same_weights(copied: Path, data: Path):
    shutil.rmtree(copied / "run")
    method = ("--method", "quest+kd")
    again = little.job(data, copied / "run", copied / "cache", *VIEWS, *method)
    assert again.exit_code == 0 and report(copied / "run")["teacher_cache"]["computed"] == 0
    shutil.rmtree(copied / "cache" / "teacher-outputs")
    new = little.job(data, copied / "new", copied / "cache", *VIEWS, *method)
    assert new.exit_code == 0 and report(copied / "new")["teacher_cache"]["computed"] == 2
    assert weights(copied / "run" / "student.safetensors") == weights(copied / "new" / "student.safetensors")


@pytest.fixture
def training_data(copied: Path) -> TrainingData:
    run, cache = copied / "run", copied / "cache"
    options = read_options({"config": str(run / "config.yaml"), "out": run, "cache": cache})
    chosen, images = resolve(options)
    return TrainingData(chosen, images, Cache(cache), "cpu", lambda *_: None)


def with_options(data: TrainingData, **options: Any) -> TrainingData:
    return replace(data, options=data.options.model_copy(update=options))


def other_images(data: TrainingData) -> TrainingData:
    return replace(data, dataset=replace(data.dataset, train=data.dataset.train[1:]))


def key_of(data: TrainingData, precision: str = "fp32") -> str:
    assert data.options.out is not None
    teacher = NetworkSpec(little.TEACHER, data.image_size, len(data.classes), "teacher.safetensors")
    return digest(source_key(data.options.out, data, teacher, precision))


@pytest.mark.parametrize(
    "changed",
    [
        lambda data: with_options(data, image_size=24),
        lambda data: with_options(data, pad=1),
        lambda data: with_options(data, flip=not data.options.flip),
        lambda data: with_options(data, color_jitter=0.2),
        lambda data: with_options(data, randaugment="2,9"),
        lambda data: with_options(data, erasing=0.2),
        lambda data: with_options(data, mixup=0.2),
        lambda data: with_options(data, crop="resized", crop_scale=0.5),
        other_images,
    ],
    ids=["size", "pad", "flip", "jitter", "randaugment", "erasing", "mixup", "crop", "images"],
)
def test_key_depends_on_images_sizes_and_view_policy(
    training_data: TrainingData, changed: Callable[[TrainingData], TrainingData]
):
    key = key_of(training_data)
    assert key_of(changed(training_data)) != key
    assert key_of(training_data, "bf16") != key
    assert with_options(training_data, image_size=(24, 12)).policy.aspect == 0.5
    assert key_of(with_options(training_data, seed=9, epochs=99, batch_size=4, method="dist", lr=1.0)) == key


def test_key_depends_on_weights_and_not_on_their_metadata(training_data: TrainingData, copied: Path):
    key, file = key_of(training_data), copied / "run" / "teacher.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, {"key": "of another run"})
    assert key_of(training_data) == key
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 4)
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file)
    assert key_of(training_data) != key


# ---------------------------------------------------------------------------------------------------------
# compress cache


def test_list_shows_cached_outputs(first: Path):
    run = report(first / "run")
    rows = json.loads(wide("cache", "list", "--json", "--cache", first / "cache").stdout)
    by_readout = {row["readout"]: row for row in rows}
    images, top = run["data"]["train"], run["words"][0]["top"]
    assert set(by_readout) == {"map", "logits"}
    for row in rows:
        assert (row["teacher"], row["data"], row["views"], row["images"]) == (
            little.TEACHER, "colors", 2, images,
        )  # fmt: skip
        assert row["bytes"] > 2 * row["bytes_per_view"]
    assert by_readout["logits"]["bytes_per_view"] == images * 6 and by_readout["logits"]["top"] is None
    assert by_readout["map"]["bytes_per_view"] == images * 16 * (4 * top + 2)
    assert by_readout["map"]["top"] == top
    assert by_readout["map"]["lost_mass"] == pytest.approx(run["teacher_cache"]["lost_mass"], rel=1e-6)
    plain = wide("cache", "list", "--cache", first / "cache").stdout.splitlines()
    assert len(plain) == 5 and plain[0].startswith("teacher") and little.TEACHER in plain[1]
    assert "with decoded images, teachers and vocabularies" in plain[-1]


def test_empty_cache_is_reported(tmp_path: Path):
    assert "There are no cached teacher outputs in" in wide("cache", "list", "--cache", tmp_path).stdout
    assert json.loads(wide("cache", "list", "--json", "--cache", tmp_path).stdout) == []


def test_prune_removes_the_least_recently_used(copied: Path):
    cache = copied / "cache"
    checksums, recent = list(cache.glob("*/*/sha256.json")), [("map", 1), ("logits", 0)]
    assert {file.parent.parent.name for file in checksums} > {"images", "teachers", "teacher-outputs"}
    for file in checksums:
        os.utime(file, (1e8, 1e8))
    folders = entries(cache)
    for output in recent:
        os.utime(folders[output] / "sha256.json", (1e9, 1e9))
    keep = sum(file.stat().st_size for output in recent for file in folders[output].iterdir())
    other = cache / "not" / "ours"
    other.mkdir(parents=True)
    (other / "photo.jpg").write_bytes(b"1")
    stdout = wide("cache", "prune", "--keep", str(keep), "--cache", cache).stdout
    assert set(entries(cache)) == set(recent)
    assert stdout.startswith(f"Removed {len(checksums) - 2} of {len(checksums)} entries (")
    assert wide("cache", "prune", "--keep", "1GB", "--cache", cache).stdout.startswith("Removed 0 of 2")
    assert wide("cache", "prune", "--keep", "0", "--cache", cache).stdout.startswith("Removed 2 of 2")
    assert not list(cache.glob("*/*/sha256.json")) and (other / "photo.jpg").exists()


def test_reading_an_entry_is_a_use_of_it(tmp_path: Path):
    cache = Cache(tmp_path)
    folder = cache.put("images", "key", lambda folder: (folder / "a").touch())
    os.utime(folder / "sha256.json", (1e9, 1e9))
    assert cache.get("images", "key") == folder and (folder / "sha256.json").stat().st_mtime > 1e9


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("0", 0), ("10GB", 10**10), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5T", 1.5e12), ("512", 512)],
)
def test_sizes_are_written_as_people_write_them(text: str, bytes_: float):
    assert parse_size(text) == bytes_


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "10 apples", "1e9"])
def test_invalid_size_is_refused(text: str, tmp_path: Path):
    with pytest.raises(UsageError, match="--keep must be a size"):
        parse_size(text)
    refused(little.compress("cache", "prune", f"--keep={text}", "--cache", tmp_path), 2, "--keep")
