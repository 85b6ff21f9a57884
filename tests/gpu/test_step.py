"""Training steps on the emulated device: the CPU's losses and gradients, and the host never waits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from questpress.models.build import build, geometry
from questpress.models.detection.regions import build_box_head
from questpress.models.readout import widen
from questpress.pipeline import methods
from questpress.pipeline.methods.base import Features, Setup
from questpress.pipeline.methods.mimic.mimic import draw_hashes
from questpress.pipeline.methods.shapes import compute_shapes
from questpress.pipeline.runs.device import Engine
from questpress.pipeline.tasks import load_task
from questpress.pipeline.training.distributed import Ranks
from questpress.pipeline.training.loop import Batch, backward
from questpress.pipeline.training.metrics import Meter
from questpress.pipeline.training.optimizer import build_optimizer, build_scaler
from questpress.pipeline.training.task import DistillationTask, Teacher
from torch import Tensor

from tests.support.emulated_cuda import Device
from tests.support.toys import plan

CLASSES, IMAGES, WORDS, HASHES = 5, 8, 7, 16
RETINANET, FASTERRCNN = "retinanet:test_efficientnet", "fasterrcnn:test_efficientnet"


@dataclass(frozen=True)
class Case:
    """What a step trains, and how."""

    method: str
    task: str = "classification"
    teacher: str = "cifar_resnet14"
    student: str = "cifar_resnet8"
    settings: Mapping[str, Any] | None = None
    is_cached: bool = False
    labeled: int = IMAGES
    micro_batch: int | None = None
    changes: Mapping[str, Any] | None = None

    @property
    def size(self) -> int:
        return 64 if self.task == "detection" else 16

    @property
    def num_classes(self) -> int:
        return 3 if self.task == "detection" else CLASSES


def prepared(name: str, setup: Setup, parameters: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = setup.teachers[0]
    if name == "quest":
        tensors = {}
        for level in parameters.levels_of(setup.student):
            tensors[f"0.{level}.words"] = torch.rand(WORDS, teacher.maps[level][0], generator=generator)
            tensors |= {f"0.{level}.mu": torch.tensor(10.0), f"0.{level}.top": torch.tensor(3)}
        return tensors
    if name == "mimic":
        channels = teacher.maps["map"][0]
        width = teacher.vector or teacher.region_vector or 9 * channels
        tensors = {"0.weight": draw_hashes(HASHES, width, 0.1, seed=0), "0.bias": torch.zeros(HASHES)}
        if teacher.region_vector:
            head = build_box_head(channels, width).state_dict()
            tensors |= {f"0.head.{key}": value for key, value in head.items()}
        return tensors
    return {}


def build_task(case: Case, engine: Engine) -> DistillationTask:
    torch.manual_seed(0)
    names = methods.parse_methods(case.method)
    chosen = methods.parse_parameters(names, {"quest.words": WORDS} if "quest" in names else {})
    if case.settings:
        chosen = methods.parse_parameters(names, case.settings)
    classes = {name: methods.load(name) for name in names}
    networks = (case.student, case.teacher)
    student, teacher = (compute_shapes(name, case.num_classes, case.size) for name in networks)
    ours, theirs = (
        build(name, num_classes=case.num_classes, image_size=case.size, seed=n)
        for n, name in enumerate(networks)
    )
    setup = Setup(student, [teacher])
    for name in names:
        if (width := classes[name].student_width(chosen[name], setup)) is not None:
            widen(ours, width, seed=0)
            setup = replace(setup, student=replace(student, vector=width))
    built = {
        name: classes[name](chosen[name], replace(setup, prepared=prepared(name, setup, chosen[name])))
        for name in names
    }
    reads = [method.reads_of_teachers[0] for method in built.values()]
    frozen = Teacher(theirs, geometry(case.teacher, case.size), engine).to(engine.device)
    return DistillationTask(
        ours, geometry(case.student, case.size), engine,
        teachers=[frozen] if names else [],
        teacher_reads=[frozenset().union(*reads)] if names else [],
        methods=built,
        student_reads=frozenset().union(*(method.reads_of_student for method in built.values())),
        balance=case.task != "detection", label_task=load_task(case.task), **(case.changes or {}),
    )  # fmt: skip


def build_batch(case: Case, device: str) -> Batch:
    generator = torch.Generator().manual_seed(3)
    shape = (IMAGES, 3, case.size, case.size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    if case.task == "multi-label":
        labels = torch.nn.functional.one_hot(labels, CLASSES).float()
    if case.task == "detection":
        labels = torch.full((IMAGES, 2, 7), -1.0)
        labels[::2, 0] = torch.tensor([1, 0.1, 0.2, 0.6, 0.9, 900, 0])
        labels[1:, 1] = torch.tensor([2, 0.4, 0.1, 0.8, 0.7, 900, 0])
    tensors = pixels, labels[: case.labeled], torch.arange(IMAGES) * 977
    return Batch(*(x.to(device) for x in tensors), None)


@torch.no_grad()
def cached(task: DistillationTask, pixels: Tensor) -> list[Features]:
    """Return the teacher's outputs as they are read from the cache."""
    [features] = task.compute_teachers(pixels)
    outputs = [output for _, method in task.student.named_methods() for output in method.cached_outputs(0)]
    kept: dict[str, Tensor] = {}
    for output in outputs:
        for name, value in output.compact(features).items():
            dtype = output.arrays[name][1]
            kept[name] = value.to({"float16": torch.float16, "uint16": torch.int16}[dtype])
    task.teachers = torch.nn.ModuleList()
    return [kept]


def train(case: Case, engine: Engine, forbid: Callable[[], Any], steps: int = 2) -> list[Tensor]:
    """Train for some steps in ``forbid()``; return sums of losses, metrics and weights."""
    task = build_task(case, engine).train()
    batch = build_batch(case, engine.device)
    if case.is_cached:
        batch = replace(batch, teachers=cached(task, batch.pixels))
    optimizer = build_optimizer(task, plan(batch_size=IMAGES))
    meter, scaler = Meter(task.device, Ranks(), task.label_task), build_scaler(task)

    with forbid():
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            backward(task, batch, case.micro_batch, meter, scaler)
            scaler.step(optimizer)
            scaler.update()
            task.end_step()
    for left in (1, 0):
        task.averages.end_epoch(left)
    values = [*meter.sums.values(), *task.metrics().values(), *task.shipped.state_dict().values()]
    assert meter.means(0)["loss"] > 0
    return [value.detach().cpu().float() for value in values]


CASES = {
    "none": Case("none"),
    **{name: Case(name) for name in methods.METHODS},
    "cached": Case("+".join(methods.METHODS), is_cached=True),
    "unlabeled images": Case("quest+kd+mimic", labeled=5),
    "micro-batch without labels": Case("quest+dkd+mimic", labeled=2, micro_batch=2),
    "quest.top": Case("quest", settings={"quest.words": WORDS, "quest.top": 3}),
    "quest.positions": Case("quest", settings={"quest.words": WORDS, "quest.positions": 4}),
    "quest.positions, cached": Case("quest", settings={"quest.positions": 4}, is_cached=True),
    "projection": Case("mimic", teacher="cifar_wrn_16_2"),
    "micro-batches": Case("quest+kd", micro_batch=3),
    "average of weights": Case("none", changes={"average_last": 2}),
    "running average": Case("none", changes={"ema": 0.9}),
    "transformer": Case("quest+kd", teacher="test_vit", student="test_efficientnet"),
    "multi-label": Case("quest+kd+mimic", task="multi-label"),
    "detection": Case("quest+mimic+pkd", "detection", RETINANET, RETINANET),
    "detection by regions": Case("mimic", "detection", FASTERRCNN, FASTERRCNN),
    "detection without labels": Case("pkd", "detection", FASTERRCNN, FASTERRCNN, labeled=1, micro_batch=4),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_step_equals_the_cpus_and_never_waits(gpu: Device, name: str) -> None:
    case = CASES[name]
    # The number of objects decides on the work of torchvision's losses of detectors.
    forbid = gpu.allow_waits if case.task == "detection" else gpu.forbid_waits
    ours = train(case, Engine("cuda", 1, "fp32"), forbid)
    theirs = train(case, Engine("cpu", 1, "fp32"), gpu.forbid_waits)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    half = train(case, Engine("cuda", 1, "bf16"), forbid, steps=1)
    assert 0.25 < half[0] / theirs[0] < 1  # the loss of one step of two


def gradients(case: Case, precision: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of a step as the backward pass computes them, over the scale, and unscaled."""
    task = build_task(case, Engine("cuda", 1, precision)).train()
    optimizer, scaler = build_optimizer(task, plan(batch_size=IMAGES)), build_scaler(task)
    batch, meter = build_batch(case, "cuda"), Meter(task.device, Ranks(), task.label_task)
    parameters = list(task.student.parameters())
    while True:
        backward(task, batch, case.micro_batch, meter, scaler)
        scaled = torch.cat([p.grad.cpu().flatten() for p in parameters if p.grad is not None])
        if scaled.isfinite().all():
            break
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    scaler.unscale_(optimizer)
    unscaled = torch.cat([p.grad.cpu().flatten() for p in parameters if p.grad is not None])
    return scaled / scaler.get_scale(), unscaled


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["cached", "micro-batches", "transformer", "detection"])
def test_gradients_of_fp16_are_those_of_fp32(name: str) -> None:
    case = replace(CASES[name], is_cached=False)
    scaled, unscaled = gradients(case, "fp16")
    expected, same = gradients(case, "fp32")
    assert scaled.equal(unscaled) and expected.equal(same)
    assert (unscaled - expected).norm() < 0.05 * expected.norm()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])  # with a fused step, and without
def test_step_of_infinite_gradients_is_skipped(optimizer: str) -> None:
    task = build_task(CASES["none"], Engine("cuda", 1, "fp16")).train()
    chosen, scaler = build_optimizer(task, plan(optimizer=optimizer, batch_size=IMAGES)), build_scaler(task)
    meter, weight = Meter(task.device, Ranks(), task.label_task), next(task.student.parameters())
    weights = [weight.detach().cpu().clone()]
    for overflows in (True, False):
        chosen.zero_grad(set_to_none=True)
        backward(task, build_batch(CASES["none"], "cuda"), None, meter, scaler)
        if overflows:
            weight.grad[0] = torch.inf
        scaler.step(chosen)
        scaler.update()
        weights.append(weight.detach().cpu().clone())
    assert weights[0].equal(weights[1]) and not weights[1].equal(weights[2])
    assert scaler.get_scale() == 2**15


def test_detector_copies_nothing_to_the_device_for_anchors_and_targets(gpu: Device) -> None:
    task = build_task(CASES["detection"], Engine("cuda", 1, "fp32"))
    batch = build_batch(CASES["detection"], "cuda")
    gpu.waits.clear()
    features = task.student.readouts(batch.pixels.float(), frozenset({"anchors"}))
    targets = task.student.readouts.network.targets(batch.labels)
    assert "a blocking copy to the device" not in gpu.waits
    assert features["anchors"].shape[1] == 4 and targets[0]["boxes"].tolist() == [
        pytest.approx([6.4, 12.8, 38.4, 57.6])
    ]
