"""Toy trainings: views of small images, plans, networks and tasks."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from questpress.models.build import build, geometry
from questpress.pipeline.data.dataset import Image, hash_array
from questpress.pipeline.data.render import Views, pack_pixels
from questpress.pipeline.data.views import ViewPolicy, ViewSchedule
from questpress.pipeline.methods.base import Batch, Features, Method, Setup, Shapes
from questpress.pipeline.methods.quest.quest import Parameters, Quest
from questpress.pipeline.runs.device import Engine
from questpress.pipeline.runs.results import Epoch
from questpress.pipeline.tasks import load_task
from questpress.pipeline.training import loop
from questpress.pipeline.training.distributed import Ranks
from questpress.pipeline.training.loop import BatchSource, train
from questpress.pipeline.training.optimizer import Plan
from questpress.pipeline.training.task import DistillationTask, Teacher
from questpress.pipeline.training.weights import Checkpoint

from tests.support.little import picture

CLASSIFICATION = load_task("classification")

SIDE, CLASSES = 16, 3
ENGINE = Engine("cpu", 1, "fp32")
POLICY = ViewPolicy("pad_crop", side=SIDE, crop=SIDE, pad=2, flip=True)


def views(count: int = 24, seed: int = 0, labeled: int | None = None) -> Views:
    """Return views of ``count`` images; only the first ``labeled`` have labels, by default all."""
    arrays = [picture(i % CLASSES, i, SIDE, SIDE) for i in range(count)]
    images = [Image(str(i), i % CLASSES, hash_array(a), a) for i, a in enumerate(arrays)]
    keys = torch.tensor([int(image.key[:16], 16) >> 1 for image in images])
    data = torch.from_numpy(np.concatenate([a.reshape(-1, 3) for a in arrays]))
    pixels = pack_pixels(data, torch.full((count, 2), SIDE))
    return Views(torch.tensor([i.label for i in images[:labeled]]), keys, POLICY, seed, SIDE, pixels)


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "epochs": 3, "batch_size": 8, "optimizer": "adamw", "lr": 2e-3, "schedule": "cosine",
        "milestones": (), "warmup_epochs": 0.5, "weight_decay": 0.05, "decay_all": False,
        "seed": 0,
    }  # fmt: skip
    return Plan(**{**values, **changes})


def network(seed: int = 0) -> torch.nn.Module:
    return build("cifar_resnet8", num_classes=CLASSES, image_size=SIDE, seed=seed)


def distillation(**changes: Any) -> DistillationTask:
    """Return the task of a student with QuEST's head and a frozen teacher."""
    torch.manual_seed(0)
    shapes = Shapes({"map": (64, SIDE // 4, SIDE // 4)}, vector=64, logits=CLASSES)
    words = torch.from_numpy(np.random.default_rng(0).random((5, 64), dtype=np.float32))
    quest = Quest(
        Parameters(words=5), Setup(shapes, [shapes], {"0.map.words": words, "0.map.mu": torch.tensor(10.0)})
    )
    g = geometry("cifar_resnet8", SIDE)
    values: dict[str, Any] = {
        "teachers": [Teacher(network(seed=7), g, ENGINE)],
        "teacher_reads": [frozenset({"map"})],
        "methods": {"quest": quest},
        "student_reads": frozenset({"map"}),
    }
    return DistillationTask(network(), g, ENGINE, **{**values, **changes}, label_task=CLASSIFICATION)


def supervised(**changes: Any) -> DistillationTask:
    return DistillationTask(
        network(), geometry("cifar_resnet8", SIDE), ENGINE, **changes, label_task=CLASSIFICATION
    )


def save_each_step(patch: pytest.MonkeyPatch) -> None:
    """Write a checkpoint after each step."""
    patch.setattr(loop, "SAVE_SECONDS", 0.0)
    patch.setattr(loop, "SAVE_FRACTION", math.inf)


def learn(
    task: DistillationTask,
    file: Path,
    *,
    given: Views | None = None,
    log: Callable[[Epoch], None] = lambda _: None,
    key: str = "key",
    **changes: Any,
) -> list[Epoch]:
    epochs: list[Epoch] = []

    def logged(epoch: Epoch) -> None:
        epochs.append(epoch)
        log(epoch)

    train(
        task, given or views(), plan(**changes), Checkpoint(file, key), training="student",
        evaluate=lambda _: None, show=lambda *_: None, log=logged,
    )  # fmt: skip
    return epochs


def batches(
    views: Views, plan: Plan, epoch: int, steps: int, begun: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    views_of = ViewSchedule(views.policy, views.seed)
    source = BatchSource(views, views_of, None, plan, Ranks(), torch.device("cpu"))
    return [(batch.pixels, batch.labels) for batch in source.batches(epoch, steps, begun)]


def state(task: DistillationTask) -> dict[str, torch.Tensor]:
    named = [*task.student.named_parameters(), *task.student.named_buffers()]
    return {key: value.detach().clone() for key, value in named}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_gradients(method: Method, read: str, f: np.ndarray, teachers: list[Features], labels: Any) -> None:
    """Compare the gradients of a method's loss with finite differences, in double precision."""

    def compute(x: torch.Tensor) -> torch.Tensor:
        [loss] = method(Batch({read: x}, teachers, torch.as_tensor(labels), 99)).values()
        return loss

    assert torch.autograd.gradcheck(compute, torch.tensor(f, requires_grad=True))
