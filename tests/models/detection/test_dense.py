"""Dense detectors compute torchvision's losses and detections, and show the features that methods read."""

import copy
import json
from typing import Any

import pytest
import torch
from questpress.models.build import build, check_size, default_image_size, geometry, has_batch_norm, resolve
from questpress.models.catalog import describe, find_license, has_pretrained, list_models, multiply_adds
from questpress.models.detection.dense import DenseDetector
from questpress.models.errors import ModelError, UnknownModel
from questpress.models.fold import fold_batch_norm
from questpress.models.readout import read_network
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms

BACKBONE = "test_resnet"
SIZE = (96, 128)
KINDS = ("retinanet", "ssdlite")


def detector(kind: str = "retinanet", seed: int = 0, classes: int = 3) -> Any:
    return build(f"{kind}:{BACKBONE}", num_classes=classes, image_size=SIZE, seed=seed).eval()


def images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def outputs(network: DenseDetector, seed: int, count: int = 2, spread: float = 2.0) -> Tensor:
    """Return random class logits and box deltas, of which few are above the threshold of scores."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(count, len(network.anchors), network.num_classes + 4, generator=generator)
    return torch.cat([spread * random[..., :-4] - 4, random[..., -4:] / 2], dim=2)


def boxes(*rows: tuple[float, ...], length: int = 4) -> Tensor:
    """Return the labels of one image: (class, x1, y1, x2, y2, crowd), then rows of class -1."""
    labels = torch.zeros(length, 7)
    labels[:, 0] = -1
    for label, row in zip(labels, rows, strict=False):
        label[:5], label[5], label[6] = torch.tensor(row[:5]), 100.0, row[5]
    return labels


# Two boxes and a crowd; no boxes; a crowd alone.
CROWD = (1, 0.0, 0.0, 0.9, 0.9, 1)
LABELS = torch.stack([
    boxes((0, 0.1, 0.2, 0.4, 0.6, 0), CROWD, (2, 0.5, 0.5, 0.9, 0.95, 0)), boxes(), boxes(CROWD)
])  # fmt: skip


def torchvision_retinanet(network: DenseDetector) -> RetinaNet:
    backbone = nn.Identity()
    backbone.out_channels = 64
    return RetinaNet(backbone, 3, anchor_generator=network.anchor_generator, detections_per_img=100).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_torchvisions_on_the_same_targets(kind: str) -> None:
    network = detector(kind)
    random = outputs(network, seed=1, count=3)
    both = torch.tensor([[0.1, 0.2, 0.4, 0.6], [0.5, 0.5, 0.9, 0.95]]) * torch.tensor([128.0, 96, 128, 96])
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    expected = torchvision_retinanet(network).compute_loss(
        [{"boxes": both, "labels": torch.tensor([0, 2])}, none, none],
        {"cls_logits": random[..., :3], "bbox_regression": random[..., 3:]},
        [network.anchors] * 3,
    )
    losses = network.losses(random, LABELS)
    assert losses[1] > 0.01
    torch.testing.assert_close(losses[0], expected["classification"])
    torch.testing.assert_close(losses[1], expected["bbox_regression"])


def test_loss_of_images_without_boxes_is_the_focal_loss_of_background_alone() -> None:
    network = detector()
    random = outputs(network, seed=2).requires_grad_()
    losses = network.losses(random, torch.stack([boxes(), boxes(CROWD)]))
    probability = random[..., :3].sigmoid()
    by_hand = -0.75 * probability.square() * torch.log(1 - probability)  # alpha = 0.25, gamma = 2
    torch.testing.assert_close(losses[0], by_hand.sum() / 2)
    assert losses[1] == 0
    losses.sum().backward()
    assert random.grad[..., :3].abs().min() > 0 and random.grad[..., 3:].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_torchvisions(kind: str) -> None:
    network = detector(kind)
    reference = torchvision_retinanet(network)
    maps = network.maps(images())
    anchors = reference.anchor_generator(ImageList(images(), [SIZE] * 2), maps)
    assert all(torch.equal(of_image, network.anchors) for of_image in anchors)
    counts = [level.shape[2] * level.shape[3] * (9 if kind == "retinanet" else 6) for level in maps]
    scale = torch.tensor([128.0, 96.0, 128.0, 96.0])
    for seed, spread, fill in ((3, 2.0, {100}), (4, 0.4, set(range(1, 100))), (5, 0.0, {0})):
        random = outputs(network, seed, spread=spread)
        logits, deltas = random[..., :3], random[..., 3:]
        detections = network.decode(logits, deltas)
        assert detections.shape == (2, 100, 6) and detections.dtype == torch.float32
        expected = reference.postprocess_detections(
            {"cls_logits": logits.split(counts, 1), "bbox_regression": deltas.split(counts, 1)},
            [list(of_image.split(counts)) for of_image in anchors],
            [SIZE] * 2,
        )
        for rows, image in zip(detections, expected, strict=True):
            n = len(image["scores"])
            assert n in fill and (rows[n:] == 0).all()
            torch.testing.assert_close(rows[:n, 0], image["scores"])
            assert torch.equal(rows[:n, 1].long(), image["labels"])
            torch.testing.assert_close(rows[:n, 2:] * scale, image["boxes"])


def test_detections_of_hand_made_outputs() -> None:
    network = detector()
    logits, deltas = torch.full((1, len(network.anchors), 3), -10.0), torch.zeros(1, len(network.anchors), 4)
    inside = int(((network.anchors[:, 0] > 20) & (network.anchors[:, 2] < 60)).nonzero()[100])
    logits[0, inside, 2], logits[0, inside + 1, 2] = 2.0, 1.0
    overlap = batched_nms(network.anchors[inside : inside + 2], torch.ones(2), torch.zeros(2), 0.5)
    expected = network.anchors[inside : inside + 2] / torch.tensor([128, 96, 128, 96])
    rows = network.decode(logits, deltas)[0]
    torch.testing.assert_close(rows[0, :2], torch.tensor([torch.tensor(2.0).sigmoid(), 2.0]))
    torch.testing.assert_close(rows[0, 2:], expected[0])
    assert int((rows[:, 0] > 0).sum()) == len(overlap)
    logits[0, inside + 1, :2] = torch.tensor([1.0, -10.0])  # of another class, it stays
    rows = network.decode(logits, deltas)[0]
    assert rows[1, 1] == 0 and torch.allclose(rows[1, 2:], expected[1])
    rows = network.decode(logits.bfloat16(), deltas.bfloat16())[0]  # with autocast
    assert torch.allclose(rows[:2, 2:], expected)


@pytest.mark.parametrize("size", [SIZE, (90, 130), (320, 320)])
def test_anchors_follow_from_the_decoders_description(size: tuple[int, int]) -> None:
    network = build(f"retinanet:{BACKBONE}", num_classes=2, image_size=size, seed=0)
    decoder = json.loads(json.dumps(network.decoder))
    assert {key: value for key, value in decoder.items() if key != "anchors"} == {
        "kind": "retinanet",
        "box_weights": [1.0, 1.0, 1.0, 1.0],
        "score_threshold": 0.05,
        "nms_iou": 0.5,
        "candidates": 1000,
        "detections": 100,
    }
    anchors = []
    for level in decoder["anchors"]:
        (height, width), (x, y) = level["grid"], level["stride"]
        steps = [(j * x, i * y, j * x, i * y) for i in range(height) for j in range(width)]
        anchors += [
            [c + s for c, s in zip(cell, step, strict=True)] for step in steps for cell in level["cells"]
        ]
    torch.testing.assert_close(torch.tensor(anchors), network.anchors, rtol=0, atol=0)


def test_anchors_are_smaller_in_small_images() -> None:
    def smallest_side(size: int) -> float:
        network = build(f"retinanet:{BACKBONE}", num_classes=2, image_size=size, seed=0)
        wide, high = (network.anchors[:, 2:] - network.anchors[:, :2]).unbind(1)
        return float((wide * high).sqrt().min())

    assert smallest_side(256) == pytest.approx(16, abs=1)
    assert smallest_side(640) == pytest.approx(32, abs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_readouts_are_the_detectors_maps_towers_and_outputs(kind: str) -> None:
    network = detector(kind)
    readouts = read_network(network, SIZE)
    x = images()
    maps, (logits, deltas) = network.maps(x), network.raw(x)
    features = readouts(x, readouts.offers)
    torch.testing.assert_close(features["logits"], torch.cat([logits, deltas], dim=2))
    height, width = network.image_size
    scaled = features["anchors"] * torch.tensor([width, height, width, height])
    torch.testing.assert_close(scaled, network.anchors)
    assert features["map"].shape[1:] == readouts.shapes.map == (64, 12, 16)
    for level, expected in enumerate(maps):
        assert expected.shape[1:] == readouts.shapes.levels[level]
        torch.testing.assert_close(features[f"map@{level}"], expected)
        alone = readouts(x, frozenset({f"map@{level - 5}"}))
        assert alone.keys() == {f"map@{level - 5}"}
        torch.testing.assert_close(alone[f"map@{level - 5}"], expected)
    if kind == "ssdlite":
        assert readouts.shapes.towers == () and not any("tower" in read for read in readouts.offers)
        return
    for level, expected in enumerate(maps):
        tower = network.head.classification_head.conv(expected)
        torch.testing.assert_close(features[f"tower@{level}"], tower)
        torch.testing.assert_close(
            readouts(x, frozenset({f"tower@{level - 5}"}))[f"tower@{level - 5}"], tower
        )
        assert tower.shape[1:] == readouts.shapes.towers[level]
    assert not network.head.classification_head.conv._forward_hooks


def test_feature_that_a_detector_lacks_is_refused_with_those_it_has() -> None:
    retinanet, ssdlite = read_network(detector()), read_network(detector("ssdlite"))
    retinanet.check(frozenset({"tower@-5", "map@4", "map", "anchors", "logits"}))
    for readouts, read in (
        (retinanet, "vector"),
        (retinanet, "map@5"),
        (retinanet, "map@-6"),
        (ssdlite, "tower@0"),
    ):
        with pytest.raises(ModelError, match=rf"has no feature '{read}'. It has anchors, logits, map"):
            readouts.check(frozenset({read}))


def test_compiled_readouts_are_the_uncompiled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    really = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: really(f, dynamic=options["dynamic"], backend="aot_eager")
    )
    readouts = read_network(detector())
    reads = frozenset({"map", "tower@1", "logits"})
    expected = readouts(images(), reads)
    readouts.compile_features("default")
    assert copy.deepcopy(readouts).compiled == {} != readouts.compiled
    for read, value in readouts(images(), reads).items():
        torch.testing.assert_close(value, expected[read], rtol=1e-3, atol=1e-5)


def test_exportable_network_returns_scores_and_boxes_apart() -> None:
    network = detector()
    logits, deltas = network.exportable()(images())
    assert logits.shape == (2, len(network.anchors), 3) and deltas.shape == (2, len(network.anchors), 4)
    torch.testing.assert_close((logits, deltas), network.raw(images()))


@pytest.mark.parametrize("kind", KINDS)
def test_new_detector_scores_everything_at_the_prior(kind: str) -> None:
    logits, deltas = detector(kind).raw(images())
    assert float(logits.detach().sigmoid().mean()) == pytest.approx(0.01, rel=0.3)
    assert deltas.abs().max() < 1
    assert (detector(kind)(images()) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_finds_the_boxes(kind: str) -> None:
    network = detector(kind).train()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    shown = torch.zeros(2, 3, *SIZE)
    shown[0, :, 19:58, 13:51], shown[0, :, 48:91, 64:115], shown[1] = 2.0, -2.0, 0.0
    labels = torch.stack([boxes((0, 0.1, 0.2, 0.4, 0.6, 0), (2, 0.5, 0.5, 0.9, 0.95, 0)), boxes()])
    readouts = read_network(network)
    losses = []
    for _ in range(60):
        loss = readouts(shown, frozenset({"losses"}), labels)["losses"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    rows = network(shown)
    assert not (rows[1, :, 0] > 0.5).any()
    for label in labels[0, :2]:
        best = rows[0][rows[0, :, 1] == label[0]][0]
        assert best[0] > 0.5 and (best[2:] - label[1:5]).abs().max() < 0.1


def test_seed_decides_the_weights_alone() -> None:
    torch.manual_seed(3)
    first = detector(seed=7).state_dict()
    torch.manual_seed(4)
    second, other = detector(seed=7).state_dict(), detector(seed=8).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["fpn.inner_blocks.0.0.weight"], other["fpn.inner_blocks.0.0.weight"])
    assert not any("anchors" in key for key in first)


@torch.no_grad()
def test_folding_batch_norm_keeps_all_features() -> None:
    for kind in KINDS:
        network = detector(kind)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        folded = fold_batch_norm(network, images())
        assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) > 5
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        readouts = read_network(network)
        expected = readouts(images(), readouts.offers)
        for read, value in read_network(folded)(images(), readouts.offers).items():
            torch.testing.assert_close(value, expected[read], rtol=1e-3, atol=1e-4)


def test_names_of_detectors_are_resolved_and_misspelled_ones_refused() -> None:
    assert resolve(" retinanet:mobilenetv2 ") == "retinanet:mobilenetv2_100"
    assert resolve("ssdlite:resnet18.a1_in1k") == "ssdlite:resnet18.a1_in1k"
    assert resolve("retinanet@256:resnet18") == "retinanet@256:resnet18"
    for name, message in {
        "maskrcnn:resnet18": r"Unknown detector 'maskrcnn'\. Choose from fasterrcnn, retinanet, ssdlite\.",
        ":resnet18": r"Unknown detector ''",
        "retinanet@100:resnet18": r"The width in 'retinanet@100' must be a multiple of 16",
        "retinanet@:resnet18": r"'retinanet@' must be",
        "retinanet:": r"model name is empty",
        "retinanet:resnet5O": r"Did you mean resnet50",
        "retinanet:retinanet:resnet18x": "Did you mean",
    }.items():
        with pytest.raises(UnknownModel, match=message):
            resolve(name)


def test_backbone_without_the_strides_and_head_without_classes_are_refused() -> None:
    with pytest.raises(UnknownModel, match=r"vit_tiny_patch16_224 cannot be .* strides 16, not 8, 16, 32\."):
        build("retinanet:vit_tiny_patch16_224", num_classes=2, image_size=SIZE)
    with pytest.raises(ModelError, match=r"cannot be built without classes"):
        build(f"retinanet:{BACKBONE}", num_classes=0, image_size=SIZE)


def test_catalog_describes_detectors_by_their_backbone() -> None:
    name = "retinanet:mobilenetv2_050"
    assert default_image_size(name) == 320 and has_batch_norm(name)
    assert has_pretrained(name) and find_license(name) == "apache-2.0"
    own = geometry(name, SIZE)
    assert (own.crop_mode, own.crop_fraction, own.mean) == ("border", 1.0, geometry("mobilenetv2_050").mean)
    check_size(name, SIZE)
    entry = describe(name)
    whole = build(name, num_classes=80, image_size=320)
    assert entry.parameters == sum(p.numel() for p in whole.parameters())
    assert list(list_models("retinanet:mobilenetv2_05*")) == [name]


def test_multiply_adds_of_the_head_are_as_by_hand() -> None:
    few, many = (multiply_adds(f"retinanet:{BACKBONE}", SIZE, classes) for classes in (1, 11))
    locations = sum(height * width for height, width in detector().grids)
    assert few is not None and many is not None
    assert (many - few) * 1e9 == pytest.approx(locations * 9 * 64 * 9 * 10)
