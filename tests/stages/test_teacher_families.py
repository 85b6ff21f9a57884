"""QuEST learns from a teacher of any family that has a feature map."""

from collections.abc import Mapping

import pytest
import torch
from questpress.models.build import build, geometry
from questpress.models.errors import ModelError
from questpress.pipeline import methods
from questpress.pipeline.methods import base
from questpress.pipeline.methods.base import Setup
from questpress.pipeline.methods.quest.quest import Parameters, Quest
from questpress.pipeline.methods.shapes import check_methods, compute_shapes
from questpress.pipeline.runs.device import Engine
from questpress.pipeline.tasks import load_task
from questpress.pipeline.training.task import DistillationTask, Teacher

CLASSIFICATION = load_task("classification")

STUDENT, SIZE, CLASSES, WORDS = "mobilenetv2_035", 64, 3, 6
ENGINE = Engine("cpu", 1, "fp32")

# Teacher and the (C, H, W) of the map it teaches with at 64 px.
FAMILIES = {
    "resnet18": (512, 2, 2), "mobilenetv3_small_050": (288, 2, 2), "efficientnet_b0": (1280, 2, 2),
    "convnext_atto": (320, 2, 2), "vit_tiny_patch16_224": (192, 4, 4),
    "swin_tiny_patch4_window7_224": (768, 2, 2), "vgg11_bn": (512, 4, 4), "regnety_002": (368, 2, 2),
}  # fmt: skip


def checked(chosen: Mapping[str, base.Parameters], teacher: str) -> None:
    check_methods(chosen, [teacher], STUDENT, classes=CLASSES, image_size=SIZE, images=100)


@pytest.mark.parametrize("name", FAMILIES)
def test_student_learns_from_any_teacher_family(name: str) -> None:
    checked({"quest": Parameters()}, name)
    of_teacher, of_student = (compute_shapes(n, CLASSES, SIZE) for n in (name, STUDENT))
    reads = Quest.teacher_reads(Parameters(), of_teacher)
    assert [of_teacher.maps[read] for read in reads] == [FAMILIES[name]]
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte()
    teacher = Teacher(build(name, num_classes=CLASSES, image_size=SIZE, seed=1), geometry(name, SIZE), ENGINE)
    features = teacher(images, reads)[next(iter(reads))]
    assert tuple(features.shape[1:]) == FAMILIES[name]
    pooled = torch.nn.functional.adaptive_avg_pool2d(features, (2, 2)).permute(0, 2, 3, 1).flatten(0, 2)
    words = pooled[:WORDS]
    distance = torch.cdist(pooled, words).square()
    prepared = {"0.map.words": words, "0.map.mu": distance.mean()}
    quest = Quest(Parameters(words=WORDS), Setup(of_student, [of_teacher], prepared))
    network = build(STUDENT, num_classes=CLASSES, image_size=SIZE, seed=0)
    task = DistillationTask(
        network, geometry(STUDENT, SIZE), ENGINE, teachers=[teacher], teacher_reads=[reads],
        methods={"quest": quest}, student_reads=Quest.reads(Parameters(), of_student), weights={"ce": 0.0},
        label_task=CLASSIFICATION,
    )  # fmt: skip
    task.train()
    losses = []
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=3e-3)
    for _ in range(4):
        result = task(images, torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        result["loss"].backward()
        assert network.conv_stem.weight.grad.abs().sum() > 0
        optimizer.step()
        losses.append(result["loss"].item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in teacher.parameters())


def test_vgg_teaches_with_its_map_before_the_relu() -> None:
    for name in ("vgg11_bn", "cifar_vgg8"):
        reads = Quest.teacher_reads(Parameters(), compute_shapes(name, CLASSES, 32))
        assert reads == {"map_pre"}
        teacher = Teacher(build(name, num_classes=CLASSES, image_size=32, seed=1), geometry(name, 32), ENGINE)
        features = teacher(torch.randint(0, 256, (2, 3, 32, 32)).byte(), reads)["map_pre"]
        assert features.min() < 0 < features.max()


def test_level_that_a_network_does_not_have_is_refused() -> None:
    with pytest.raises(ModelError, match="no feature map 'map@9'"):
        checked(methods.parse_parameters(["quest"], {"quest.levels": ["map@9"]}), "resnet18")
