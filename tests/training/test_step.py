"""A training step never waits for a GPU; memory layout and fused optimizer change no result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from questpress.models.build import build, geometry
from questpress.pipeline import methods
from questpress.pipeline.methods.base import Setup, Shapes
from questpress.pipeline.runs.device import Engine
from questpress.pipeline.training.distributed import Ranks
from questpress.pipeline.training.metrics import Meter
from questpress.pipeline.training.optimizer import Plan, build_optimizer
from questpress.pipeline.training.task import DistillationTask, Teacher

from tests.support.toys import CLASSIFICATION

SIDE, CLASSES, BATCH = 16, 5, 8
FP32 = Engine("cpu", 1, "fp32")
SUMS = ("none", "quest", "kd", "dkd", "dist", "quest+kd")


def plan(optimizer: str = "adamw", **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "epochs": 40, "batch_size": BATCH, "optimizer": optimizer, "lr": 2e-3, "schedule": "cosine",
        "milestones": (), "warmup_epochs": 0.0, "weight_decay": 0.05, "decay_all": False,
        "seed": 0,
    }  # fmt: skip
    return Plan(**{**values, **changes})


def distillation(method: str, engine: Engine, balance: bool = True) -> DistillationTask:
    """Build the task of a student, a method and a teacher."""
    torch.manual_seed(0)
    names = methods.parse_methods(method)
    parameters = methods.parse_parameters(names, {"quest.words": 7} if "quest" in names else {})
    classes = {name: methods.load(name) for name in names}
    shapes = Shapes({"map": (64, SIDE // 4, SIDE // 4)}, vector=64, logits=CLASSES)
    prepared = {"0.map.words": torch.rand(7, 64), "0.map.mu": torch.tensor(10.0)}
    g = geometry("cifar_resnet8", SIDE)
    teacher = build("cifar_resnet14", num_classes=CLASSES, image_size=SIDE, seed=1)
    reads = frozenset().union(*(classes[name].reads(parameters[name], shapes) for name in names))
    return DistillationTask(
        build("cifar_resnet8", num_classes=CLASSES, image_size=SIDE, seed=0), g, engine,
        teachers=[Teacher(teacher, g, engine).to(engine.device)] if names else [],
        teacher_reads=[reads] if names else [],
        methods={
            name: classes[name](
                parameters[name], Setup(shapes, [shapes], prepared if name == "quest" else {})
            )
            for name in names
        },
        student_reads=reads, balance=balance, label_task=CLASSIFICATION,
    )  # fmt: skip


def batch(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return images.to(device), torch.randint(0, CLASSES, (BATCH,), generator=generator).to(device)


def stepper(task: DistillationTask, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a function that runs the loop's step on one batch."""
    images, labels = batch(str(task.device))
    meter = Meter(task.device, Ranks(), task.label_task)

    def step() -> None:
        result = task(images, labels)
        optimizer.zero_grad(set_to_none=True)
        result["loss"].backward()
        optimizer.step()
        meter.add(result, labels, len(labels))

    return step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", SUMS)
def test_step_does_not_synchronize_with_a_gpu(method: str, precision: str) -> None:
    task = distillation(method, Engine("cuda", 1, precision)).train()
    step = stepper(task, build_optimizer(task, plan()))
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(task: DistillationTask, seed: int) -> None:
    """Set random gradients with the memory layout of their parameters, as autograd does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in task.trainable_module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(drawn)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_moments_saved_in_another_layout_are_restored(optimizer: str) -> None:
    results = []
    for layout in ("contiguous", "channels_last"):
        task = distillation("quest", Engine("cpu", 1, "fp32", layout="contiguous"))
        made = build_optimizer(task, plan(optimizer))
        for step in range(3):
            gradients(task, step)
            made.step()
        task.use(Engine("cpu", 1, "fp32", layout=layout))
        resumed = build_optimizer(task, plan(optimizer))
        resumed.load_state_dict(made.state_dict())
        gradients(task, 9)
        resumed.step()
        results.append(list(task.trainable_module.parameters()))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["lamb", "nadamw"])
def test_optimizer_without_fused_step_is_not_fused(optimizer: str) -> None:
    task = distillation("none", FP32).train()
    stepper(task, build_optimizer(task, plan(optimizer)))()


def test_memory_layout_changes_no_result() -> None:
    engines = FP32, Engine("cpu", 1, "fp32", layout="contiguous")
    tasks = [distillation("quest+kd", engine).eval() for engine in engines]
    last, first = (task.network.get_parameter("layer1.0.conv1.weight") for task in tasks)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    assert first.is_contiguous()
    channels_last, contiguous = (task(*batch()) for task in tasks)
    assert channels_last.keys() == contiguous.keys()
    for name in channels_last:
        torch.testing.assert_close(channels_last[name], contiguous[name], rtol=1e-4, atol=1e-5)
