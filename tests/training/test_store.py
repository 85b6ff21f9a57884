"""The teacher cache: its content, when outputs are recomputed, and training from it."""

import errno
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from questpress.models.build import geometry
from questpress.pipeline.data.views import ViewSchedule
from questpress.pipeline.errors import JobError
from questpress.pipeline.methods import base, load, parse_parameters
from questpress.pipeline.methods.base import CachedOutput, Setup, Shapes
from questpress.pipeline.methods.quest.loss import cached_words as words_answer
from questpress.pipeline.runs.cache import Cache, discard
from questpress.pipeline.training import teacher_cache
from questpress.pipeline.training.loop import train
from questpress.pipeline.training.task import DistillationTask, Teacher
from questpress.pipeline.training.teacher_cache import BATCH, KIND, TeacherCache, TeacherSource
from questpress.pipeline.training.weights import Checkpoint

from tests.support.operations import Operations
from tests.support.toys import CLASSIFICATION, ENGINE, POLICY, SIDE, equal, network, plan, state, views

CPU = torch.device("cpu")
GRID, CHANNELS, CLASSES = (2, 2), 3, 3
WORDS = 255 * torch.from_numpy(np.random.default_rng(0).random((6, CHANNELS), dtype=np.float32))
LOGITS = base._half("logits", Shapes({}, vector=None, logits=CLASSES))
IMAGES = 150
"""More than one batch of the teacher; the last one is not full."""


class Toy:
    """A teacher whose output for an image depends on nothing else, to the bit."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.asked = factor, 0

    def __call__(self, pixels: torch.Tensor, reads: frozenset[str]) -> dict[str, torch.Tensor]:
        self.asked += len(pixels)
        halves = pixels.double().unfold(2, SIDE // 2, SIDE // 2).unfold(3, SIDE // 2, SIDE // 2)
        found = {"map": halves.mean((4, 5)).float(), "logits": pixels.double().mean((2, 3)).float()}
        return {name: self.factor * found[name] for name in reads}


def words(m: int = 2, tau: float = 500.0, vocabulary: torch.Tensor = WORDS) -> CachedOutput:
    return words_answer("map", GRID, vocabulary, tau, m)


def store(
    root: Path,
    teacher: Callable[..., Any] | None = None,
    *,
    answers: Iterable[CachedOutput] = (LOGITS,),
    images: int = IMAGES,
    seed: int = 0,
    **key: Any,
) -> TeacherCache:
    """Build a cache under ``root``; without a teacher, one that must not load it."""
    of = views(images, seed)

    def render(batches: Iterable[torch.Tensor], view: int) -> Iterator[torch.Tensor]:
        plan = ((indices, torch.full_like(indices, view)) for indices in batches)
        return (pixels for pixels, _ in of.batches(plan))

    def loaded() -> Any:
        assert teacher is not None, "the teacher was loaded"
        return teacher

    source = TeacherSource("toy", "pictures", {"weights": "a", **key}, list(answers), loaded)
    return TeacherCache(Cache(root), [source], images, render, lambda *_: None)


def pixels(indices: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return views(IMAGES).batch(indices, numbers)[0]


def test_cached_output_equals_the_compacted_features_and_has_the_stated_size(tmp_path):
    one = store(tmp_path, Toy(), answers=[LOGITS, words()])
    one.open(range(2))
    assert one.computed == 2
    indices, numbers = torch.tensor([149, 3, 77, 3]), torch.tensor([1, 1, 0, 0])
    [found] = one.batch(indices, numbers, CPU)
    readout = Toy()(pixels(indices, numbers), frozenset({"logits", "map"}))
    assert torch.equal(found["logits"], readout["logits"].half())
    compacted = words().compact(readout)
    assert torch.equal(found["map.ids"].long(), compacted["map.ids"])
    for part in ("map.p", "map.lost"):
        assert torch.equal(found[part], compacted[part].half())
    [alone] = one.batch(indices[:2], numbers[:2], CPU)
    assert all(torch.equal(alone[name], found[name][:2]) for name in found)
    one.load_to_device(range(2), CPU)
    with Operations() as operations:
        [loaded] = one.batch(indices, numbers, CPU)
    assert loaded.keys() == found.keys() and operations.counts["index"] == len(found)
    assert all(torch.equal(loaded[name], found[name]) for name in found)
    one.load_to_device(range(1, 2), CPU)
    [loaded] = one.batch(indices[:2], numbers[:2], CPU)
    assert all(torch.equal(loaded[name], alone[name]) for name in found)
    # Logits: 3 numbers of 2 bytes; words: 4 positions of 2 numbers and probabilities and the mass lost.
    assert one.bytes_per_view == IMAGES * (3 * 2 + 4 * (2 * 4 + 2))
    arrays = [np.load(file) for file in (tmp_path / KIND).rglob("*.npy")]
    assert sum(array.nbytes for array in arrays) == 2 * one.bytes_per_view


def test_lost_probability_mass_is_recorded(tmp_path):
    one = store(tmp_path, Toy(), answers=[words(1)])
    assert one.lost_mass() is None
    one.open(range(2))
    means = []
    for view in range(2):
        indices = torch.arange(IMAGES)
        readout = Toy()(pixels(indices, torch.full_like(indices, view)), frozenset({"map"}))
        means.append(float(words(1).compact(readout)["map.lost"].double().mean()))
    assert one.lost_mass() == pytest.approx(max(means), rel=1e-3)
    told = [json.loads(file.read_text())["lost_mass"] for file in (tmp_path / KIND).rglob("about.json")]
    assert sorted(told) == pytest.approx(sorted(means), rel=1e-3)
    of_logits = store(tmp_path, Toy())
    of_logits.open(range(1))
    assert of_logits.lost_mass() is None


def test_lost_mass_includes_earlier_views(tmp_path):
    uninterrupted, resumed = store(tmp_path, Toy(), answers=[words(1)]), store(tmp_path, answers=[words(1)])
    uninterrupted.open(range(3))
    shares = []
    for view in range(3):
        one = store(tmp_path, answers=[words(1)])
        one.open(range(view, view + 1))
        shares.append(one.lost_mass())
    last = min(range(3), key=lambda view: shares[view])
    resumed.open(range(last, last + 1))
    assert resumed.lost_mass() != uninterrupted.lost_mass()
    resumed.open_cached(range(5))  # what is not stored is not computed for that
    assert resumed.lost_mass() == uninterrupted.lost_mass() and resumed.computed == 0


def test_only_missing_outputs_are_computed(tmp_path):
    store(tmp_path, Toy()).open(range(2))
    teacher = Toy()
    more = store(tmp_path, teacher)
    more.open(range(3))
    assert (more.computed, teacher.asked) == (1, IMAGES)
    with_words = store(tmp_path, Toy(), answers=[LOGITS, words()])
    with_words.open(range(3))
    assert with_words.computed == 3 and len(list((tmp_path / KIND).iterdir())) == 6


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        ({"weights": "b"}, words()),
        ({"precision": "bf16"}, words()),
        ({}, words(m=3)),
        ({}, words(tau=501.0)),
        ({}, words(vocabulary=WORDS + torch.eye(6, CHANNELS) * 1e-4)),
        ({}, LOGITS),
    ],
)
def test_changed_teacher_top_temperature_or_vocabulary_has_another_key(tmp_path, changed, answer):
    one, other = store(tmp_path, answers=[words()]), store(tmp_path, answers=[answer], **changed)
    [before], [after] = one.sources[0].outputs, other.sources[0].outputs
    assert one.key(0, before, 0) != other.key(0, after, 0)
    assert one.key(0, before, 0) == store(tmp_path, answers=[words()]).key(0, words(), 0)


def test_every_view_and_image_count_has_its_own_key(tmp_path):
    one, fewer = store(tmp_path), store(tmp_path, images=IMAGES - 1)
    assert len({one.key(0, LOGITS, 0), one.key(0, LOGITS, 1), fewer.key(0, LOGITS, 0)}) == 3


def endless(pixels: torch.Tensor, reads: frozenset[str]) -> dict[str, torch.Tensor]:
    if len(pixels) < BATCH:
        time.sleep(600)
    return Toy()(pixels, reads)


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_incomplete_view_is_computed_again(tmp_path):
    store(tmp_path, Toy()).open(range(1))
    killed = multiprocessing.get_context("fork").Process(
        target=lambda: store(tmp_path, endless).open(range(2))
    )
    killed.start()
    end = time.monotonic() + 30
    while not list((tmp_path / KIND).glob(".*.part/logits.npy")):
        assert time.monotonic() < end and killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    again = store(tmp_path, Toy())
    again.open(range(2))
    assert again.computed == 1
    indices, numbers = torch.arange(IMAGES), torch.ones(IMAGES, dtype=torch.int64)
    expected = Toy()(pixels(indices, numbers), frozenset({"logits"}))["logits"].half()
    assert torch.equal(again.batch(indices, numbers, CPU)[0]["logits"], expected)


def test_damaged_view_is_computed_again(tmp_path, caplog):
    first = store(tmp_path, Toy())
    first.open(range(1))
    [file] = (tmp_path / KIND).rglob("logits.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = store(tmp_path, Toy())
    with caplog.at_level(logging.WARNING):
        again.open(range(1))
    assert again.computed == 1 and "logits.npy has changed" in caplog.text
    asked = torch.tensor([IMAGES - 1]), torch.zeros(1, dtype=torch.int64)
    expected = Toy()(pixels(*asked), frozenset({"logits"}))["logits"].half()
    assert torch.equal(again.batch(*asked, CPU)[0]["logits"], expected)


def test_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache.RowWriter, "write", full)
    with pytest.raises(JobError, match=r"the disk is full; .* 0\.00690 MB per view.*--cache-views"):
        store(tmp_path, Toy(), answers=[LOGITS, words()]).open(range(1))
    assert list((tmp_path / KIND).iterdir()) == []


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_values_beyond_half_precision_are_refused(tmp_path, factor):
    with pytest.raises(JobError, match="The outputs of toy are not finite, or larger than 65,504"):
        store(tmp_path, Toy(factor)).open(range(1))
    assert list((tmp_path / KIND).iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nothing be removed that is read")
def test_removed_entry_stays_readable_for_its_reader(tmp_path):
    one = store(tmp_path, Toy())
    one.open(range(1))
    asked = torch.arange(9), torch.zeros(9, dtype=torch.int64)
    before = one.batch(*asked, CPU)[0]["logits"].clone()
    [folder] = (tmp_path / KIND).iterdir()
    assert discard(folder) and list((tmp_path / KIND).iterdir()) == []
    assert torch.equal(one.batch(*asked, CPU)[0]["logits"], before)


# ---------------------------------------------------------------------------------------------------------
# Training


class ToyTeacher(Teacher):
    def forward(self, pixels: torch.Tensor, reads: frozenset[str]) -> dict[str, torch.Tensor]:
        return Toy(0.05)(pixels, reads)


def task(*, asks: bool) -> DistillationTask:
    torch.manual_seed(0)
    shapes = Shapes({"map": (64, 4, 4)}, vector=64, logits=CLASSES)
    kd = load("kd")(parse_parameters(["kd"], {})["kd"], Setup(shapes, [shapes]))
    return DistillationTask(
        network(), geometry("cifar_resnet8", SIDE), ENGINE,
        teachers=[ToyTeacher(network(), geometry("cifar_resnet8", SIDE), ENGINE)] if asks else [],
        teacher_reads=[frozenset({"logits"})] if asks else [], methods={"kd": kd},
        student_reads=frozenset({"logits"}), label_task=CLASSIFICATION,
    )  # fmt: skip


def learned(
    file: Path,
    fixed: int | None,
    kept: TeacherCache | None,
    seed: int = 0,
    log: Callable[..., None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    made, views_of = task(asks=kept is None), ViewSchedule(POLICY, seed, fixed)
    train(
        made, views(24, views_of.view_seed), plan(epochs=4, seed=seed), Checkpoint(file, "key"),
        training="student", evaluate=lambda _: None, show=lambda *_: None, log=log, schedule=views_of,
        cache=kept,
    )  # fmt: skip
    return state(made)


EXACT = replace(
    LOGITS, arrays={"logits": ((CLASSES,), "float32")}, compact=lambda readout: {"logits": readout["logits"]}
)


@pytest.mark.parametrize("seed", [0, 5])
def test_training_from_a_complete_cache_equals_online_training(tmp_path, seed):
    count = POLICY.count
    assert count == 50
    kept = store(tmp_path, Toy(0.05), answers=[EXACT], images=24)
    stored = learned(tmp_path / "stored.pt", count, kept, seed)
    assert kept.computed == count
    assert equal(stored, learned(tmp_path / "online.pt", None, None, seed))
    rounded = store(tmp_path, Toy(0.05), images=24)
    half = learned(tmp_path / "half.pt", count, rounded, seed)
    assert not equal(stored, half)
    for name, value in stored.items():
        torch.testing.assert_close(half[name], value, rtol=0.05, atol=0.02)


def test_cached_training_resumes_to_the_bit(tmp_path):
    whole = learned(tmp_path / "whole.pt", 2, store(tmp_path / "a", Toy(0.05), images=24))

    def stop(epoch: Any) -> None:
        if epoch.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "part.pt", 2, store(tmp_path / "b", Toy(0.05), images=24), log=stop)
    went_on = learned(tmp_path / "part.pt", 2, store(tmp_path / "b", images=24))
    assert equal(went_on, whole)


def test_teacher_is_loaded_once_and_released(tmp_path):
    loads = []
    one = store(tmp_path, Toy())
    [source] = one.sources
    one.sources = [replace(source, load=lambda: loads.append(1) or source.load())]
    for view in (0, 1, 2, 0):
        one.open(range(view, view + 1))
    assert len(loads) == 1 and one.computed == 3 and not one._loaded
