"""SDD against DKD's formula in numpy, cell by cell."""

from typing import Any

import numpy as np
import pytest
import torch
from questpress.models.errors import ModelError
from questpress.pipeline import methods
from questpress.pipeline.methods.base import Batch, Setup, Shapes
from questpress.pipeline.methods.sdd import Sdd
from questpress.pipeline.methods.shapes import check_methods

from tests.methods.test_logit_methods import kl, softmax
from tests.support.toys import check_gradients

B, N = 5, 4
RNG = np.random.default_rng(0)
C_S, C_T = (2 * RNG.standard_normal((B, 21, N)) for _ in range(2))
LABELS = np.array([0, 3, 2, 3, 1])
SHAPES = Shapes({}, vector=3, logits=N, cells=21)


def build(settings: dict[str, Any]) -> Sdd:
    chosen = methods.parse_parameters(["sdd"], {f"sdd.{key}": value for key, value in settings.items()})
    return Sdd(chosen["sdd"], Setup(SHAPES, [SHAPES]))


def loss(settings: dict[str, Any], labels: np.ndarray = LABELS, epoch: int = 99) -> float:
    student, teacher = ({"cells": torch.from_numpy(c).float()} for c in (C_S, C_T))
    return build(settings)(Batch(student, [teacher], torch.from_numpy(labels), epoch))["sdd"].item()


def dkd(z_s: np.ndarray, z_t: np.ndarray, label: int) -> float:
    """α = 1, β = 8, τ = 4; of one cell of one image."""
    p_t, p_s = (softmax(z[None] / 4) for z in (z_t, z_s))
    binary = [np.stack([p[:, label], 1 - p[:, label]], 1) for p in (p_t, p_s)]
    rest = [np.delete(p, label, axis=1) / (1 - p[:, label]) for p in (p_t, p_s)]
    return 16 * (kl(*binary) + 8 * kl(*rest))


def expected(cells: int, labels: np.ndarray, w: float) -> float:
    losses = []
    for b, label in enumerate(labels):
        whole = C_T[b, 0].argmax() == label
        for c in range(cells):
            right = C_T[b, c].argmax() == label
            losses.append((w if whole != right else 1) * dkd(C_S[b, c], C_T[b, c], label))
    return float(np.mean(losses))


@pytest.mark.parametrize(
    ("settings", "cells", "w"),
    [({}, 21, 2), ({"finest": "2"}, 5, 2), ({"finest": 4, "complementary": 0.5}, 21, 0.5)],
)
def test_loss_weighs_cells_that_contradict_the_whole_image(
    settings: dict[str, Any], cells: int, w: float
) -> None:
    whole = C_T[:, 0].argmax(1) == LABELS
    assert whole.any() and not whole.all()  # both kinds of complementary cells occur
    assert loss(settings) == pytest.approx(expected(cells, LABELS, w), rel=1e-4)


def test_label_of_an_image_without_one_is_the_prediction_for_the_whole_image() -> None:
    complete = np.array([*LABELS[:2], *C_T[2:, 0].argmax(1)])
    assert loss({}, LABELS[:2]) == pytest.approx(expected(21, complete, 2), rel=1e-4)


def test_loss_warms_up_as_that_of_dkd() -> None:
    assert loss({}, epoch=4) == pytest.approx(loss({}) / 4, rel=1e-5)
    assert loss({"warmup": 0}, epoch=0) == loss({})


def test_several_teachers_are_the_mean_of_their_softened_probabilities() -> None:
    student, t, u = ({"cells": torch.from_numpy(c).float()} for c in (C_S, C_T, C_S[::-1].copy()))
    mean = {"cells": 4 * (((t["cells"] / 4).softmax(2) + (u["cells"] / 4).softmax(2)) / 2).log()}
    method, labels = build({}), torch.from_numpy(LABELS)
    both, one = (method(Batch(student, teachers, labels, 99))["sdd"].item() for teachers in ([t, u], [mean]))
    assert both == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(("settings", "cells"), [({}, 21), ({"finest": 2}, 5)])
def test_cells_that_are_read_are_cached_in_half_precision(settings: dict[str, Any], cells: int) -> None:
    method = build(settings)
    [output] = method.cached_outputs(0)
    cached = output.compact({"cells": torch.from_numpy(C_T).float()})
    assert torch.equal(cached["cells"], torch.from_numpy(C_T[:, :cells]).half())
    chosen = methods.parse_parameters(["sdd"], {f"sdd.{key}": value for key, value in settings.items()})
    assert output.bytes_per_image == Sdd.cached_bytes(chosen["sdd"], SHAPES, SHAPES) == cells * N * 2
    batch = Batch({"cells": torch.from_numpy(C_S).float()}, [cached], torch.from_numpy(LABELS), 99)
    assert method(batch)["sdd"].item() == pytest.approx(loss(settings), rel=5e-3)


@pytest.mark.parametrize("networks", [("cifar_resnet8", "mobilenetv3_small_050"), ("vgg11", "cifar_resnet8")])
def test_networks_whose_classifier_is_not_linear_on_the_map_are_refused(
    networks: tuple[str, str],
) -> None:
    teacher, student = networks
    chosen = methods.parse_parameters(["sdd"], {})
    with pytest.raises(ModelError, match=r"--method sdd .* does not classify the mean of its map"):
        check_methods(chosen, [teacher], student, classes=3, image_size=32, images=100)
    check_methods(chosen, ["cifar_resnet8"], "resnet10t", classes=3, image_size=32, images=100)


def test_gradients_equal_finite_differences() -> None:
    check_gradients(build({"finest": 2}), "cells", C_S, [{"cells": torch.from_numpy(C_T)}], LABELS)
