"""Whole runs with a teacher store, and the commands that list, verify and prune it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from questpress.pipeline.api.teacher_cache import size
from questpress.pipeline.api.verify_cache import _job, difference
from questpress.pipeline.errors import UsageError
from questpress.pipeline.runs.cache import CHECKSUMS
from questpress.pipeline.runs.console import Display
from questpress.pipeline.runs.device import Engine
from questpress.pipeline.runs.files import digest, sha256
from questpress.pipeline.training import teacher_cache
from questpress.pipeline.training.job import Job
from safetensors.torch import load_file, save_file

from tests.support import little
from tests.support.little import refused, report, weights

VIEWS = ("--cache-views", "2", "--epochs", "3", "--precision", "fp32", "--until", "student")


def wide(*arguments: str | Path) -> Any:
    result = little.compress(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def first(
    one_thread: None,  # noqa: ARG001
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run with a store, in a cache of its own beside it: two views, words and logits."""
    root = tmp_path_factory.mktemp("stored")
    result = little.job(data, root / "run", root / "cache", *VIEWS, "--method", "quest+kd")
    assert result.exit_code == 0, (result.output, result.exception)
    (root / "stderr.txt").write_text(result.stderr)
    return root


@pytest.fixture
def copied(first: Path, tmp_path: Path) -> Path:
    """Run and cache, to be changed."""
    for name in ("run", "cache"):
        shutil.copytree(first / name, tmp_path / name)
    return tmp_path


def entries(cache: Path) -> dict[tuple[str, int], Path]:
    """By readout and view."""
    found = {}
    for file in (cache / "answers").rglob("about.json"):
        about = json.loads(file.read_text())
        found[about["answer"]["readout"], about["view"]] = file.parent
    return found


def test_the_run_says_what_it_stores(first: Path):
    [line] = [line for line in (first / "stderr.txt").read_text().splitlines() if "are stored in" in line]
    run = report(first / "run")
    top, used = run["words"][0]["top"], run["teacher_cache"]
    # 16 positions of m words (2 + 2 bytes each) and the mass lost, and 3 logits.
    per_image = 16 * (4 * top + 2) + 3 * 2
    images = run["data"]["train"]
    assert used == {
        "views": 2, "complete": False, "computed": 2,
        "bytes_per_view": per_image * images, "lost_mass": used["lost_mass"],
    }  # fmt: skip
    assert f"2 fixed views of each image are stored in {first / 'cache'}: {per_image} bytes a view" in line
    assert 0 <= used["lost_mass"] < 0.05 and "% of p_T" in line
    for word in ("Teachers’ stored answers", "share of p_T that is left out"):
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
def test_another_seed_method_or_student_reads_the_answers_and_never_loads_the_teacher(
    copied: Path, data: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
):
    for module in ("training.student", "stages.prepare", "training.teacher_cache"):
        monkeypatch.setattr(f"questpress.pipeline.{module}.load_teacher", never)
    teacher = copied / "run" / "teacher.safetensors"
    result = little.compress(
        "--teacher", little.TEACHER, "--teacher-weights", teacher, "--student", little.STUDENT, *little.SMALL,
        "--set", "quest.words=8" if "quest" in "".join(more) else "dkd.beta=2", "--data", data,
        "--out", copied / "other", "--cache", copied / "cache", *VIEWS, *more,
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert report(copied / "other")["teacher_cache"]["computed"] == 0
    assert len(entries(copied / "cache")) == 4


def test_the_same_run_with_the_answers_there_gives_the_same_weights(copied: Path, data: Path):
    shutil.rmtree(copied / "run")
    method = ("--method", "quest+kd")
    again = little.job(data, copied / "run", copied / "cache", *VIEWS, *method)
    assert again.exit_code == 0 and report(copied / "run")["teacher_cache"]["computed"] == 0
    shutil.rmtree(copied / "cache" / "answers")
    anew = little.job(data, copied / "anew", copied / "cache", *VIEWS, *method)
    assert anew.exit_code == 0 and report(copied / "anew")["teacher_cache"]["computed"] == 2
    assert weights(copied / "run" / "student.safetensors") == weights(copied / "anew" / "student.safetensors")


@pytest.fixture
def job(copied: Path) -> Job:
    display = Display(quiet=True)
    with display.stage("test") as progress:
        return _job(copied / "run", copied / "cache", display, progress)


def with_options(job: Job, **options: Any) -> Job:
    return replace(job, options=job.options.model_copy(update=options))


def other_images(job: Job) -> Job:
    return replace(job, data=replace(job.data, train=job.data.train[1:]))


def _key(job: Job, engine: Engine) -> dict[str, object]:
    return teacher_cache._key(job, job.current_teachers[0], engine)


@pytest.mark.parametrize(
    "changed",
    [
        lambda job: with_options(job, image_size=24),
        lambda job: with_options(job, pad=1),
        lambda job: with_options(job, flip=not job.options.flip),
        lambda job: with_options(job, color_jitter=0.2),
        lambda job: with_options(job, crop="resized", crop_scale=0.5),
        other_images,
    ],
    ids=["size", "pad", "flip", "jitter", "crop", "images"],
)
def test_other_images_sizes_and_ways_to_draw_views_have_other_keys(job: Job, changed: Callable[[Job], Job]):
    engine = Engine("cpu", 1, "fp32")
    key = digest(_key(job, engine))
    assert digest(_key(changed(job), engine)) != key
    assert digest(_key(job, replace(engine, precision="bf16"))) != key
    # What says nothing of an answer does not change it.
    same = with_options(job, seed=9, epochs=99, batch_size=4, method="dist", lr=1.0)
    assert digest(_key(same, replace(engine, threads=7))) == key


def test_a_teachers_key_is_its_weights_and_not_what_its_file_says_of_them(job: Job):
    engine = Engine("cpu", 1, "fp32")
    key, file = digest(_key(job, engine)), job.folder.path / "teacher.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, {"key": "of another run"})
    assert digest(_key(job, engine)) == key
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 4)
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file)
    assert digest(_key(job, engine)) != key


# ---------------------------------------------------------------------------------------------------------
# compress store


def test_the_list_tells_what_is_stored(first: Path):
    run = report(first / "run")
    told = json.loads(wide("store", "list", "--json", "--cache", first / "cache").stdout)
    by_readout = {one["readout"]: one for one in told}
    images, top = run["data"]["train"], run["words"][0]["top"]
    assert set(by_readout) == {"map", "logits"}
    for one in told:
        assert (one["teacher"], one["data"], one["views"], one["images"]) == (
            little.TEACHER, "colours", 2, images,
        )  # fmt: skip
        assert one["bytes"] > 2 * one["bytes_per_view"]
    assert by_readout["logits"]["bytes_per_view"] == images * 6 and by_readout["logits"]["top"] is None
    assert by_readout["map"]["bytes_per_view"] == images * 16 * (4 * top + 2)
    assert by_readout["map"]["top"] == top
    assert by_readout["map"]["lost_mass"] == pytest.approx(run["teacher_cache"]["lost_mass"], rel=1e-6)
    plain = wide("store", "list", "--cache", first / "cache").stdout.splitlines()
    assert len(plain) == 4 and plain[0].startswith("teacher") and little.TEACHER in plain[1]


def test_the_list_of_nothing_says_so(tmp_path: Path):
    assert "No answers are stored in" in wide("store", "list", "--cache", tmp_path).stdout
    assert json.loads(wide("store", "list", "--json", "--cache", tmp_path).stdout) == []


def test_verify_computes_the_answers_again_and_finds_them_equal(first: Path):
    result = wide("store", "verify", first / "run", "--cache", first / "cache")
    images = report(first / "run")["data"]["train"]
    told = result.stdout.splitlines()
    assert told == [
        f"{little.TEACHER}, map: {2 * images} answers computed again, all equal to the bit",
        f"{little.TEACHER}, logits: {2 * images} answers computed again, all equal to the bit",
        "4 of 4 entries have the checksums they were written with.",
    ]


def test_verify_notices_a_damaged_file_and_the_next_verification_that_it_is_gone(copied: Path):
    place = entries(copied / "cache")["logits", 1]
    with (place / "logits.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    arguments = ("store", "verify", copied / "run", "--cache", copied / "cache")
    refused(little.compress(*arguments), 1, "view 1 (logits) was damaged on the disk", "removed")
    assert "1 are no longer stored" in wide(*arguments).stdout


def altered(place: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """An entry whose checksums hold and whose content is another."""
    array = np.load(place / f"{name}.npy")
    change(array)
    np.save(place / f"{name}.npy", array)
    sums = json.loads((place / CHECKSUMS).read_text())
    sums[f"{name}.npy"] = sha256(place / f"{name}.npy")
    (place / CHECKSUMS).write_text(json.dumps(sums))


def swapped(array: np.ndarray) -> None:
    array[[0, 1]] = array[[1, 0]]


def nudged(array: np.ndarray) -> None:
    array *= 1.001


def test_verify_refuses_an_answer_that_is_another_images(copied: Path):
    altered(entries(copied / "cache")["logits", 0], "logits", swapped)
    result = little.compress("store", "verify", copied / "run", "--cache", copied / "cache")
    told = refused(result, 1, f"{little.TEACHER}'s answer to view 0 of image", "rounding explains 1 %")
    assert float(re.search(r"differs by ([\d.e+]+) %", told)[1]) > 1  # type: ignore[index]


def test_verify_lets_rounding_pass_and_states_it(copied: Path):
    altered(entries(copied / "cache")["logits", 0], "logits", nudged)
    told = wide("store", "verify", copied / "run", "--cache", copied / "cache").stdout
    assert re.search(r"logits: .* the largest difference 0\.\d+ % \(rounding explains 1 %\)", told)


def test_verify_says_what_it_cannot_do(copied: Path, tmp_path: Path):
    def verify(run: Path, cache: Path = copied / "cache") -> Any:
        return little.compress("store", "verify", run, "--cache", cache)

    refused(verify(tmp_path / "nowhere"), 2, "nowhere is not a run folder")
    refused(verify(copied / "run", tmp_path / "empty"), 1, "None of the answers", "--cache")
    config = copied / "run" / "config.yaml"
    asks = config.read_text().replace("cache_views: 2", "cache_views: 0")
    config.write_text(asks)
    refused(verify(copied / "run"), 2, "config.yaml is not as the run has left it (cache_views)")
    known = little.record(copied / "run")
    of_another = {**known, "options": {**known["options"], "cache_views": 0}}
    (copied / "run" / "run.json").write_text(json.dumps(of_another))
    refused(verify(copied / "run"), 2, "at every step")
    config.write_text(asks.replace("cache_views: 0", "cache_views: 2"))
    (copied / "run" / "run.json").write_text(json.dumps(known))
    save_file({"a": torch.zeros(1)}, copied / "run" / "prepared.safetensors")
    refused(verify(copied / "run"), 1, "prepared.safetensors is not as the run has left it")
    assert little.compress("store", "verify", copied / "run", "--share", "0").exit_code == 2


def test_prune_removes_what_was_used_longest_ago(copied: Path):
    places = entries(copied / "cache")
    for age, place in enumerate(
        [places["map", 1], places["logits", 0], places["map", 0], places["logits", 1]]
    ):
        os.utime(place / "about.json", (1e9 - age, 1e9 - age))
    sizes = {at: sum(file.stat().st_size for file in place.iterdir()) for at, place in places.items()}
    keep = sizes["map", 1] + sizes["logits", 0]
    told = wide("store", "prune", "--keep", str(keep), "--cache", copied / "cache").stdout
    assert set(entries(copied / "cache")) == {("map", 1), ("logits", 0)}
    assert told.startswith("Removed 2 of 4 entries (")
    assert wide("store", "prune", "--keep", "1GB", "--cache", copied / "cache").stdout.startswith(
        "Removed 0 of 2"
    )
    assert wide("store", "prune", "--keep", "0", "--cache", copied / "cache").stdout.startswith(
        "Removed 2 of 2"
    )
    assert list((copied / "cache" / "answers").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("0", 0), ("10GB", 10**10), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5T", 1.5e12), ("512", 512)],
)
def test_sizes_are_written_as_people_write_them(text: str, bytes_: float):
    assert size(text) == bytes_


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "10 apples", "1e9"])
def test_what_is_no_size_is_refused(text: str, tmp_path: Path):
    with pytest.raises(UsageError, match="say how much to keep"):
        size(text)
    refused(little.compress("store", "prune", f"--keep={text}", "--cache", tmp_path), 2, "--keep")


def test_two_answers_of_words_differ_by_the_share_of_p_t_on_other_words():
    one = {
        "map.ids": np.array([[[3, 1], [0, 2]]], np.uint16),
        "map.p": np.array([[[0.75, 0.25], [0.5, 0.5]]], "f2"),
    }
    two = {"map.ids": np.array([[[3, 9], [2, 0]]], np.uint16), "map.p": one["map.p"]}
    assert difference(one, two) == pytest.approx([0.25 / 2])
    assert difference(one, one) == pytest.approx([0])


def test_two_answers_of_numbers_differ_by_the_length_of_their_difference():
    one, two = (
        {"logits": np.array(rows, "f2")} for rows in ([[3.0, 4.0], [1.0, 0.0]], [[3.0, 4.5], [1.0, 0.0]])
    )
    assert difference(one, two) == pytest.approx([0.1, 0])
