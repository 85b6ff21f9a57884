"""KD, DKD, DIST, WTTM and logit standardization against their formulas, written out in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from questpress.pipeline import methods
from questpress.pipeline.errors import UsageError
from questpress.pipeline.methods.base import Batch, Setup, Shapes
from questpress.pipeline.methods.shapes import check_methods

from tests.support.toys import check_gradients

B, N = 5, 7
SHAPES = Shapes({}, vector=3, logits=N)
RNG = np.random.default_rng(0)
Z_S, Z_T, Z_U = (2 * RNG.standard_normal((B, N)) for _ in range(3))
LABELS = np.array([0, 3, 6, 3, 1])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum(1).mean())


def z_score(z: np.ndarray) -> np.ndarray:
    return (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True)


def decoupled_kl(z_t: np.ndarray, z_s: np.ndarray, tau: float) -> tuple[float, float]:
    rows = np.arange(B)
    p_t, p_s = softmax(z_t / tau), softmax(z_s / tau)
    binary = [np.stack([p[rows, LABELS], 1 - p[rows, LABELS]], 1) for p in (p_t, p_s)]
    rest = []
    for p in (p_t, p_s):
        others = np.array([np.delete(row, label) for row, label in zip(p, LABELS, strict=True)])
        rest.append(others / others.sum(1, keepdims=True))
    return kl(*binary), kl(*rest)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])


def loss(
    name: str, settings: dict[str, Any], teachers: list[np.ndarray], student: np.ndarray, epoch: int = 99
) -> torch.Tensor:
    method = build(name, settings, len(teachers))
    readouts = [{"logits": torch.tensor(z, dtype=torch.float32)} for z in teachers]
    given = {"logits": torch.tensor(student, dtype=torch.float32)}
    return method(Batch(given, readouts, torch.tensor(LABELS), epoch))[name]


def build(name: str, settings: dict[str, Any], teachers: int = 1) -> Any:
    of_name = {f"{name}.{key}": value for key, value in settings.items()}
    return methods.load(name)(
        methods.parse_parameters([name], of_name)[name], Setup(SHAPES, [SHAPES] * teachers, {})
    )


def test_kd_is_the_divergence_of_softened_probabilities_times_tau_squared() -> None:
    expected = 0.9 * 16 * kl(softmax(Z_T / 4), softmax(Z_S / 4))
    assert loss("kd", {}, [Z_T], Z_S).item() == pytest.approx(expected, rel=1e-5)
    expected = 0.5 * 9 * kl(softmax(Z_T / 3), softmax(Z_S / 3))
    assert loss("kd", {"tau": 3, "weight": 0.5}, [Z_T], Z_S).item() == pytest.approx(expected, rel=1e-5)


def test_kd_with_standardized_logits_is_the_divergence_of_z_scores() -> None:
    expected = 9 * 4 * kl(softmax(z_score(Z_T) / 2), softmax(z_score(Z_S) / 2))
    assert loss("kd", {"standardize": "true"}, [Z_T], Z_S).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["kd", "dkd", "sdd"])
def test_standardized_logits_of_two_classes_are_refused(name: str) -> None:
    assert np.abs(z_score(Z_T[:, :2])) == pytest.approx(0.5**0.5)
    chosen = methods.parse_parameters([name], {f"{name}.standardize": True})
    networks = ["cifar_resnet8"], "cifar_resnet8"
    check_methods(chosen, *networks, classes=3, image_size=32, images=100)
    with pytest.raises(UsageError, match=rf"--set {name}\.standardize=true .* three classes or more, got 2"):
        check_methods(chosen, *networks, classes=2, image_size=32, images=100)


def test_several_teachers_are_the_mean_of_their_softened_probabilities() -> None:
    together = (softmax(Z_T / 4) + softmax(Z_U / 4)) / 2
    expected = 0.9 * 16 * kl(together, softmax(Z_S / 4))
    assert loss("kd", {}, [Z_T, Z_U], Z_S).item() == pytest.approx(expected, rel=1e-5)


def test_dkd_weighs_the_label_and_the_rest_separately() -> None:
    target, rest = decoupled_kl(Z_T, Z_S, 4)
    expected = 16 * (1 * target + 8 * rest)
    assert loss("dkd", {}, [Z_T], Z_S).item() == pytest.approx(expected, rel=1e-4)
    expected = 16 * (0.5 * target + 2 * rest)
    assert loss("dkd", {"alpha": 0.5, "beta": 2}, [Z_T], Z_S).item() == pytest.approx(expected, rel=1e-4)


def test_dkd_takes_the_teachers_prediction_for_the_label_of_images_without_one() -> None:
    readouts = [{"logits": torch.tensor(z, dtype=torch.float32)} for z in (Z_S, Z_T)]
    predicted = torch.tensor([*LABELS[:2], *Z_T.argmax(1)[2:]])
    few, all_ = (
        build("dkd", {})(Batch(readouts[0], readouts[1:], labels, 99))["dkd"]
        for labels in (torch.tensor(LABELS[:2]), predicted)
    )
    assert few.item() == all_.item() != loss("dkd", {}, [Z_T], Z_S).item()


def test_dkd_grows_to_its_weight_over_twenty_epochs() -> None:
    full = loss("dkd", {}, [Z_T], Z_S, epoch=19).item()
    assert loss("dkd", {}, [Z_T], Z_S, epoch=0).item() == pytest.approx(full / 20, rel=1e-5)
    assert loss("dkd", {}, [Z_T], Z_S, epoch=9).item() == pytest.approx(full / 2, rel=1e-5)
    assert loss("dkd", {"warmup": 0}, [Z_T], Z_S, epoch=0).item() == pytest.approx(full, rel=1e-5)
    factor = build("dkd", {}).warmup_factor  # by which the balance divides
    assert [factor(epoch) for epoch in (0, 9, 19, 100)] == [0.05, 0.5, 1.0, 1.0]


def test_dkd_with_standardized_logits_decouples_z_scores() -> None:
    target, rest = decoupled_kl(z_score(Z_T), z_score(Z_S), 2)
    expected = 9 * 4 * (target + 8 * rest)
    assert loss("dkd", {"standardize": True}, [Z_T], Z_S).item() == pytest.approx(expected, rel=1e-4)


def test_dist_is_one_minus_pearsons_correlation_over_rows_and_columns() -> None:
    p_t, p_s = softmax(Z_T / 4), softmax(Z_S / 4)
    rows = (1 - correlation(p_t, p_s)).mean()
    columns = (1 - correlation(p_t.T, p_s.T)).mean()
    assert loss("dist", {}, [Z_T], Z_S).item() == pytest.approx(16 * 2 * (rows + columns), rel=1e-4)
    expected = 1 * (3 * (1 - correlation(softmax(Z_T), softmax(Z_S))).mean())
    measured = loss("dist", {"tau": 1, "inter": 3, "intra": 0}, [Z_T], Z_S).item()
    assert measured == pytest.approx(expected, rel=1e-4)


def wttm(z_t: np.ndarray, z_s: np.ndarray, gamma: float) -> float:
    powers, p_s = softmax(z_t) ** gamma, softmax(z_s)
    u = powers.sum(1, keepdims=True)
    return float((powers * np.log(powers / u / p_s)).sum(1).mean())  # U · p^γ/U


@pytest.mark.parametrize(("settings", "gamma", "beta"), [({}, 0.2, 4), ({"gamma": 0.7, "beta": 3}, 0.7, 3)])
def test_wttm_weighs_the_divergence_from_the_power_transform(
    settings: dict[str, Any], gamma: float, beta: float
) -> None:
    expected = beta * wttm(Z_T, Z_S, gamma)
    assert loss("wttm", settings, [Z_T], Z_S).item() == pytest.approx(expected, rel=1e-5)


def test_wttm_with_gamma_one_is_the_plain_divergence() -> None:
    expected = kl(softmax(Z_T), softmax(Z_S))
    assert loss("wttm", {"gamma": 1, "beta": 1}, [Z_T], Z_S).item() == pytest.approx(expected, rel=1e-5)


def test_wttm_of_several_teachers_has_the_mean_of_their_softened_probabilities_as_target() -> None:
    z = 5 * np.log((softmax(Z_T / 5) + softmax(Z_U / 5)) / 2)
    assert loss("wttm", {}, [Z_T, Z_U], Z_S).item() == pytest.approx(4 * wttm(z, Z_S, 0.2), rel=1e-5)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist"])
def test_loss_is_zero_if_student_equals_teacher(name: str) -> None:
    assert loss(name, {}, [Z_T], Z_T).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "standardize"),
    [("kd", False), ("kd", True), ("dkd", False), ("dkd", True), ("dist", False), ("wttm", False)],
)
def test_gradients_equal_finite_differences(name: str, standardize: bool) -> None:
    method = build(name, {"standardize": True} if standardize else {})
    check_gradients(method, "logits", Z_S, [{"logits": torch.tensor(Z_T)}], LABELS)
