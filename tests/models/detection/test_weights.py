"""Detectors start from weights of a backbone or of a whole detector, and keep its classes by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from questpress.models.build import build
from questpress.models.checkpoint import read_checkpoint, save_weights
from questpress.models.errors import ModelError
from questpress.models.initialize import InitialNetwork, initialize
from questpress.models.weights import class_count, classifier_weight, load_into, permute_head
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn_v2

SIZE = (96, 128)
CLASSES = ["cat", "dog", "owl"]


def detector(kind: str = "retinanet", seed: int = 0, classes: int = 3, backbone: str = "test_resnet") -> Any:
    return randomize(build(f"{kind}:{backbone}", num_classes=classes, image_size=SIZE, seed=seed))


def randomize(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return network.eval()


def save(network: Any, folder: Path, labels: list[str] | None = None) -> str:
    name = network.built_as.name if hasattr(network, "built_as") else "retinanet_resnet50_fpn_v2"
    metadata = {"architecture": name}
    save_weights(
        network, folder / "w.safetensors", metadata | ({"labels": json.dumps(labels)} if labels else {})
    )
    return str(folder / "w.safetensors")


def start(
    name: str, source: str, classes: list[str] = CLASSES, head: str = "auto", notes: list[str] | None = None
) -> InitialNetwork:
    return initialize(name, source, head, classes, SIZE, 1, ([] if notes is None else notes).append)


def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["retinanet", "ssdlite"])
def test_saved_detector_is_loaded_whole_with_its_classes(kind: str, tmp_path: Path) -> None:
    saved = detector(kind)
    initial = start(f"{kind}:test_resnet", save(saved, tmp_path, CLASSES))
    assert initial.head == "kept" and initial.names_classes
    expected, loaded = saved.state_dict(), initial.network.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    again = build(f"{kind}:test_resnet", num_classes=3, image_size=SIZE, seed=5)
    load_into(again, read_checkpoint(tmp_path / "w.safetensors"))
    torch.testing.assert_close(again.eval().raw(images()), saved.raw(images()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["retinanet", "ssdlite"])
def test_kept_classes_are_found_by_name(kind: str, tmp_path: Path) -> None:
    saved = detector(kind)
    nn.init.normal_(classifier_weight(saved))
    initial = start(f"{kind}:test_resnet", save(saved, tmp_path, CLASSES), ["owl", "cat"])
    assert initial.head == "kept"
    logits, boxes = initial.network.eval().raw(images())
    expected, expected_boxes = saved.raw(images())
    torch.testing.assert_close(logits, expected[..., [2, 0]])
    torch.testing.assert_close(boxes, expected_boxes)
    permute_head(saved, [1, 2, 0])
    torch.testing.assert_close(saved.raw(images())[0], expected[..., [1, 2, 0]])


@pytest.mark.parametrize("classes", [["ape", "bee", "cow"], ["ape", "bee"]])
@pytest.mark.parametrize("kind", ["retinanet", "ssdlite"])
def test_head_of_other_classes_is_replaced_by_one_at_the_prior(
    kind: str, classes: list[str], tmp_path: Path
) -> None:
    saved = detector(kind)
    initial = start(f"{kind}:test_resnet", save(saved, tmp_path, CLASSES), classes)
    assert initial.head == "replaced" and "without its head for 3 classes" in initial.weights
    logits, boxes = initial.network.eval().raw(images())
    assert logits.shape[2] == len(classes)
    assert float(logits.detach().sigmoid().mean()) == pytest.approx(0.01, rel=0.5)
    torch.testing.assert_close(boxes, saved.raw(images())[1])
    assert class_count(read_checkpoint(tmp_path / "w.safetensors"), saved) == 3


def test_head_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    file = save(detector(), tmp_path, CLASSES)
    with pytest.raises(
        ModelError, match=r"--teacher-head keep: w.safetensors has 3 classes, not all .* 2 among"
    ):
        start("retinanet:test_resnet", file, ["ape", "bee"], head="keep")
    with pytest.raises(ModelError, match=r"do not fit ssdlite:test_resnet: keys"):
        start("ssdlite:test_resnet", file)
    with pytest.raises(ModelError, match=r"do not fit retinanet:test_efficientnet: keys"):
        start("retinanet:test_efficientnet", file)
    saved = build("test_resnet", num_classes=5, image_size=64, seed=0)
    with pytest.raises(
        ModelError, match=r"--teacher-head keep: the classes of w\.safetensors are not those .* Use --teacher"
    ):
        start("retinanet:test_resnet", save(saved, tmp_path), head="keep")
    with pytest.raises(ModelError, match=r"do not fit test_efficientnet: keys"):
        start("retinanet:test_efficientnet", str(tmp_path / "w.safetensors"))


@torch.no_grad()
def test_torchvisions_detectors_give_backbone_pyramid_and_heads_of_equal_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = randomize(retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None)).eval()
    notes: list[str] = []
    file = save(theirs, tmp_path)
    initial = start("retinanet@256:resnet50", file, notes=notes)
    assert initial.head == "replaced" and "left out: fpn (2 tensors), head (2" in notes[0]
    ours: Any = initial.network.eval()
    x = images()
    expected = list(theirs.backbone(x).values())[:3]
    for level, value in zip(ours.maps(x), expected, strict=False):
        torch.testing.assert_close(level, value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        ours.head.regression_head(expected), theirs.head.regression_head(expected), rtol=1e-3, atol=1e-4
    )
    small: Any = start("fasterrcnn:resnet50", file).network.eval()
    for level, value in zip(small.backbone(x), theirs.backbone.body(x).values(), strict=True):
        torch.testing.assert_close(level, value, rtol=1e-3, atol=1e-4)
    with pytest.raises(ModelError, match=r"do not fit retinanet:resnet18: keys"):
        start("retinanet:resnet18", file)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_efficientnet"])
@torch.no_grad()
def test_backbone_starts_from_a_classifiers_weights(backbone: str, tmp_path: Path) -> None:
    saved = randomize(build(backbone, num_classes=5, image_size=64, seed=3))
    notes: list[str] = []
    initial = start(f"retinanet:{backbone}", save(saved, tmp_path), notes=notes)
    assert initial.head == "replaced" and not initial.names_classes and "(2 tensors)" in notes[0]
    expected = saved.forward_intermediates(images(), intermediates_only=True, norm=False)[-3:]
    network: Any = initial.network.eval()
    assert [level.shape[2:] for level in expected] == [(12, 16), (6, 8), (3, 4)]
    for level, value in zip(network.backbone(images()), expected, strict=True):
        torch.testing.assert_close(level, value)
    fresh = build(f"retinanet:{backbone}", num_classes=3, image_size=SIZE, seed=1).state_dict()
    others = {key: value for key, value in network.state_dict().items() if not key.startswith("backbone.")}
    assert all(torch.equal(value, fresh[key]) for key, value in others.items())


def test_pretrained_batch_norm_is_frozen_and_a_new_one_is_not(tmp_path: Path) -> None:
    saved = build("test_resnet", num_classes=5, image_size=64, seed=3)
    for source, is_frozen in ((save(saved, tmp_path), True), ("none", False)):
        network: Any = copy.deepcopy(start("retinanet:test_resnet", source).network).train()
        norms = {name for name, m in network.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
        before = copy.deepcopy(network.backbone.state_dict())
        logits = torch.cat(network.raw(images()), dim=2)
        labels = torch.tensor([[[0, 0.1, 0.2, 0.5, 0.7, 9, 0]]] * 2)
        network.losses(logits, labels).sum().backward()
        after = network.backbone.state_dict()
        changed = {key for key in after if not torch.equal(after[key], before[key])}
        grads = {name: p.grad for name, p in network.backbone.named_parameters()}
        frozen = {f"{name}.{leaf}" for name in norms for leaf in ("weight", "bias")}
        assert frozen and frozen < grads.keys()
        assert {name for name, grad in grads.items() if grad is None} == (frozen if is_frozen else set())
        assert bool(changed) is not is_frozen
        assert network.training and network.head.training and network.fpn.training
