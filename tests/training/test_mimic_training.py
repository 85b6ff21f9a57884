"""Training with a projection of the student's vector to the teacher's width."""

from pathlib import Path
from typing import Any

import pytest
import torch
from questpress.models.build import build, geometry
from questpress.models.readout import Widened, widen
from questpress.pipeline.methods.base import Setup, Shapes
from questpress.pipeline.methods.mimic import mimic
from questpress.pipeline.training.optimizer import build_optimizer
from questpress.pipeline.training.task import DistillationTask, Teacher
from torch import nn

from tests.support.toys import CLASSES, CLASSIFICATION, ENGINE, SIDE, learn, network, plan

WIDTH, HASHES = 128, 40


def widened(
    engine: Any = ENGINE, alone: int = 0, variant: Any = "lshl2_s", **changes: Any
) -> DistillationTask:
    """Build a task of a student with a vector of 64 numbers and a teacher with one of 128."""
    student = network()
    widen(student, WIDTH, seed=0)
    shapes = Shapes({}, vector=WIDTH, logits=CLASSES)
    method = mimic.Mimic(
        mimic.Parameters(alone=alone, variant=variant),
        Setup(
            shapes,
            [shapes],
            {"0.weight": mimic.draw_hashes(HASHES, WIDTH, 0.1, seed=0), "0.bias": torch.zeros(HASHES)},
        ),
    )
    g = geometry("cifar_resnet8", SIDE)
    teacher = build("cifar_wrn_16_2", num_classes=CLASSES, image_size=SIDE, seed=7)
    values: dict[str, Any] = {
        "teachers": [Teacher(teacher, g, ENGINE)],
        "teacher_reads": [frozenset({"vector", "logits"})],
        "methods": {"mimic": method},
        "student_reads": frozenset({"vector"}),
        "balance": True,
    }
    return DistillationTask(student, g, engine, **{**values, **changes}, label_task=CLASSIFICATION)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return images, torch.arange(8) % CLASSES


@pytest.mark.parametrize("average", [{}, {"ema": 0.5}, {"average_last": 2}])
def test_shipped_network_has_the_projection_merged(tmp_path: Path, average: dict[str, Any]) -> None:
    task = widened(**average)
    learn(task, tmp_path / "c.pt")
    plain = network()
    plain.load_state_dict(task.shipped.state_dict(), strict=True)
    images = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    learned = task.averages.shipped
    assert isinstance(learned.get_classifier(), Widened)  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), learned.eval()(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_first_epochs_train_only_the_projection(optimizer: str) -> None:
    task = widened(alone=1, variant="lshl2").train()
    moves = build_optimizer(task, plan(optimizer=optimizer, weight_decay=0.1, decay_all=True))
    moved: list[set[str]] = []
    for task.epoch in (0, 1):
        before = {name: value.detach().clone() for name, value in task.network.named_parameters()}
        moves.zero_grad(set_to_none=True)
        task(*batch())["loss"].backward()
        moves.step()
        task.end_step()
        after = dict(task.network.named_parameters())
        moved.append({name for name, value in before.items() if not torch.equal(value, after[name])})
    assert moved == [{"fc.embed.weight", "fc.embed.bias"}, set(before)]


def test_weights_are_balanced_after_the_epochs_of_the_projection() -> None:
    task = widened(alone=1, variant="lshl2").train()
    task(*batch())
    task.end_step()
    assert task.balanced_weights() == []
    task.epoch = 1
    task(*batch())
    task.end_step()
    [found] = task.balanced_weights()
    assert found.ratio > 0


def test_network_with_a_projection_can_be_compiled() -> None:
    task = widened(variant="lshl2", balance=False).eval()
    plain = task(*batch())
    called: list[nn.Module] = []
    real = task.network.forward_features

    def features(x: torch.Tensor) -> torch.Tensor:
        called.append(task.network)
        return real(x)  # type: ignore[operator,no-any-return]

    task.student.readouts.compiled["forward_features"] = features
    compiled = task(*batch())
    assert called
    torch.testing.assert_close(compiled["loss"], plain["loss"])
    torch.testing.assert_close(compiled["output"], plain["output"])
