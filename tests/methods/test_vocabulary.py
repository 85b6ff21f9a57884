"""QuEST's vocabulary: k-means on the teacher's features, notes and errors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from questpress.pipeline.errors import JobError, UsageError
from questpress.pipeline.methods.base import Features, PrepareContext, Setup, Shapes
from questpress.pipeline.methods.quest import vocabulary
from questpress.pipeline.methods.quest.quest import Parameters, Quest
from questpress.pipeline.methods.quest.vocabulary import FeatureMatrix, Vocabulary, learn_vocabulary
from questpress.pipeline.runs.cache import Cache
from questpress.pipeline.runs.hashes import digest

C, H, W = 3, 4, 5


class Teacher:
    """Fixed maps, batch by batch; counts how often they are read."""

    def __init__(self, maps: np.ndarray, cache: Path, batch: int = 7) -> None:
        self.maps, self.batch, self.read = maps, batch, 0
        self.notes: list[str] = []
        self.cache = Cache(cache)

    def readouts(self, t: int, reads: frozenset[str]) -> Iterator[Features]:
        self.read += 1
        assert (t, reads) == (0, frozenset({"map"}))
        for start in range(0, len(self.maps), self.batch):
            yield {"map": torch.from_numpy(self.maps[start : start + self.batch]).float()}

    def shared(self, t: int, kind: str, key: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        whole = digest(dict(key))
        return self.cache.get(kind, whole) or self.cache.put(kind, whole, write)

    def preparation(self, seed: int = 0) -> PrepareContext:
        shapes = Shapes({"map": tuple(self.maps.shape[1:])}, vector=None, logits=2)  # type: ignore[dict-item]
        return PrepareContext(
            student=shapes, teachers=[shapes], teacher_names=["toy"], images=len(self.maps),
            features=self.readouts, classifier=lambda _t: None, cached=self.shared, scratch=self.cache.root,
            seed=seed, note=self.notes.append,
        )  # fmt: skip

    def learn(
        self, words: int | None, grid: tuple[int, int] | None = None, limit: int | None = None
    ) -> Vocabulary:
        return learn_vocabulary(
            self.preparation(), teacher=0, level="map", grid=grid or self.maps.shape[2:], words=words,
            iterations=20, limit=limit,
        )  # fmt: skip


def gathered(teacher: Teacher, grid: tuple[int, int], of: int, used: int) -> np.ndarray:
    held = FeatureMatrix(used, teacher.maps.shape[1], None)
    maps = (readout["map"] for readout in teacher.readouts(0, frozenset({"map"})))
    assert held.fill(maps, grid, of)
    return held.data


def rows(maps: np.ndarray) -> np.ndarray:
    return maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1])


def blobs(images: int, centres: np.ndarray, spread: float = 0.01) -> np.ndarray:
    rng = np.random.default_rng(0)
    which = rng.integers(0, len(centres), (images, H, W))
    which.ravel()[: len(centres)] = np.arange(len(centres))
    return (centres[which] + spread * rng.normal(size=(images, H, W, C))).transpose(0, 3, 1, 2)


CENTERS = np.array([[1.0, 2, 3], [10, -5, 2]])


def test_separated_blobs_are_found_and_mu_and_perplexity_are_numpys(tmp_path):
    maps = blobs(30, CENTERS)
    learned = Teacher(maps, tmp_path).learn(2)
    words = learned.words.numpy()
    distances = ((rows(maps)[:, None] - words[None]) ** 2).sum(2)
    near = np.linalg.norm(words[:, None] - CENTERS[None], axis=2)
    assert sorted(near.argmin(1)) == [0, 1] and near.min(1).max() < 0.02
    assert learned.mu == pytest.approx(distances.min(1).mean(), rel=1e-2)
    usage = np.bincount(distances.argmin(1), minlength=2) / len(distances)
    assert learned.perplexity == pytest.approx(np.exp(-(usage * np.log(usage)).sum()), rel=1e-6)
    assert (learned.features, learned.features_used, learned.requested) == (600, 600, 2)
    assert learned.note is None


@pytest.mark.parametrize(
    ("images", "words"), [(10, 256), (20_000, 400), (50_000, 1000), (204_800, 4096), (1_281_167, 4096)]
)
def test_default_number_of_words_follows_the_number_of_images(images, words):
    assert vocabulary.choose_words(images) == words


def test_number_of_words_is_reduced_to_39_features_each(tmp_path):
    teacher = Teacher(np.random.default_rng(0).normal(size=(10, C, H, W)), tmp_path)
    learned = teacher.learn(None)
    assert len(learned.words) == 200 // 39 == 5
    assert learned.requested == 256 and learned.features == 200
    assert [learned.note] == teacher.notes
    assert "5 words instead of 256, so that each has 39 of" in teacher.notes[0]


def test_requested_number_of_words_is_kept_with_a_note(tmp_path):
    enough = Teacher(np.random.default_rng(0).normal(size=(39, C, 1, 2)), tmp_path)
    assert len(enough.learn(2).words) == 2 and enough.notes == []
    few = Teacher(np.random.default_rng(0).normal(size=(58, C, 1, 2)), tmp_path)
    learned = few.learn(3)
    assert len(learned.words) == 3
    assert few.notes == [learned.note] and "116 features are few for 3 words; 2 would" in few.notes[0]


def test_more_words_than_features_are_refused(tmp_path):
    teacher = Teacher(np.random.default_rng(0).normal(size=(2, C, 1, 2)), tmp_path)
    assert len(teacher.learn(3).words) == 3
    with pytest.raises(JobError, match="equals one of the 4 words"):
        teacher.learn(4)
    with pytest.raises(UsageError, match=r"quest\.words=5 exceeds the number of features for k-means, 4 "):
        teacher.learn(5)


def test_constant_level_of_a_pyramid_is_not_used_by_default(tmp_path):
    varied = torch.from_numpy(np.random.default_rng(0).normal(size=(9, C, H, W))).float()
    maps = {"map@0": varied, "map@1": torch.ones(9, C, 2, 2)}
    shapes = Shapes({read: tuple(f.shape[1:]) for read, f in maps.items()}, None, 2, levels=2)
    context = replace(
        Teacher(varied.numpy(), tmp_path).preparation(),
        student=shapes, teachers=[shapes], features=lambda _t, reads: [{read: maps[read] for read in reads}],
    )  # fmt: skip
    notes: list[str] = []
    prepared = Quest.prepare(Parameters(), replace(context, note=notes.append))
    assert notes[-1].startswith("level map@1 of toy is not used. All features of the teacher are the same.")
    assert [
        term.teacher_level for term in Quest(Parameters(), Setup(shapes, [shapes], prepared.tensors)).terms
    ] == ["map@0"]
    with pytest.raises(JobError, match="All features"):
        Quest.prepare(Parameters(levels=("map@0", "map@1")), context)
    with pytest.raises(JobError, match="All levels"):
        maps["map@0"] = torch.ones(9, C, H, W)
        Quest.prepare(Parameters(), replace(context, seed=1))


def test_map_is_pooled_to_the_grid_first(tmp_path):
    maps = np.random.default_rng(0).normal(size=(9, C, 2 * H, 3 * W))
    teacher = Teacher(maps, tmp_path)
    sample = gathered(teacher, (H, W), 9 * H * W, 9 * H * W)
    pooled = maps.reshape(9, C, H, 2, W, 3).mean((3, 5))
    np.testing.assert_allclose(sample, rows(pooled), atol=1e-6)


@pytest.mark.parametrize("used", [2, 39, 100, 199, 200])
def test_sample_has_the_requested_size_and_is_even(tmp_path, used):
    numbers = np.arange(10 * H * W, dtype=float).reshape(10, 1, H, W)
    teacher = Teacher(numbers, tmp_path)
    sample = gathered(teacher, (H, W), 200, used)[:, 0]
    assert len(sample) == used == len(set(sample.tolist()))
    gaps = np.diff(np.concatenate([[-1], sample]))
    assert gaps.max() <= -(-200 // used) and sample[-1] == 199


def test_limit_of_features_is_kept_and_noted(tmp_path):
    teacher = Teacher(np.random.default_rng(0).normal(size=(30, C, H, W)), tmp_path)
    learned = teacher.learn(2, limit=100)
    assert (learned.features, learned.features_used) == (600, 100)
    assert "100 of 600 features" in teacher.notes[0]


def test_second_run_reads_the_vocabulary_from_the_cache_and_not_the_teacher(tmp_path):
    maps = np.random.default_rng(0).normal(size=(30, C, H, W))
    first, second = Teacher(maps, tmp_path), Teacher(maps, tmp_path)
    one, two = first.learn(4), second.learn(4)
    assert (first.read, second.read) == (1, 0)
    assert torch.equal(one.words, two.words) and one.facts() == two.facts()
    third = Teacher(maps, tmp_path)
    third.learn(5)
    assert third.read == 1


def test_damaged_vocabulary_is_computed_again(tmp_path):
    maps = np.random.default_rng(0).normal(size=(30, C, H, W))
    words = Teacher(maps, tmp_path).learn(4).words.numpy().copy()
    [file] = tmp_path.rglob("vocabulary.safetensors")
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = Teacher(maps, tmp_path)
    assert np.array_equal(again.learn(4).words.numpy(), words) and again.read == 1


def test_features_that_are_all_the_same_are_refused(tmp_path):
    with pytest.raises(JobError, match="the same"):
        Teacher(np.full((30, C, H, W), 0.3), tmp_path).learn(4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(tmp_path, value):
    maps = np.random.default_rng(0).normal(size=(30, C, H, W))
    maps[17, 1, 2, 3] = value
    with pytest.raises(JobError, match="toy: its features are not finite"):
        Teacher(maps, tmp_path).learn(4)
    assert not list(tmp_path.rglob("vocabulary.safetensors"))


def test_features_streamed_from_a_file_give_the_words_of_those_in_memory(tmp_path, monkeypatch, capsys):
    maps = blobs(60, CENTERS)
    in_memory = Teacher(maps, tmp_path / "one").learn(2)
    monkeypatch.setattr(vocabulary, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(vocabulary, "CHUNK", 97 * C)
    (tmp_path / "two").mkdir()
    streamed = Teacher(maps, tmp_path / "two").learn(2)
    order = [w.words[:, 0].argsort() for w in (in_memory, streamed)]
    torch.testing.assert_close(streamed.words[order[1]], in_memory.words[order[0]], atol=5e-3, rtol=0)
    assert streamed.features_used == 60 * H * W
    assert streamed.perplexity == pytest.approx(in_memory.perplexity)
    # Half precision rounds features near 10 by up to 0.004, which matters next to a spread of 0.01.
    assert streamed.mu == pytest.approx(in_memory.mu, rel=0.1)
    assert capsys.readouterr().out == ""
    assert not list((tmp_path / "two").rglob("*.f16"))


def drawn(n: int, channels: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, channels)).astype(np.float32)


def test_nearest_words_are_the_same_by_torch_and_by_faiss(monkeypatch):
    f, words = drawn(500, 9), drawn(7, 9)
    monkeypatch.setattr(vocabulary, "GPU_BLOCK", 7 * 33)
    by_torch = vocabulary.nearest_words_by_torch(torch.from_numpy(f), torch.from_numpy(words))
    distances = ((f[:, None].astype(float) - words[None]) ** 2).sum(2)
    for distance, word in (by_torch, vocabulary.nearest_words(f, words)):
        np.testing.assert_allclose(distance, distances.min(1), rtol=1e-4, atol=1e-5)
        assert np.array_equal(word, distances.argmin(1))


def test_requested_features_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(vocabulary.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2 * C * 500}))
    with pytest.raises(JobError, match="600 features of 3 channels require"):
        Teacher(blobs(30, CENTERS), tmp_path).learn(2, limit=600)


def test_full_disk_uses_an_even_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "MEMORY_LIMIT", 4 * C * 400)
    monkeypatch.setattr(
        vocabulary.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2 * C * 60 * H * W})
    )
    teacher = Teacher(blobs(60, CENTERS), tmp_path)
    learned = teacher.learn(2)
    assert (learned.features, learned.features_used) == (60 * H * W, 400)
    assert any("400 of 1,200 features" in note for note in teacher.notes)
