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
from questpress.pipeline.methods.quest.loss import cached_words
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
IMAGES = 150  # more than one batch of the teacher; the last one is not full


class Toy:
    """A teacher whose output for an image depends on nothing else, to the bit."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.num_images = factor, 0

    def __call__(self, pixels: torch.Tensor, reads: frozenset[str]) -> dict[str, torch.Tensor]:
        self.num_images += len(pixels)
        halves = pixels.double().unfold(2, SIDE // 2, SIDE // 2).unfold(3, SIDE // 2, SIDE // 2)
        outputs = {"map": halves.mean((4, 5)).float(), "logits": pixels.double().mean((2, 3)).float()}
        return {name: self.factor * outputs[name] for name in reads}


def words(m: int = 2, tau: float = 500.0, vocabulary: torch.Tensor = WORDS) -> CachedOutput:
    return cached_words("map", GRID, vocabulary, tau, m)


def build_cache(
    root: Path,
    teacher: Callable[..., Any] | None = None,
    *,
    outputs: Iterable[CachedOutput] = (LOGITS,),
    images: int = IMAGES,
    seed: int = 0,
    **key: Any,
) -> TeacherCache:
    """Build a cache under ``root``; without a teacher, one that must not load it."""
    data = views(images, seed)

    def render(batches: Iterable[torch.Tensor], view: int) -> Iterator[torch.Tensor]:
        plan = ((indices, torch.full_like(indices, view)) for indices in batches)
        return (pixels for pixels, _ in data.batches(plan))

    def loaded() -> Any:
        assert teacher is not None, "the teacher was loaded"
        return teacher

    source = TeacherSource("toy", "pictures", {"weights": "a", **key}, list(outputs), loaded)
    return TeacherCache(Cache(root), [source], images, render, lambda *_: None)


def pixels(indices: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return views(IMAGES).batch(indices, numbers)[0]


def test_cached_output_equals_the_compacted_features_and_has_the_stated_size(tmp_path):
    cache = build_cache(tmp_path, Toy(), outputs=[LOGITS, words()])
    cache.open((0, 3))
    assert cache.computed == 2
    indices, numbers = torch.tensor([149, 3, 77, 3]), torch.tensor([3, 3, 0, 0])
    [cached] = cache.batch(indices, numbers, CPU)
    readout = Toy()(pixels(indices, numbers), frozenset({"logits", "map"}))
    assert torch.equal(cached["logits"], readout["logits"].half())
    compacted = words().compact(readout)
    assert torch.equal(cached["map.ids"].long(), compacted["map.ids"])
    for part in ("map.p", "map.lost"):
        assert torch.equal(cached[part], compacted[part].half())
    [alone] = cache.batch(indices[:2], numbers[:2], CPU)
    assert all(torch.equal(alone[name], cached[name][:2]) for name in cached)
    cache.load_to_device((0, 3), CPU)
    with Operations() as operations:
        [loaded] = cache.batch(indices, numbers, CPU)
    assert loaded.keys() == cached.keys() and operations.counts["index"] == len(cached)
    assert all(torch.equal(loaded[name], cached[name]) for name in cached)
    cache.load_to_device((3,), CPU)
    [loaded] = cache.batch(indices[:2], numbers[:2], CPU)
    assert all(torch.equal(loaded[name], alone[name]) for name in cached)
    # Logits: 3 numbers of 2 bytes; words: 4 positions of 2 numbers and probabilities and the mass lost.
    assert cache.bytes_per_view == IMAGES * (3 * 2 + 4 * (2 * 4 + 2))
    arrays = [np.load(file) for file in (tmp_path / KIND).rglob("*.npy")]
    assert sum(array.nbytes for array in arrays) == 2 * cache.bytes_per_view


def test_lost_probability_mass_is_recorded(tmp_path):
    cache = build_cache(tmp_path, Toy(), outputs=[words(1)])
    assert cache.lost_mass() is None
    cache.open(range(2))
    means = []
    for view in range(2):
        indices = torch.arange(IMAGES)
        readout = Toy()(pixels(indices, torch.full_like(indices, view)), frozenset({"map"}))
        means.append(float(words(1).compact(readout)["map.lost"].double().mean()))
    assert cache.lost_mass() == pytest.approx(max(means), rel=1e-3)
    recorded = [json.loads(file.read_text())["lost_mass"] for file in (tmp_path / KIND).rglob("about.json")]
    assert sorted(recorded) == pytest.approx(sorted(means), rel=1e-3)
    logits_cache = build_cache(tmp_path, Toy())
    logits_cache.open(range(1))
    assert logits_cache.lost_mass() is None


def test_lost_mass_includes_earlier_views(tmp_path):
    uninterrupted = build_cache(tmp_path, Toy(), outputs=[words(1)])
    resumed = build_cache(tmp_path, outputs=[words(1)])
    uninterrupted.open(range(3))
    fractions = []
    for view in range(3):
        cache = build_cache(tmp_path, outputs=[words(1)])
        cache.open(range(view, view + 1))
        fractions.append(cache.lost_mass())
    last = min(range(3), key=lambda view: fractions[view])
    resumed.open(range(last, last + 1))
    assert resumed.lost_mass() != uninterrupted.lost_mass()
    resumed.open_cached(range(5))  # what is not stored is not computed for that
    assert resumed.lost_mass() == uninterrupted.lost_mass() and resumed.computed == 0


def test_only_missing_outputs_are_computed(tmp_path):
    build_cache(tmp_path, Toy()).open(range(2))
    teacher = Toy()
    more = build_cache(tmp_path, teacher)
    more.open(range(3))
    assert (more.computed, teacher.num_images) == (1, IMAGES)
    with_words = build_cache(tmp_path, Toy(), outputs=[LOGITS, words()])
    with_words.open(range(3))
    assert with_words.computed == 3 and len(list((tmp_path / KIND).iterdir())) == 6


@pytest.mark.parametrize(
    ("changed", "output"),
    [
        ({"weights": "b"}, words()),
        ({"precision": "bf16"}, words()),
        ({}, words(m=3)),
        ({}, words(tau=501.0)),
        ({}, words(vocabulary=WORDS + torch.eye(6, CHANNELS) * 1e-4)),
        ({}, LOGITS),
    ],
)
def test_changed_teacher_top_temperature_or_vocabulary_has_another_key(tmp_path, changed, output):
    old, new = build_cache(tmp_path, outputs=[words()]), build_cache(tmp_path, outputs=[output], **changed)
    [before], [after] = old.sources[0].outputs, new.sources[0].outputs
    assert old.key(0, before, 0) != new.key(0, after, 0)
    assert old.key(0, before, 0) == build_cache(tmp_path, outputs=[words()]).key(0, words(), 0)


def test_every_view_and_image_count_has_its_own_key(tmp_path):
    cache, fewer = build_cache(tmp_path), build_cache(tmp_path, images=IMAGES - 1)
    assert len({cache.key(0, LOGITS, 0), cache.key(0, LOGITS, 1), fewer.key(0, LOGITS, 0)}) == 3


def endless(pixels: torch.Tensor, reads: frozenset[str]) -> dict[str, torch.Tensor]:
    if len(pixels) < BATCH:
        time.sleep(600)
    return Toy()(pixels, reads)


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_incomplete_view_is_computed_again(tmp_path):
    build_cache(tmp_path, Toy()).open(range(1))
    killed = multiprocessing.get_context("fork").Process(
        target=lambda: build_cache(tmp_path, endless).open(range(2))
    )
    killed.start()
    end = time.monotonic() + 30
    while not list((tmp_path / KIND).glob(".*.part/logits.npy")):
        assert time.monotonic() < end and killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    again = build_cache(tmp_path, Toy())
    again.open(range(2))
    assert again.computed == 1
    indices, numbers = torch.arange(IMAGES), torch.ones(IMAGES, dtype=torch.int64)
    expected = Toy()(pixels(indices, numbers), frozenset({"logits"}))["logits"].half()
    assert torch.equal(again.batch(indices, numbers, CPU)[0]["logits"], expected)


def test_damaged_view_is_computed_again(tmp_path, caplog):
    first = build_cache(tmp_path, Toy())
    first.open(range(1))
    [file] = (tmp_path / KIND).rglob("logits.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = build_cache(tmp_path, Toy())
    with caplog.at_level(logging.WARNING):
        again.open(range(1))
    assert again.computed == 1 and "logits.npy has changed" in caplog.text
    rows = torch.tensor([IMAGES - 1]), torch.zeros(1, dtype=torch.int64)
    expected = Toy()(pixels(*rows), frozenset({"logits"}))["logits"].half()
    assert torch.equal(again.batch(*rows, CPU)[0]["logits"], expected)


def test_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache.RowWriter, "write", full)
    with pytest.raises(JobError, match=r"the disk is full; .* 0\.00690 MB per view.*--cache-views"):
        build_cache(tmp_path, Toy(), outputs=[LOGITS, words()]).open(range(1))
    assert list((tmp_path / KIND).iterdir()) == []


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_values_beyond_half_precision_are_refused(tmp_path, factor):
    with pytest.raises(JobError, match="The outputs of toy are not finite, or larger than 65,504"):
        build_cache(tmp_path, Toy(factor)).open(range(1))
    assert list((tmp_path / KIND).iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot remove an open file")
def test_removed_entry_stays_readable_for_its_reader(tmp_path):
    cache = build_cache(tmp_path, Toy())
    cache.open(range(1))
    rows = torch.arange(9), torch.zeros(9, dtype=torch.int64)
    before = cache.batch(*rows, CPU)[0]["logits"].clone()
    [folder] = (tmp_path / KIND).iterdir()
    assert discard(folder) and list((tmp_path / KIND).iterdir()) == []
    assert torch.equal(cache.batch(*rows, CPU)[0]["logits"], before)


# ---------------------------------------------------------------------------------------------------------
# Training


class ToyTeacher(Teacher):
    def forward(self, pixels: torch.Tensor, reads: frozenset[str]) -> dict[str, torch.Tensor]:
        return Toy(0.05)(pixels, reads)


def task(*, online: bool) -> DistillationTask:
    torch.manual_seed(0)
    shapes = Shapes({"map": (64, 4, 4)}, vector=64, logits=CLASSES)
    kd = load("kd")(parse_parameters(["kd"], {})["kd"], Setup(shapes, [shapes]))
    return DistillationTask(
        network(), geometry("cifar_resnet8", SIDE), ENGINE,
        teachers=[ToyTeacher(network(), geometry("cifar_resnet8", SIDE), ENGINE)] if online else [],
        teacher_reads=[frozenset({"logits"})] if online else [], methods={"kd": kd},
        student_reads=frozenset({"logits"}), label_task=CLASSIFICATION,
    )  # fmt: skip


def train_toy(
    file: Path,
    fixed: int | None,
    cache: TeacherCache | None,
    seed: int = 0,
    log: Callable[..., None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    made, views_of = task(online=cache is None), ViewSchedule(POLICY, seed, fixed)
    train(
        made, views(24, views_of.view_seed), plan(epochs=4, seed=seed), Checkpoint(file, "key"),
        training="student", evaluate=lambda _: None, show=lambda *_: None, log=log, schedule=views_of,
        cache=cache,
    )  # fmt: skip
    return state(made)


EXACT = replace(
    LOGITS, arrays={"logits": ((CLASSES,), "float32")}, compact=lambda readout: {"logits": readout["logits"]}
)


@pytest.mark.parametrize("seed", [0, 5])
def test_training_from_a_complete_cache_equals_online_training(tmp_path, seed):
    count = POLICY.count
    assert count == 50
    cache = build_cache(tmp_path, Toy(0.05), outputs=[EXACT], images=24)
    stored = train_toy(tmp_path / "stored.pt", count, cache, seed)
    assert cache.computed == count
    assert equal(stored, train_toy(tmp_path / "online.pt", None, None, seed))
    rounded = build_cache(tmp_path, Toy(0.05), images=24)
    half = train_toy(tmp_path / "half.pt", count, rounded, seed)
    assert not equal(stored, half)
    for name, value in stored.items():
        torch.testing.assert_close(half[name], value, rtol=0.05, atol=0.02)


def test_cached_training_resumes_to_the_bit(tmp_path):
    whole = train_toy(tmp_path / "whole.pt", 2, build_cache(tmp_path / "a", Toy(0.05), images=24))

    def stop(epoch: Any) -> None:
        if epoch.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "part.pt", 2, build_cache(tmp_path / "b", Toy(0.05), images=24), log=stop)
    resumed = train_toy(tmp_path / "part.pt", 2, build_cache(tmp_path / "b", images=24))
    assert equal(resumed, whole)


def test_teacher_is_loaded_once_and_released(tmp_path):
    loads = []
    cache = build_cache(tmp_path, Toy())
    [source] = cache.sources
    cache.sources = [replace(source, load=lambda: loads.append(1) or source.load())]
    for view in (0, 1, 2, 0):
        cache.open(range(view, view + 1))
    assert len(loads) == 1 and cache.computed == 3 and not cache._loaded
