"""`--balance auto`: measured ratios, adjusted weights, resuming."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from questpress.models.build import build, geometry
from questpress.pipeline.api.options import read_options
from questpress.pipeline.api.resolve import resolve
from questpress.pipeline.methods.base import Batch, Setup, Shapes
from questpress.pipeline.methods.gradient_balance import STEPS, GradientBalance, gradient_norm
from questpress.pipeline.methods.kd import Kd, Parameters
from questpress.pipeline.methods.quest.quest import Quest
from questpress.pipeline.training.task import DistillationTask
from torch import Tensor

from tests.support import little
from tests.support.toys import CLASSIFICATION, ENGINE, distillation

SHAPES = Shapes({}, vector=None, logits=3)
LEAST, MOST = Kd.gradient_ratio


def kd() -> Kd:
    return Kd(Parameters(), Setup(SHAPES, [SHAPES], {}))


def step(balance: GradientBalance, r: float) -> None:
    """Measure a step in which the method's gradient is r times that of the cross-entropy."""
    f_s = torch.tensor([[3.0, -2.0]], requires_grad=True)
    cross_entropy = (f_s * torch.tensor([0.6, 0.8])).sum()
    assert balance.is_measuring
    balance.measure({"kd": (f_s * torch.tensor([-r, 0.0])).sum()}, cross_entropy, f_s)
    balance.end_step()


def test_gradient_norm_of_a_loss_is_that_of_its_gradient_on_the_map() -> None:
    f_s = torch.randn(2, 3, 4, 5, requires_grad=True)
    assert float(gradient_norm((3 * f_s[0, 0]).sum(), f_s)) == pytest.approx(3 * 20**0.5)
    assert float(gradient_norm((torch.ones(1, requires_grad=True)).sum(), f_s)) == 0


@pytest.mark.parametrize("r", [LEAST * 1.01, (LEAST * MOST) ** 0.5, MOST * 0.99])
def test_weight_within_the_range_is_unchanged(r: float) -> None:
    balance = GradientBalance({"kd": kd()})
    step(balance, r)
    assert float(balance.factors()["kd"]) == 1


@pytest.mark.parametrize(("r", "end"), [(MOST * 40, MOST), (LEAST / 50, LEAST)])
def test_weight_outside_the_range_is_scaled_to_the_nearer_end(r: float, end: float) -> None:
    balance = GradientBalance({"kd": kd()})
    step(balance, r)
    assert float(balance.factors()["kd"]) == pytest.approx(end / r, rel=1e-5)


def test_ratio_is_the_geometric_mean_over_the_first_steps_and_then_stays() -> None:
    balance = GradientBalance({"kd": kd()})
    for number in range(STEPS):
        step(balance, 1000.0 if number % 2 else 10.0)
    [entry] = balance.results()
    assert entry.ratio == pytest.approx(100, rel=1e-4)
    assert entry.factor == pytest.approx(MOST / 100, rel=1e-4)
    assert not balance.is_measuring


def test_ratio_is_measured_only_in_training() -> None:
    balance = GradientBalance({"kd": kd()})
    assert balance.is_measuring
    assert not balance.eval().is_measuring
    with torch.no_grad():
        assert not balance.train().is_measuring


@pytest.mark.parametrize("r", [None, 1e-5])
def test_loss_without_gradient_on_the_map_is_unchanged_and_not_reported(r: float | None) -> None:
    balance = GradientBalance({"kd": kd()})
    f_s = torch.ones(2, requires_grad=True)
    loss = torch.ones(1, requires_grad=True).sum() if r is None else r * f_s.sum()
    balance.measure({"kd": loss}, f_s.sum(), f_s)
    balance.end_step()
    assert float(balance.factors()["kd"]) == 1
    assert balance.results() == []


def compute_losses(weight: float) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Return the losses of a batch without and with balance, and the expected factor between them."""
    torch.manual_seed(1)
    images, labels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 2] * 2)
    plain, balanced = (distillation(weights={"quest": weight}, balance=on) for on in (False, True))
    # Training mode changes the statistics of BatchNorm only, which do not affect losses of the same step.
    module, teacher = plain.trainable_module, plain.teachers[0](images, frozenset({"map"}))
    student = module.readouts(module.normalize(images), frozenset({"map", "logits"}))
    quest = module.methods["quest"](Batch(student, [teacher], labels))["quest"]
    gradients = [
        torch.autograd.grad(loss, student["map"], retain_graph=True)[0].norm()
        for loss in (weight * quest, F.cross_entropy(student["logits"], labels))
    ]
    r = float(gradients[0] / gradients[1])
    expected = min(max(r, Quest.gradient_ratio[0]), Quest.gradient_ratio[1]) / r
    return plain(images, labels), balanced(images, labels), expected


@pytest.mark.parametrize("weight", [1000.0, 0.01])
def test_losses_are_scaled_by_their_gradients(weight: float) -> None:
    without, with_, factor = compute_losses(weight)
    assert factor != 1
    assert with_["quest"].item() == pytest.approx(factor * without["quest"].item(), rel=1e-4)
    assert with_["ce"].item() == without["ce"].item()
    assert with_["loss"].item() == pytest.approx((with_["ce"] + with_["quest"]).item(), rel=1e-6)


@pytest.mark.parametrize("student", ["cifar_vgg8", "cifar_resnet8", "resnet10t", "mobilenetv3_small_050"])
def test_last_map_is_on_the_path_to_the_logits(student: str) -> None:
    module = DistillationTask(
        build(student, num_classes=3, image_size=32, seed=0), geometry(student, 32), ENGINE,
        methods={"kd": kd()}, balance=True, label_task=CLASSIFICATION,
    ).trainable_module  # fmt: skip
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    read = module.readouts(module.normalize(images), module.reads)
    assert float(gradient_norm(read["logits"].square().sum(), read[module.last_map])) > 0
    assert read[module.last_map].dim() == 4


def test_run_reports_the_balance(data: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    heavy = ("--weight", "quest=500", "--until", "student", "--epochs", "1")
    result = little.check_success(little.job(data, out, cache, *heavy, "--balance", "auto"))
    assert "the weight of quest was multiplied by" in result.stderr
    report = json.loads((out / "report.json").read_text())
    [entry] = report["balance"]
    assert (entry["method"], entry["low"], entry["high"]) == ("quest", 8, 16), "a student from scratch"
    assert entry["factor"] == pytest.approx(entry["high"] / entry["ratio"], rel=1e-4)
    assert "balance.quest" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "auto"),
        ({"weight": ["quest=2"]}, "off"),
        ({"weight": ["ce=2"]}, "auto"),
        ({"settings": ["quest.alpha=1"]}, "off"),
        ({"settings": ["quest.delta=12"]}, "auto"),
        ({"weight": ["quest=2"], "balance": "auto"}, "auto"),
        ({"recipe": "kd-cifar100"}, "off"),
        ({"recipe": "kd-cifar100", "balance": "auto"}, "auto"),
        ({"method": "none"}, "off"),
    ],
)
def test_balance_is_off_with_set_weights_and_recipes(
    options: dict[str, object], chosen: str, data: Path
) -> None:
    given = {"teacher": little.TEACHER, "student": little.STUDENT, "data": str(data), **options}
    assert resolve(read_options(given))[0].balance == chosen
