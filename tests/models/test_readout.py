from math import ceil

import pytest
import torch
import torch.nn.functional as F
from questpress.models.build import build
from questpress.models.errors import ModelError
from questpress.models.readout import Readouts
from torch import nn

# One of each family, and the image size it is tried at.
FAMILIES = {
    **dict.fromkeys(("resnet18", "mobilenetv2_035", "mobilenetv3_small_050", "regnety_002"), 96),
    **dict.fromkeys(("mobilenetv4_conv_small_035", "efficientnet_lite0", "convnext_atto"), 96),
    **dict.fromkeys(("swin_tiny_patch4_window7_224", "mixer_s32_224", "test_mambaout"), 96),
    **dict.fromkeys(("vit_tiny_patch16_224", "vit_small_patch16_dinov3"), 48),
    "deit_tiny_distilled_patch16_224": 48,
    **dict.fromkeys(("vgg11", "cifar_vgg8", "cifar_shufflenetv2"), 32),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    name, size = request.param, FAMILIES[request.param]
    return Readouts(build(name, num_classes=5, image_size=size, seed=0).eval()), size


@torch.no_grad()
def test_every_family_gives_map_vector_and_logits_of_the_stated_shapes(family):
    readouts, size = family
    x = torch.randn(3, 3, size, size)
    outputs = readouts(x, frozenset({"map", "vector", "logits"}))
    assert outputs["map"].shape == (3, *readouts.shapes.map)
    assert outputs["vector"].shape == (3, readouts.shapes.vector)
    assert outputs["logits"].shape == (3, readouts.shapes.logits) == (3, 5)
    assert torch.equal(outputs["logits"], readouts.network(x))
    assert torch.equal(readouts(x)["logits"], readouts.network(x))


@torch.no_grad()
def test_other_requested_features_change_nothing(family):
    readouts, size = family
    x = torch.randn(2, 3, size, size)
    everything = readouts(x, readouts.offers)
    for read in sorted(readouts.offers):
        alone = readouts(x, frozenset({read}))
        assert set(alone) == {read}
        torch.testing.assert_close(alone[read], everything[read], rtol=0, atol=0)
    assert torch.equal(everything["logits"], readouts.network(x))


WITH_CELLS = {"resnet18", "mobilenetv2_035", "regnety_002", "efficientnet_lite0", "cifar_vgg8",
              "cifar_shufflenetv2", "swin_tiny_patch4_window7_224", "mixer_s32_224",
              "vit_small_patch16_dinov3"}  # fmt: skip


@torch.no_grad()
def test_cells_are_the_classifier_on_means_of_the_map(family):
    readouts, size = family
    assert (readouts.shapes.cells == 21) == (readouts.name in WITH_CELLS)
    if readouts.name not in WITH_CELLS:
        with pytest.raises(ModelError, match="does not classify the mean of its map"):
            readouts.check(frozenset({"cells"}))
        return
    outputs = readouts(torch.randn(2, 3, size, size), frozenset({"cells", "map", "logits"}))
    classify, f = readouts.network.get_classifier(), outputs["map"]
    height, width = f.shape[2:]
    lower_left = f[..., height // 2 :, : ceil(width / 2)]
    corner = f[..., : ceil(height / 4), : ceil(width / 4)]
    for index, cell in ((0, f), (3, lower_left), (5, corner)):
        expected = classify(cell.mean((2, 3)))
        torch.testing.assert_close(outputs["cells"][:, index], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs["cells"][:, 0], outputs["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "test_mambaout"]
)
@torch.no_grad()
def test_spot_in_a_corner_of_the_image_changes_that_side_of_the_map_most(name):
    size = FAMILIES[name]
    readouts = Readouts(build(name, num_classes=5, image_size=size, seed=0).eval())
    _, height, width = readouts.shapes.map
    blank = torch.zeros(1, 3, size, size)
    third, reads = size // 3, frozenset({"map"})
    for row, column in ((0, 2), (2, 0)):
        spot = blank.clone()
        noise = torch.randn(1, 3, third, third, generator=torch.Generator().manual_seed(1))
        spot[:, :, row * third : (row + 1) * third, column * third : (column + 1) * third] = noise
        change = (readouts(spot, reads)["map"] - readouts(blank, reads)["map"]).norm(dim=1)[0]
        rows = torch.linspace(-1, 1, height) @ change.sum(1) / change.sum()
        columns = torch.linspace(-1, 1, width) @ change.sum(0) / change.sum()
        assert torch.sign(rows) == row - 1 and torch.sign(columns) == column - 1
        assert min(abs(rows), abs(columns)) > 0.05


@pytest.mark.parametrize(
    ("name", "side", "prefix"),
    [
        ("vit_tiny_patch16_224", 16, 1),
        ("vit_small_patch16_dinov3", 16, 5),
        ("deit_tiny_distilled_patch16_224", 16, 2),
        ("mixer_s32_224", 32, 0),
    ],
)
@torch.no_grad()
def test_map_of_tokens_is_their_grid_without_class_distillation_and_register_tokens(name, side, prefix):
    size = 3 * side
    readouts = Readouts(build(name, num_classes=5, image_size=size, seed=0).eval())
    x = torch.randn(2, 3, size, size)
    tokens = readouts.network.forward_features(x)
    assert tokens.shape[1] == prefix + 9
    by_hand = tokens[:, prefix:].reshape(2, 3, 3, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(readouts(x, frozenset({"map"}))["map"], by_hand)


@torch.no_grad()
def test_levels_are_counted_from_either_end_and_come_in_the_same_pass():
    readouts = Readouts(build("resnet18", num_classes=3, image_size=64, seed=0).eval())
    x = torch.randn(2, 3, 64, 64)
    calls = []
    handle = readouts.network.conv1.register_forward_hook(lambda *_: calls.append(1))
    outputs = readouts(x, frozenset({"map", "map@1", "map@-2", "logits"}))
    handle.remove()
    assert len(calls) == 1
    torch.testing.assert_close(outputs["map@1"], readouts.network.forward_intermediates(x, indices=[1])[1][0])
    torch.testing.assert_close(outputs["map"], F.relu(readouts.network.layer4(outputs["map@-2"])))
    assert outputs["map@-2"].shape[1:] == readouts.shapes.levels[-2] == (256, 4, 4)


@pytest.mark.parametrize(("name", "size"), [("cifar_vgg8", 32), ("vgg11_bn", 64)])
@torch.no_grad()
def test_vgg_shows_its_map_before_the_last_relu(name, size):
    readouts = Readouts(build(name, num_classes=3, image_size=size, seed=0).eval())
    outputs = readouts(torch.randn(2, 3, size, size), frozenset({"map", "map_pre", "logits"}))
    assert (outputs["map_pre"] < 0).any() and outputs["map_pre"].shape[1:] == readouts.shapes.map_pre
    after = F.relu(outputs["map_pre"])
    after = F.max_pool2d(after, 2) if after.shape != outputs["map"].shape else after
    assert torch.equal(after, outputs["map"])
    assert "map_pre" not in Readouts(build("cifar_resnet8", num_classes=3, image_size=32)).offers


def test_computing_shapes_changes_no_state():
    network = build("mobilenetv4_conv_small_035", num_classes=3, image_size=64, seed=0).train()
    network.bn1.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Readouts(network)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not network.bn1.training and network.training and network.blocks.training


def test_training_step_through_the_readouts_updates_batch_statistics_once():
    readouts = Readouts(build("mobilenetv4_conv_small_035", num_classes=3, image_size=64, seed=0).train())
    readouts(torch.randn(4, 3, 64, 64), frozenset({"map", "vector", "logits"}))
    counters = (b for name, b in readouts.network.named_buffers() if name.endswith("num_batches_tracked"))
    assert {int(counter) for counter in counters} == {1}


def test_gradients_reach_the_network_from_every_readout():
    readouts = Readouts(build("cifar_resnet8", num_classes=3, image_size=32, seed=0).train())
    for read in ("map", "vector", "logits", "cells", "map@0"):
        readouts.zero_grad()
        readouts(torch.randn(2, 3, 32, 32), frozenset({read}))[read].square().sum().backward()
        assert readouts.network.conv1.weight.grad.abs().sum() > 0


def test_network_without_a_map_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    readouts = Readouts(flat, image_size=8)
    assert readouts.offers == {"logits"} and readouts.shapes.logits == 4
    with pytest.raises(ModelError, match=r"no feature map.*Choose another"):
        readouts(torch.randn(1, 3, 8, 8), frozenset({"map"}))


def test_readout_that_does_not_exist_is_named_with_those_that_do():
    readouts = Readouts(build("cifar_resnet8", num_classes=3, image_size=32))
    with pytest.raises(ModelError, match="level from 0 to 2"):
        readouts.check(frozenset({"map@7"}))
    with pytest.raises(ModelError, match="Only VGG"):
        readouts.check(frozenset({"map_pre"}))
    with pytest.raises(ModelError, match=r"'words'.*logits"):
        readouts.check(frozenset({"words"}))
    readouts.check(frozenset({"map", "map@-3", "vector", "logits"}))
