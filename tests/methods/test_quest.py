"""QuEST's loss against its formula in numpy, float64, by hand."""

import numpy as np
import pytest
import torch
from questpress.pipeline.errors import UsageError
from questpress.pipeline.methods import parse_parameters
from questpress.pipeline.methods.base import Batch, Setup, Shapes
from questpress.pipeline.methods.quest import loss
from questpress.pipeline.methods.quest.loss import assign_words
from questpress.pipeline.methods.quest.quest import Parameters, Quest, WordPrediction
from scipy.special import log_softmax, softmax

# All different, so that no axis can be taken for another.
B, H, W, C_T, C_S, K = 3, 4, 5, 6, 7, 11


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).float()


def p_teacher(f: np.ndarray, words: np.ndarray, tau: float) -> np.ndarray:
    """[B,C,H,W] and [K,C] to [B,K,H,W], position by position."""
    b, _, h, w = f.shape
    out = np.empty((b, len(words), h, w))
    for i in range(b):
        for y in range(h):
            for x in range(w):
                d = ((f[i, :, y, x][None] - words) ** 2).sum(1)
                out[i, :, y, x] = softmax(-d / tau)
    return out


def log_p_student(f: np.ndarray, weight: np.ndarray, gamma: float) -> np.ndarray:
    f = f / np.linalg.norm(f, axis=1, keepdims=True)
    weight = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    return log_softmax(gamma * np.einsum("kc,bchw->bkhw", weight, f), axis=1)


def quest(f_t, f_s, words, weight, gamma, tau) -> float:
    """Mean over batch and positions of KL(p_T ‖ p_S)."""
    p, log_q = p_teacher(f_t, words, tau), log_p_student(f_s, weight, gamma)
    return float((p * (np.log(p) - log_q)).sum(1).mean())


def pooled(f: np.ndarray, factor: tuple[int, int]) -> np.ndarray:
    b, c, h, w = f.shape
    return f.reshape(b, c, h // factor[0], factor[0], w // factor[1], factor[1]).mean((3, 5))


def method(
    words: np.ndarray,
    mu: float,
    teacher=(C_T, H, W),
    student=(C_S, H, W),
    cached: int | None = None,
    **settings,
) -> Quest:
    torch.manual_seed(0)
    prepared = {"0.map.words": tensor(words), "0.map.mu": torch.tensor(mu)}
    if cached is not None:
        prepared["0.map.top"] = torch.tensor(cached)
    own, teachers = (Shapes({"map": size}, vector=None, logits=2) for size in (student, teacher))
    return Quest(Parameters(**settings), Setup(own, [teachers], prepared))


def term(quest: Quest, number: int = 0) -> WordPrediction:
    prediction = quest.terms[number]
    assert isinstance(prediction, WordPrediction)
    return prediction


LABELS = torch.zeros(B, dtype=torch.int64)
F_T, F_S, WORDS = drawn(1, B, C_T, H, W), drawn(3, B, C_S, H, W), drawn(2, K, C_T)


def compute_loss(quest: Quest, f_t: np.ndarray = F_T, f_s: np.ndarray = F_S) -> torch.Tensor:
    return quest(Batch({"map": tensor(f_s)}, [{"map": tensor(f_t)}], LABELS, 0))["quest"]


def rows(f: np.ndarray) -> np.ndarray:
    """A map [B,C,H,W] as the features [B·H·W,C] of its positions."""
    return f.transpose(0, 2, 3, 1).reshape(-1, f.shape[1])


@pytest.mark.parametrize(("size", "tau", "within"), [(1, 0.7, 1e-5), (100, 5000.0, 1e-3)])
def test_soft_assignment_is_a_softmax_over_squared_distances(size, tau, within):
    f, words = size * drawn(1, B, C_T, H, W), size * drawn(2, K, C_T)
    ours = assign_words(tensor(rows(f)), tensor(words), tau)
    assert ours.shape == (B * H * W, K)
    np.testing.assert_allclose(ours.exp().numpy(), rows(p_teacher(f, words, tau)), atol=within)


def test_soft_assignment_is_computed_in_fp32_under_autocast():
    f, words = tensor(drawn(1, 20, C_T)), tensor(drawn(2, K, C_T))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = assign_words(f, words, 0.1)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, assign_words(f, words, 0.1))


@pytest.mark.parametrize(
    ("parameters", "tau", "alpha"),
    [({"tau": 0.9}, 0.9, 1), ({"delta": 10.0}, 0.37, 1), ({"delta": 4.0, "alpha": 2.0}, 3.7 / 4, 2)],
)
def test_loss_is_the_mean_divergence_over_batch_and_positions(parameters, tau, alpha):
    quest_ = method(WORDS, 3.7, **parameters)
    loss = compute_loss(quest_)
    expected = quest(F_T, F_S, WORDS, term(quest_).weight.detach().numpy().astype(float), 3.0, tau)
    assert loss.item() == pytest.approx(alpha * expected, rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compute_loss(quest_), loss.detach())


@pytest.mark.parametrize(("finer_teacher", "finer_student"), [((2, 3), (1, 1)), ((1, 1), (3, 2))])
def test_finer_map_is_pooled_to_the_coarser_grid(finer_teacher, finer_student):
    (a, b), (c, d) = finer_teacher, finer_student
    f_t, f_s = drawn(1, B, C_T, a * H, b * W), drawn(3, B, C_S, c * H, d * W)
    quest_ = method(WORDS, 1.0, teacher=f_t.shape[1:], student=f_s.shape[1:], tau=0.9)
    weight = term(quest_).weight.detach().numpy().astype(float)
    expected = quest(pooled(f_t, finer_teacher), pooled(f_s, finer_student), WORDS, weight, 3.0, 0.9)
    assert compute_loss(quest_, f_t, f_s).item() == pytest.approx(expected, rel=1e-5)


def test_two_teachers_losses_are_summed():
    f_s, words = drawn(3, B, C_S, H, W), drawn(2, K, C_T)
    maps = [drawn(seed, B, C_T, H, W) for seed in (1, 9)]
    prepared = {f"{t}.map.words": tensor(words) for t in (0, 1)}
    prepared |= {f"{t}.map.mu": torch.tensor(1.0) for t in (0, 1)}
    ours, theirs = (Shapes({"map": (channels, H, W)}, vector=None, logits=2) for channels in (C_S, C_T))
    both = Quest(Parameters(tau=0.9), Setup(ours, [theirs] * 2, prepared))
    loss = both(Batch({"map": tensor(f_s)}, [{"map": tensor(f)} for f in maps], LABELS, 0))["quest"]
    expected = sum(
        quest(f, f_s, words, term(both, t).weight.detach().numpy().astype(float), 3.0, 0.9)
        for t, f in enumerate(maps)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_levels_are_summed_with_their_own_tau_and_vocabulary():
    maps = {"map@1": (C_T, 2 * H, 2 * W), "map": (C_T + 2, H, W)}
    student = {"map@1": (C_S, 2 * H, 2 * W), "map": (C_S + 1, H, W)}
    words = {"map@1": drawn(2, K, C_T), "map": drawn(5, K + 3, C_T + 2)}
    f_t = {level: drawn(6, B, *shape) for level, shape in maps.items()}
    f_s = {level: drawn(7, B, *shape) for level, shape in student.items()}
    prepared = {f"0.{level}.words": tensor(words[level]) for level in maps}
    prepared |= {f"0.{level}.mu": torch.tensor(1.0) for level in maps}
    ours, theirs = (Shapes(sizes, vector=None, logits=2) for sizes in (student, maps))
    both = Quest(Parameters(levels=("map@1", "map"), tau=(0.9, 0.4)), Setup(ours, [theirs], prepared))
    readouts = [{level: tensor(f) for level, f in each.items()} for each in (f_s, f_t)]
    weights = [term(both, i).weight.detach().numpy().astype(float) for i in range(2)]
    expected = sum(
        quest(f_t[level], f_s[level], words[level], weight, 3.0, tau)
        for level, weight, tau in zip(maps, weights, (0.9, 0.4), strict=True)
    )
    loss = both(Batch(readouts[0], [readouts[1]], LABELS, 0))["quest"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_level_is_named_alone_or_in_a_list():
    for value, levels in (("map@2", ("map@2",)), (["map@-2", "map"], ("map@-2", "map"))):
        assert parse_parameters(["quest"], {"quest.levels": value})["quest"].model_dump()["levels"] == levels


def test_tau_is_one_number_or_one_for_each_level():
    assert Parameters(tau=0.2).model_dump(mode="json")["tau"] == 0.2
    one = parse_parameters(["quest"], {"quest.tau": "0.2", "quest.levels": ["map@2", "map"]})["quest"]
    assert isinstance(one, Parameters) and one.temperature("map", 5.0) == one.temperature("map@2", 5.0) == 0.2
    several = {"quest.tau": ["0.002", "0.2"], "quest.levels": ["map@2", "map"]}
    each = parse_parameters(["quest"], several)["quest"]
    assert isinstance(each, Parameters)
    assert (each.temperature("map@2", 5.0), each.temperature("map", 5.0)) == (0.002, 0.2)
    assert each.model_dump(mode="json")["tau"] == [0.002, 0.2]
    with pytest.raises(UsageError, match="2 values of tau for 1 levels; set one, or one for each"):
        parse_parameters(["quest"], {"quest.tau": ["0.002", "0.2"]})


def test_gradients_pass_autograds_own_check_in_double_precision():
    quest_ = method(drawn(2, K, C_T), 1.0, tau=0.9).double()
    f_t = torch.from_numpy(drawn(1, B, C_T, H, W))
    one = term(quest_)

    def loss(f_s: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        own = {"terms.0.weight": weight, "terms.0.gamma": gamma}
        batch = Batch({"map": f_s}, [{"map": f_t}], LABELS, 0)
        return torch.func.functional_call(quest_, own, (batch,))["quest"]

    f_s = torch.from_numpy(drawn(3, B, C_S, H, W)).requires_grad_()
    assert torch.autograd.gradcheck(loss, (f_s, one.weight, one.gamma))


@pytest.mark.parametrize("elements", [1, K, 5 * K, 1000 * K])
def test_loss_and_its_gradients_are_the_same_in_blocks_of_any_size(elements, monkeypatch):

    def learned() -> list[torch.Tensor]:
        quest_ = method(WORDS, 1.0, tau=0.9)
        student = tensor(F_S).requires_grad_()
        loss = quest_(Batch({"map": student}, [{"map": tensor(F_T)}], LABELS, 0))["quest"]
        (3 * loss).backward()
        one = term(quest_)
        assert student.grad is not None and one.weight.grad is not None and one.gamma.grad is not None
        return [loss.detach(), student.grad, one.weight.grad, one.gamma.grad, *quest_.metrics().values()]

    whole = learned()
    monkeypatch.setattr(loss, "CPU_BLOCK", elements)
    for ours, theirs in zip(learned(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_head_is_initialized_as_in_the_paper():
    quest_ = method(drawn(2, 4000, C_T), 1.0)
    weight = term(quest_).weight.detach()
    assert weight.shape == (4000, C_S)
    assert float(weight.std()) == pytest.approx((2 / C_S) ** 0.5, rel=0.02)
    assert float(term(quest_).gamma.detach()) == 3.0
    assert {name for name, _ in quest_.named_parameters()} == {"terms.0.weight", "terms.0.gamma"}


def test_metrics_are_means_since_the_last_call():
    quest_ = method(WORDS, 1.0, tau=0.9)
    for _ in range(2):
        quest_(Batch({"map": tensor(F_S)}, [{"map": tensor(F_T)}], LABELS, 0))
    watched = {key: float(value) for key, value in quest_.metrics().items()}
    p = p_teacher(F_T, WORDS, 0.9)
    log_q = log_p_student(F_S, term(quest_).weight.detach().numpy().astype(float), 3.0)
    usage = np.bincount(p.argmax(1).ravel(), minlength=K) / p.argmax(1).size
    used = usage[usage > 0]
    assert watched["max_p_t"] == pytest.approx(p.max(1).mean(), rel=1e-5)
    assert watched["word_accuracy"] == pytest.approx((p.argmax(1) == log_q.argmax(1)).mean(), rel=1e-5)
    assert watched["perplexity"] == pytest.approx(np.exp(-(used * np.log(used)).sum()), rel=1e-4)
    assert watched["gamma"] == 3.0
    assert quest_.metrics() == {}


def test_word_accuracy_counts_one_of_several_equally_likely_words() -> None:
    weight = torch.ones(3, 2) / 2**0.5  # all words are equally likely to the student
    target = loss.TopWords(torch.tensor([[0], [2]]), torch.ones(2, 1))
    seen: list[list[bool]] = []

    def record(_word: torch.Tensor, _p: torch.Tensor, correct: torch.Tensor) -> None:
        seen.append(correct.tolist())

    loss.divergence(weight[:2], weight, torch.tensor(1.0), target, record)
    assert seen == [[True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_feature_of_zeros_stays_zero_without_gradient(dtype: torch.dtype) -> None:
    f = tensor(drawn(0, 9, C_S)).to(dtype)
    f[0] = 0
    ours, theirs = (f.clone().requires_grad_() for _ in range(2))
    unit, expected = loss.normalize(ours), torch.nn.functional.normalize(theirs, dim=1)
    pairs = (unit, ours), (expected, theirs)
    gradients = [torch.autograd.grad((x * f.flip(1)).sum(), y)[0] for x, y in pairs]
    assert torch.equal(unit[1:], expected[1:]) and torch.equal(gradients[0][1:], gradients[1][1:])
    assert not unit[0].any() and not gradients[0][0].any()
