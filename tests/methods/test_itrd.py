"""ITRD against its formulas in numpy, and the cases in which they have no value."""

from typing import Any

import numpy as np
import pytest
import torch
from questpress.pipeline import methods
from questpress.pipeline.methods import itrd
from questpress.pipeline.methods.base import Batch, Setup, Shapes

from tests.support.toys import check_gradients

B = 6
RNG = np.random.default_rng(0)
F_S, F_T, F_U = (RNG.normal(size=(B, d)) for d in (4, 5, 4))
NO_LABELS = torch.zeros(0, dtype=torch.int64)


def build(settings: dict[str, Any], *teachers: np.ndarray) -> itrd.Itrd:
    torch.manual_seed(0)
    parameters = methods.parse_parameters(["itrd"], {f"itrd.{k}": v for k, v in settings.items()})["itrd"]
    shapes = [Shapes({}, vector=f.shape[1], logits=3) for f in (F_S, *teachers)]
    return itrd.Itrd(parameters, Setup(shapes[0], shapes[1:]))


def loss(method: itrd.Itrd, *teachers: np.ndarray, f_s: np.ndarray = F_S) -> float:
    given = [{"vector": torch.from_numpy(f).float()} for f in (f_s, *teachers)]
    return method(Batch(given[0], given[1:], NO_LABELS))["itrd"].item()


def expected(
    method: itrd.Itrd, t: int, f_t: np.ndarray, correlation: float, mutual: float, alpha: float
) -> float:
    layer = method.projections[t]
    projected = F_S @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    rho = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(projected.T, f_t.T, strict=True)])
    corr = np.log2((np.abs(1 - rho * (B - 1) / B) ** (2 * alpha)).sum())
    g_s, g_t = (
        f @ f.T / np.outer(*[np.linalg.norm(f, axis=1)] * 2)
        for f in (F_S if f_t.shape[1] == F_S.shape[1] else projected, f_t)
    )
    g_st = g_s * g_t  # normalized by their traces, as in the paper
    entropies = [(g**2).sum() / np.trace(g) ** 2 for g in (g_s, g_st)]
    return correlation * corr + mutual * (entropies[0] - entropies[1])


@pytest.mark.parametrize("f_t", [F_T, F_U], ids=["wider", "equal"])
@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({}, (2, 1, 1.01)),
        ({"correlation": 0.5, "mutual": 3, "alpha": 1.5}, (0.5, 3, 1.5)),
        ({"correlation": 0}, (0, 1, 1.01)),
    ],
)
def test_loss_is_the_sum_of_correlation_and_mutual_information(
    f_t: np.ndarray, settings: dict[str, Any], values: tuple[float, float, float]
) -> None:
    method = build(settings, f_t)
    assert loss(method, f_t) == pytest.approx(expected(method, 0, f_t, *values), rel=1e-4)


def test_several_teachers_have_projections_and_the_mean_loss() -> None:
    method = build({}, F_T, F_U)
    terms = [expected(method, t, f, 2, 1, 1.01) for t, f in enumerate((F_T, F_U))]
    assert loss(method, F_T, F_U) == pytest.approx(np.mean(terms), rel=1e-4)


def test_metric_is_the_mean_correlation() -> None:
    method = build({}, F_U)
    torch.nn.init.eye_(method.projections[0].weight)
    loss(method, F_S)
    assert method.metrics()["vector_correlation"].item() == pytest.approx((B - 1) / B, rel=1e-4)
    assert not method.metrics()


@pytest.mark.parametrize(
    ("f_s", "f_t"),
    [
        (F_S, F_T * [0, 1, 1, 1, 1]),
        (F_S, np.zeros_like(F_T)),
        (np.zeros_like(F_S), F_T),
        (F_S[:1], F_T[:1]),
    ],
    ids=["dead dimension", "dead teacher", "dead student", "one image"],
)
def test_constant_dimensions_have_finite_losses_and_gradients(f_s: np.ndarray, f_t: np.ndarray) -> None:
    method = build({}, F_T)
    vector = torch.from_numpy(f_s).float().requires_grad_()
    value = method(Batch({"vector": vector}, [{"vector": torch.from_numpy(f_t).float()}], NO_LABELS))["itrd"]
    value.backward()
    assert value.isfinite() and vector.grad is not None and vector.grad.isfinite().all()


def test_equal_vectors_have_a_finite_loss() -> None:
    method = build({}, F_U)
    torch.nn.init.eye_(method.projections[0].weight)
    torch.nn.init.zeros_(method.projections[0].bias)
    assert loss(method, F_S) == pytest.approx(
        2 * np.log2(4 * B**-2.02) + (k := np.square(cosines(F_S)), (k * (1 - k)).mean())[1], rel=1e-3
    )


def cosines(f: np.ndarray) -> np.ndarray:
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    result: np.ndarray = unit @ unit.T
    return result


def test_gradients_equal_finite_differences() -> None:
    method = build({}, F_T).double()
    check_gradients(method, "vector", F_S, [{"vector": torch.from_numpy(F_T)}], NO_LABELS)
