"""Two-stage detectors choose torchvision's regions, and have its losses and detections."""

from typing import Any

import pytest
import torch
from questpress.models.build import build
from questpress.models.checkpoint import Checkpoint
from questpress.models.detection.regions import BOX_HEAD, BoxHead, pool_fixed, pool_listed
from questpress.models.fold import fold_batch_norm
from questpress.models.readout import read_network
from questpress.models.weights import class_count, classifier_weight, load_into, permute_head
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

SIZE = (96, 128)
ALL = frozenset({"logits", "regions", "region_vectors", "map@1"})


def detector(seed: int = 0, size: tuple[int, int] = SIZE) -> Any:
    """Return a detector whose anchors and regions have scores and boxes that differ widely."""
    network: Any = build("fasterrcnn:test_resnet", num_classes=3, image_size=size, seed=seed).eval()
    with torch.no_grad():
        for name, layer in network.named_modules():
            if name.endswith(("cls_logits", "bbox_pred", "cls_score")):
                layer.weight *= 30
    return network


def images(count: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def labels() -> Tensor:
    """Boxes of three images: two and a crowd; none; one, and one without area."""
    rows = torch.full((3, 3, 7), -1.0)
    rows[0, 0] = torch.tensor([0, 0.1, 0.2, 0.4, 0.6, 100, 0])
    rows[0, 1] = torch.tensor([1, 0.0, 0.0, 0.9, 0.9, 100, 1])
    rows[0, 2] = torch.tensor([2, 0.5, 0.5, 0.9, 0.95, 100, 0])
    rows[2, 0] = torch.tensor([1, 0.3, 0.3, 0.8, 0.8, 100, 0])
    rows[2, 1] = torch.tensor([1, 0.5, 0.3, 0.5, 0.8, 0, 0])
    return rows


class PerClass(nn.Module):
    """A predictor that repeats the boxes of ours for each class, as torchvision's has them."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.predictor = network.roi_heads.box_predictor

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = self.predictor(vectors)
        return logits, boxes.repeat(1, logits.shape[1])


def torchvision_heads(network: Any) -> RoIHeads:
    pool = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    heads = RoIHeads(
        pool, network.roi_heads.box_head, PerClass(network), 0.5, 0.5, 128, 0.25, None, 0.05, 0.5, 100
    )
    return heads.train(network.training)


def named(maps: list[Tensor]) -> dict[str, Tensor]:
    return {str(level): tensor for level, tensor in enumerate(maps)}


@pytest.mark.parametrize(("size", "count"), [((96, 128), 128), ((24, 40), 75)])
@torch.no_grad()
def test_regions_and_detections_are_torchvisions(size: tuple[int, int], count: int) -> None:
    network = detector(size=size)
    maps = network.maps(images(size=size))
    proposals, _ = network.rpn(ImageList(images(size=size), [size] * 2), named(maps))
    logits, boxes, regions = network.raw(images(size=size))
    assert logits.shape == boxes.shape == regions.shape == (2, count, 4)
    assert network.decoder["candidates"] == count
    for rows, expected in zip(regions, proposals, strict=True):
        used = rows[(rows[:, 2:] > rows[:, :2]).all(1)]
        assert (len(used) == count) == (count == 128) and len(used) == len(expected)
        assert int(rows.any(1).sum()) == len(used)  # the rest is padding
        assert sorted(map(tuple, used.tolist())) == sorted(map(tuple, expected.tolist()))
    found, _ = torchvision_heads(network)(named(maps), proposals, [size] * 2)
    for rows, image in zip(network(images(size=size)), found, strict=True):
        n = len(image["scores"])
        assert n > 10 and not rows[n:].any()
        torch.testing.assert_close(rows[:n, 0], image["scores"])
        assert torch.equal(rows[:n, 1].long() + 1, image["labels"])
        pixels = rows[:n, 2:] * network.sides
        torch.testing.assert_close(pixels, image["boxes"], rtol=1e-4, atol=1e-3)


def test_losses_are_torchvisions_and_reach_all_weights() -> None:
    network = detector().train()
    network.freeze_norm()  # so that both passes are equal
    rows = labels()
    torch.manual_seed(5)
    features = read_network(network)(images(3), ALL | {"losses"}, rows)
    losses = features["losses"]
    assert read_network(network)(images(3), frozenset({"losses"}), rows[:0])["losses"].tolist() == [0]
    scale = torch.tensor([128.0, 96.0, 128.0, 96.0])
    kept = [rows[0, [0, 2]], rows[1, :0], rows[2, :1]]
    targets = [{"boxes": row[:, 1:5] * scale, "labels": row[:, 0].long() + 1} for row in kept]
    maps = network.maps(images(3))
    torch.manual_seed(5)
    proposals, expected = network.rpn(ImageList(images(3), [SIZE] * 3), named(maps), targets)
    _, more = torchvision_heads(network)(named(maps), proposals, [SIZE] * 3, targets)
    names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
    for loss, name in zip(losses, names, strict=True):
        torch.testing.assert_close(loss, (expected | more)[name])
    assert features["region_vectors"].shape[:2] == features["regions"].shape[:2]
    losses.sum().backward()
    frozen = {name for name, p in network.named_parameters() if p.grad is None and p.requires_grad}
    assert not {name for name in frozen if "extra_blocks" not in name}


@torch.no_grad()
def test_pooling_with_fixed_shapes_is_torchvisions() -> None:
    network = detector()
    maps = network.maps(images())[:3]
    corners = torch.rand(2, 30, 2, 2, generator=torch.Generator().manual_seed(1)).sort(dim=2).values
    regions = (corners * 400 * torch.rand(2, 30, 1, 1)).flatten(2)  # also beyond the image, of all levels
    expected = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)(named(maps), list(regions), [SIZE] * 2)
    torch.testing.assert_close(pool_fixed(maps, regions), expected)
    torch.testing.assert_close(pool_listed(maps, list(regions)), expected)
    state = network.get_submodule(BOX_HEAD).state_dict()
    vectors = BoxHead(state)(maps, list(regions))
    torch.testing.assert_close(vectors, network.roi_heads.box_head(expected))


@torch.no_grad()
def test_features_without_labels_are_those_of_use_and_survive_folding() -> None:
    network = detector()
    features = read_network(network)(images(), ALL)
    logits, _, regions = network.raw(images())
    assert torch.equal(features["regions"], regions)
    torch.testing.assert_close(features["logits"], logits)
    folded = fold_batch_norm(network, images())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_classes_are_reordered_and_selected_after_the_background() -> None:
    network, target = detector(), detector(seed=1)
    checkpoint = Checkpoint(network.state_dict(), None, "file", "")
    assert class_count(checkpoint, network) == 3
    load_into(target, checkpoint, rows=[2, 0, 1])
    before, after = classifier_weight(network), classifier_weight(target)
    assert before is not None and after is not None and torch.equal(after, before[[0, 3, 1, 2]])
    permute_head(target, [1, 2, 0])
    assert torch.equal(classifier_weight(target), before)
    target.reset_classifier(5)
    with pytest.raises(Exception, match="head for 3 classes"):
        load_into(target, checkpoint)
