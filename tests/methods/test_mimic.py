"""Feature mimicking against its formulas in numpy, its hashes, and students of another width in a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from questpress.models.build import build
from questpress.pipeline import methods
from questpress.pipeline.errors import JobError, UsageError
from questpress.pipeline.methods import base
from questpress.pipeline.methods.base import Batch, PrepareContext, Setup, Shapes
from questpress.pipeline.methods.mimic import mimic
from questpress.pipeline.runs.cache import Cache
from questpress.pipeline.runs.hashes import digest
from safetensors.torch import load_file

from tests.support import little
from tests.support.toys import check_gradients

B, D, N, M = 6, 5, 4, 7
RNG = np.random.default_rng(0)
F_T, F_U, F_S = (np.maximum(RNG.normal(size=(B, D)), 0) for _ in range(3))
Z_T, WEIGHT, BIAS = RNG.normal(size=(B, N)), RNG.normal(size=(M, D)), RNG.normal(size=M)
LABELS = np.array([*Z_T.argmax(1)[:3], *Z_T.argmin(1)[3:]])  # the teacher is right on the first three


def shapes(width: int = D, classes: int = N) -> Shapes:
    return Shapes({}, vector=width, logits=classes)


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).float()


def made(settings: Mapping[str, Any], teachers: int = 1, classes: int = N) -> mimic.Mimic:
    hashes = {"weight": tensor(WEIGHT), "bias": tensor(BIAS)}
    prepared = {f"{t}.{key}": value for t in range(teachers) for key, value in hashes.items()}
    kind = methods.parse_parameters(["mimic"], {f"mimic.{key}": value for key, value in settings.items()})[
        "mimic"
    ]
    return mimic.Mimic(kind, Setup(shapes(teachers * D), [shapes(classes=classes)] * teachers, prepared))


def loss(settings: Mapping[str, Any], labels: np.ndarray = LABELS, classes: int = N) -> float:
    teacher = {"vector": tensor(F_T), "logits": tensor(Z_T)}
    method = made(settings, classes=classes)
    return method(Batch({"vector": tensor(F_S)}, [teacher], torch.from_numpy(labels), 0))["mimic"].item()


def l2(f_s: np.ndarray, f_t: np.ndarray) -> np.ndarray:
    """Of each sample."""
    return ((f_s - f_t) ** 2).mean(1)


def hashing(f_s: np.ndarray, f_t: np.ndarray) -> np.ndarray:
    a_s, a_t = f_s @ WEIGHT.T + BIAS, f_t @ WEIGHT.T + BIAS
    p = 1 / (1 + np.exp(-a_s))
    return -np.where(a_t > 0, np.log(p), np.log(1 - p)).mean(1)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("l2", l2(F_S, F_T).mean()),
        ("lsh", hashing(F_S, F_T).mean()),
        ("lshl2", (l2(F_S, F_T) + hashing(F_S, F_T)).mean()),
        ("lshl2_s", (l2(F_S, F_T) + hashing(F_S, F_T))[:3].mean()),
    ],
)
def test_each_variant_is_its_formula_times_beta(variant: str, expected: float) -> None:
    assert loss({"variant": variant}) == pytest.approx(6 * expected, rel=1e-5)
    assert loss({"variant": variant, "beta": 0.5}) == pytest.approx(0.5 * expected, rel=1e-5)


def test_images_without_labels_are_matched_whatever_the_teacher_predicts() -> None:
    losses = l2(F_S, F_T) + hashing(F_S, F_T)
    assert loss({}, LABELS[:1]) == pytest.approx(6 * losses.mean(), rel=1e-5)
    wrong = Z_T.argmin(1)[:2]
    assert loss({}, wrong) == pytest.approx(6 * losses[2:].mean(), rel=1e-5)
    method, teacher = made({}), {"vector": tensor(F_T), "logits": tensor(Z_T)}
    method(Batch({"vector": tensor(F_S)}, [teacher], torch.from_numpy(LABELS[:4]), 0))
    assert method.metrics()["teacher_right"].item() == 0.75  # of those with labels


def test_default_variant_depends_on_the_teachers_head() -> None:
    assert loss({}) == loss({"variant": "lshl2_s"})
    assert loss({}, classes=0) == loss({"variant": "lshl2"})
    assert mimic.Mimic.teacher_reads(mimic.Parameters(), shapes(classes=0)) == {"vector"}
    assert mimic.Mimic.teacher_reads(mimic.Parameters(), shapes()) == {"vector", "logits"}
    assert mimic.Mimic.teacher_reads(mimic.Parameters(variant="lshl2"), shapes()) == {"vector"}


def test_multi_label_samples_are_not_masked() -> None:
    several = np.zeros((B, N), np.float32)
    several[:, :2] = 1
    assert loss({}, several) == loss({"variant": "lshl2"})


def test_loss_is_zero_if_the_teacher_is_always_wrong() -> None:
    f_s = tensor(F_S).requires_grad_()
    teacher = {"vector": tensor(F_T), "logits": tensor(Z_T)}
    result = made({})(Batch({"vector": f_s}, [teacher], torch.from_numpy(Z_T.argmin(1)), 0))["mimic"]
    result.backward()
    assert result.item() == 0
    assert f_s.grad is not None and not f_s.grad.any()


def test_each_teacher_is_matched_by_its_part_of_the_vector() -> None:
    teachers = [{"vector": tensor(f), "logits": tensor(Z_T)} for f in (F_T, F_U)]
    student = {"vector": tensor(np.concatenate([F_S, F_U], 1))}
    method = made({"variant": "lshl2"}, teachers=2)
    expected = np.mean([l2(F_S, F_T) + hashing(F_S, F_T), hashing(F_U, F_U)])
    result = method(Batch(student, teachers, torch.from_numpy(LABELS), 0))["mimic"].item()
    assert result == pytest.approx(6 * expected, rel=1e-5)
    keys = ("feature_distance", "equal_bits")
    assert set(method.metrics()) == {f"{key} ({t})" for key in keys for t in (0, 1)}


@pytest.mark.parametrize("variant", ["l2", "lsh", "lshl2", "lshl2_s"])
def test_gradients_equal_finite_differences(variant: str) -> None:
    teacher = {"vector": torch.from_numpy(F_T), "logits": torch.from_numpy(Z_T)}
    check_gradients(made({"variant": variant}), "vector", F_S, [teacher], LABELS)


def test_metrics_measure_the_feature_distance() -> None:
    method = made({})
    teacher = {"vector": tensor(F_T), "logits": tensor(Z_T)}
    method(Batch({"vector": tensor(F_T)}, [teacher], torch.from_numpy(LABELS), 0))
    watched = {key: value.item() for key, value in method.metrics().items()}
    assert watched == {"feature_distance": 0, "equal_bits": 1, "teacher_right": 0.5}
    assert method.metrics() == {}


def test_cached_vectors_give_the_rounded_loss() -> None:
    method = made({})
    teacher = {"vector": tensor(F_T), "logits": tensor(Z_T)}
    cached: dict[str, torch.Tensor] = {}
    for output in method.cached_outputs(0):
        cached |= output.compact(teacher)
    assert sum(output.bytes_per_image for output in method.cached_outputs(0)) == 2 * (D + N)
    result = method(Batch({"vector": tensor(F_S)}, [cached], torch.from_numpy(LABELS), 0))["mimic"].item()
    assert result == pytest.approx(loss({}), rel=2e-3)


def test_many_hashes_without_bias_order_pairs_by_their_angle() -> None:
    rng = np.random.default_rng(1)
    width, hashes = 16, 40_000
    weight = mimic.draw_hashes(hashes, width, std=0.03, seed=3)
    f = rng.normal(size=width)
    angles = np.linspace(0.05, 3.0, 12)
    side = rng.normal(size=width)
    side -= side @ f / (f @ f) * f
    others = [
        rng.uniform(0.1, 9) * (np.cos(x) * f / np.linalg.norm(f) + np.sin(x) * side / np.linalg.norm(side))
        for x in angles
    ]
    bits = mimic.project(tensor(np.stack([f, *others])), weight, torch.zeros(hashes)) > 0
    equal = (bits[:1] == bits[1:]).float().mean(1).numpy()
    # A share of 40,000 bits has a standard error of at most 0.0025.
    np.testing.assert_allclose(equal, 1 - angles / np.pi, atol=0.01)
    assert (np.diff(equal) < 0).all()


@pytest.mark.parametrize("n", [1, 50, 51])
def test_medians_in_blocks_are_numpys(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(2).normal(size=(n, D)).astype(np.float32)
    weight = mimic.draw_hashes(11, D, 0.5, seed=0)
    expected = np.median(features @ weight.numpy().T, axis=0)
    for block in (1, 3 * n, mimic.BLOCK):
        monkeypatch.setattr(mimic, "BLOCK", block)
        result = mimic.compute_medians(features, weight, torch.device("cpu"))
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


class Context:
    """The context of `prepare` for the vectors of one teacher, with a cache."""

    def __init__(self, tmp_path: Path, vectors: np.ndarray, classifier: np.ndarray | None) -> None:
        self.path, self.vectors, self.classifier = tmp_path, tensor(vectors), classifier
        self.reads, self.notes = 0, []

    def readouts(self, _t: int, _reads: frozenset[str]) -> Any:
        self.reads += 1
        return ({"vector": batch} for batch in self.vectors.split(7))

    def shared(self, _t: int, kind: str, key: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        cache, name = Cache(self.path), digest(key)
        return cache.get(kind, name) or cache.put(kind, name, write)

    def prepare(self, **settings: Any) -> Any:
        teacher = shapes(self.vectors.shape[1], 0 if self.classifier is None else N)
        preparation = PrepareContext(
            student=shapes(), teachers=[teacher], teacher_names=["teacher"], images=len(self.vectors),
            features=self.readouts, cached=self.shared, scratch=self.path, seed=5, note=self.notes.append,
            classifier=lambda _t: None if self.classifier is None else tensor(self.classifier),
        )  # fmt: skip
        return mimic.Mimic.prepare(mimic.Parameters(**settings), preparation)


def test_hashes_depend_on_the_seed_and_the_std_of_the_classifier(tmp_path: Path) -> None:
    context = Context(tmp_path, RNG.normal(size=(30, D)), classifier=0.25 * RNG.normal(size=(N, D)))
    first, again = context.prepare(hashes=900), context.prepare(hashes=900)
    weight = first.tensors["0.weight"]
    assert weight.shape == (900, D) and torch.equal(weight, again.tensors["0.weight"])
    assert context.reads == 1  # the second run reads the cache
    std = np.std(context.classifier, ddof=1)
    assert first.facts["hashes"][0]["std"] == pytest.approx(std, rel=1e-5)
    assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_hash_std_without_a_head_is_one_over_root_width(tmp_path: Path) -> None:
    result = Context(tmp_path, RNG.normal(size=(30, D)), classifier=None).prepare()
    assert result.facts["hashes"][0] == {
        "teacher": "teacher", "hashes": 32 * D, "std": pytest.approx(D**-0.5), "bias": "median"
    }  # fmt: skip


def test_bias_is_the_negative_median_mean_or_zero(tmp_path: Path) -> None:
    vectors = RNG.gamma(1.0, size=(31, D))
    context = Context(tmp_path, vectors, classifier=RNG.normal(size=(N, D)))
    for bias, center in (("median", np.median), ("mean", np.mean)):
        result = context.prepare(bias=bias).tensors
        projected = vectors.astype(np.float32) @ result["0.weight"].numpy().T
        np.testing.assert_allclose(result["0.bias"], -center(projected, axis=0), rtol=1e-4, atol=1e-5)
    reads = context.reads
    assert not context.prepare(bias="zero").tensors["0.bias"].any()
    assert context.prepare(variant="l2").tensors == {}
    assert context.reads == reads  # neither reads the images


def test_median_of_many_features_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimic, "MAX_NUMBERS", 10 * D)
    vectors = np.arange(40.0)[:, None] * np.ones((1, D))
    context = Context(tmp_path, vectors, classifier=None)
    result = context.prepare().tensors
    taken = np.arange(3, 40, 4.0)  # one of every four
    expected = np.median(taken[:, None] * result["0.weight"].numpy().sum(1), axis=0)
    np.testing.assert_allclose(result["0.bias"], -expected, rtol=1e-4, atol=1e-5)
    assert context.notes == ["the median of the hashes is computed from 10 of 40 images"]


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    vectors = RNG.normal(size=(9, D))
    vectors[4, 2] = np.nan
    with pytest.raises(JobError, match="teacher: its vectors are not finite"):
        Context(tmp_path, vectors, classifier=None).prepare()


@pytest.mark.parametrize(("width", "hashes"), [(64, 2048), (128, 4096), (256, 8192), (512, 2048)])
def test_there_are_32_hashes_for_each_number_of_a_narrow_vector(width: int, hashes: int) -> None:
    teacher = base.Shapes({}, width, 10)
    assert mimic.Parameters().hashes_for(teacher) == hashes
    assert mimic.Parameters(hashes=7).hashes_for(teacher) == 7


def test_hash_parameters_without_hashes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"mimic\.hashes=9 has no effect"):
        mimic.Mimic.check(mimic.Parameters(variant="l2", hashes=9), Setup(shapes(), [shapes()]), 10)


def mimicking(data: Path, out: Path, cache: Path, *more: str) -> Result:
    return little.compress(
        *WIDE, *little.SMALL, *little.SHORT, "--method", "mimic", "--set", "mimic.hashes=64",
        "--data", data, "--out", out, "--cache", cache, "--until", "export", *more,
    )  # fmt: skip


WIDE = ("--teacher", "cifar_wrn_16_2", "--teacher-weights", "none", "--student", "cifar_resnet8")


@pytest.mark.parametrize("more", [(), ("--ema", "0.5", "--cache-views", "2", "--set", "mimic.variant=lshl2")])
def test_student_of_another_width_ships_as_the_plain_network(
    data: Path, cache: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    little.check_success(mimicking(data, out, cache, *more))
    plain = build("cifar_resnet8", num_classes=3, image_size=16, seed=0)
    shipped = load_file(out / "student.safetensors")
    assert {key: value.shape for key, value in shipped.items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    assert little.report(out)["student"]["parameters"] == sum(p.numel() for p in plain.parameters())
    prepared = load_file(out / "prepared.safetensors")
    assert prepared["mimic.0.weight"].shape == (64, 128)
    report = little.report(out)
    assert report["hashes"][0]["hashes"] == 64
    assert set(report["epochs"][-1]["losses"]) == {"loss", "ce", "mimic"}
    assert 0 < report["epochs"][-1]["metrics"]["equal_bits"] <= 1


def test_projection_is_first_trained_alone(data: Path, cache: Path, tmp_path: Path) -> None:
    more = ("--set", "mimic.alone=1", "--epochs", "2", "--optimizer", "sgd", "--average-last", "2")
    little.check_success(mimicking(data, tmp_path / "run", cache, *more))
    first, second = (
        set(x["losses"]) for x in little.report(tmp_path / "run")["epochs"] if x["stage"] == "student"
    )
    assert first == {"loss", "mimic"} and second == {"loss", "ce", "mimic"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--set", "mimic.alone=2"), "mimic.alone=2 must be less than --epochs"),
        (("--set", "mimic.alone=1", "--student", "cifar_wrn_16_2"), "requires a projection"),
    ],
)
def test_invalid_projection_epochs_are_refused(
    more: tuple[str, ...], message: str, data: Path, cache: Path, tmp_path: Path
) -> None:
    little.refused(mimicking(data, tmp_path / "run", cache, *more), 2, message)
