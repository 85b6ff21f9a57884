"""Losses from cached teacher outputs equal their formulas in numpy and the losses computed online."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from questpress.pipeline import methods
from questpress.pipeline.methods.base import Batch, Setup, Shapes
from questpress.pipeline.methods.quest.loss import TopWords, divergence, draw_positions
from questpress.pipeline.methods.quest.quest import Quest

from tests.methods import test_quest
from tests.methods.test_quest import F_S, F_T, LABELS, WORDS, B, H, K, W, drawn, log_p_student, p_teacher

TAU, PLACES = 0.9, H * W
tensor, term = test_quest.tensor, test_quest.term


def method(cached: int, words: np.ndarray = WORDS, **settings) -> Quest:
    return test_quest.method(
        words, 1.0, teacher=(words.shape[1], H, W), cached=cached, tau=(TAU,), **settings
    )


def read_cached(quest: Quest, f_t: np.ndarray = F_T) -> dict[str, torch.Tensor]:
    """Return the cached outputs for a teacher's map, in the dtypes of the files."""
    [output] = quest.cached_outputs(0)
    parts = output.compact({"map": tensor(f_t)})
    assert {name: tuple(part.shape[1:]) for name, part in parts.items()} == {
        name: shape for name, (shape, _) in output.arrays.items()
    }
    arrays = {name: part.numpy().astype(output.arrays[name][1]) for name, part in parts.items()}
    return {
        name: torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
        for name, array in arrays.items()
    }


def loss(quest: Quest, teacher: dict[str, torch.Tensor], epoch: int = 0, keys=None) -> float:
    return quest(Batch({"map": tensor(F_S)}, [teacher], LABELS[:B], epoch, keys))["quest"].item()


def kept_target(ids: np.ndarray, p: np.ndarray, k: int) -> np.ndarray:
    """Return cached words [B,P,m] as a dense p_T [B,K,H,W] in float64."""
    dense = np.zeros((B, PLACES, k))
    p = p.astype(np.float64)
    np.put_along_axis(dense, ids.astype(np.int64), p / p.sum(-1, keepdims=True), 2)
    return dense.transpose(0, 2, 1).reshape(B, k, H, W)


def kl(p: np.ndarray, log_q: np.ndarray) -> float:
    """Mean over batch and positions of Σ_k p (log p − log q), 0 · log 0 = 0."""
    terms = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - log_q), 0)
    return float(terms.sum(1).mean())


@pytest.mark.parametrize("m", [1, 4, K])
def test_cached_loss_equals_the_dense_loss_of_the_kept_words(m):
    quest = method(m)
    cached = read_cached(quest)
    assert cached["map.ids"].shape == (B, PLACES, m) and cached["map.p"].dtype == torch.float16
    weight = term(quest).weight.detach().numpy().astype(float)
    target = kept_target(cached["map.ids"].numpy(), cached["map.p"].numpy(), K)
    assert loss(quest, cached) == pytest.approx(kl(target, log_p_student(F_S, weight, 3.0)), abs=1e-5)


@pytest.mark.parametrize("m", [1, 4, K])
def test_cached_words_are_the_likeliest(m):
    cached = read_cached(method(m))
    p = p_teacher(F_T, WORDS, TAU).transpose(0, 2, 3, 1).reshape(B, PLACES, K)
    best = -np.sort(-p, axis=2)[..., :m]
    np.testing.assert_array_equal(cached["map.ids"].numpy(), np.argsort(-p, axis=2)[..., :m])
    np.testing.assert_allclose(
        cached["map.p"].numpy(), best / best.sum(2, keepdims=True), rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(cached["map.lost"].numpy(), 1 - best.sum(2), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("m", "top"), [(K, None), (4, 4)])
def test_cached_and_online_losses_are_equal(m, top):
    quest = method(m, top=top)
    assert loss(quest, read_cached(quest)) == pytest.approx(loss(quest, {"map": tensor(F_T)}), rel=2e-3)


def test_word_numbers_above_32767_are_cached():
    many = drawn(5, 40_000, 2)
    f_t = drawn(6, B, 2, H, W)
    quest = method(3, many)
    cached = read_cached(quest, f_t)
    p = p_teacher(f_t, many, TAU).transpose(0, 2, 3, 1).reshape(B, PLACES, -1)
    ids = cached["map.ids"].numpy().view(np.uint16)
    assert ids.max() > 32_767
    np.testing.assert_allclose(
        np.take_along_axis(p, ids.astype(np.int64), 2), -np.sort(-p, axis=2)[..., :3], rtol=1e-3
    )
    weight = term(quest).weight.detach().numpy().astype(float)
    target = kept_target(ids, cached["map.p"].numpy(), 40_000)
    assert loss(quest, cached) == pytest.approx(kl(target, log_p_student(F_S, weight, 3.0)), abs=2e-5)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "wttm"])
def test_loss_from_cached_logits_equals_that_of_rounded_logits(name):
    logits, student = 3 * drawn(1, 6, 7), torch.from_numpy(3 * drawn(2, 6, 7)).float()
    shapes = Shapes({}, vector=3, logits=7)
    made = methods.load(name)(methods.parse_parameters([name], {})[name], Setup(shapes, [shapes], {}))
    [output] = made.cached_outputs(0)
    cached = output.compact({"logits": torch.from_numpy(logits).float()})
    assert cached["logits"].dtype == torch.float16 and output.bytes_per_image == 14

    def compute(teacher: torch.Tensor) -> float:
        batch = Batch({"logits": student}, [{"logits": teacher}], torch.arange(6), 99)
        return sum(value.item() for value in made(batch).values())

    assert compute(cached["logits"]) == compute(torch.from_numpy(logits.astype(np.float16)).float())
    assert compute(cached["logits"]) == pytest.approx(compute(torch.from_numpy(logits).float()), rel=5e-3)


def target(n: int, k: int, m: int) -> TopWords:
    ids = torch.from_numpy(np.argsort(drawn(4, n, k), axis=1)[:, :m].copy())
    return TopWords(ids, torch.from_numpy(np.abs(drawn(5, n, m))).softmax(1))


def inputs(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    f_s, weight = (
        F.normalize(torch.from_numpy(drawn(seed, rows, 5)), dim=1) for seed, rows in ((1, n), (2, k))
    )
    gamma = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    return f_s.requires_grad_(), weight.requires_grad_(), gamma


def nothing(*_: torch.Tensor) -> None:
    pass


def test_divergence_from_kept_words_passes_autograds_own_check():
    kept = target(6, 9, 4)
    assert torch.autograd.gradcheck(lambda *given: divergence(*given, kept, nothing), inputs(6, 9))


KEYS = torch.from_numpy(np.random.default_rng(0).integers(0, 2**63 - 1, B))


def test_drawn_positions_depend_on_image_and_epoch():
    rows = draw_positions(KEYS, 3, B, PLACES, 7).view(B, 7)
    for image, chosen in enumerate(rows.tolist()):
        assert len(set(chosen)) == 7
        assert all(image * PLACES <= row < (image + 1) * PLACES for row in chosen)
    assert torch.equal(rows, draw_positions(KEYS, 3, B, PLACES, 7).view(B, 7))
    # Independent of the other images in the batch.
    assert torch.equal(draw_positions(KEYS[1:2], 3, 1, PLACES, 7), rows[1] - PLACES)
    assert not torch.equal(rows, draw_positions(KEYS, 4, B, PLACES, 7).view(B, 7))
    assert not torch.equal(rows, draw_positions(KEYS + 1, 3, B, PLACES, 7).view(B, 7))


def test_every_position_is_drawn_equally_often():
    epochs = 2000
    drawn_ = torch.cat([draw_positions(KEYS, epoch, B, PLACES, 5) for epoch in range(epochs)])
    often = torch.bincount(drawn_, minlength=B * PLACES).double() / epochs
    deviation = (5 / PLACES * (1 - 5 / PLACES) / epochs) ** 0.5
    assert float((often - 5 / PLACES).abs().max()) < 4.5 * deviation


def test_mean_over_many_epochs_of_drawn_positions_is_the_loss_over_all():
    whole, sampled = method(K), method(K, positions=5)
    online = {"map": tensor(F_T)}
    losses = [loss(sampled, online, epoch, KEYS) for epoch in range(400)]
    error = np.std(losses) / len(losses) ** 0.5
    assert np.std(losses) > 0
    assert abs(np.mean(losses) - loss(whole, online)) < 4 * error


@pytest.mark.parametrize("epoch", [0, 5])
def test_same_positions_are_drawn_online_and_cached(epoch):
    quest = method(K, positions=5)
    cached = loss(quest, read_cached(quest), epoch, KEYS)
    online = loss(quest, {"map": tensor(F_T)}, epoch, KEYS)
    assert cached == pytest.approx(online, rel=5e-3)
    assert loss(quest, {"map": tensor(F_T)}, epoch + 1, KEYS) != online


def test_drawing_all_positions_equals_not_drawing():
    online = {"map": tensor(F_T)}
    assert loss(method(K, positions=PLACES), online) == loss(method(K), online)
