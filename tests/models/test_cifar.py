import os
from pathlib import Path

import pytest
import torch
from questpress.models.build import build
from questpress.models.checkpoint import read_checkpoint
from questpress.models.cifar.resnet import ZeroPadShortcut
from questpress.models.cifar.shufflenet import shuffle_channels
from questpress.models.weights import load_into
from torch import nn

# Tian et al., Contrastive Representation Distillation: parameters with 100 classes.
PARAMETERS = {
    "resnet8": 83_892, "resnet14": 181_108, "resnet20": 278_324, "resnet32": 472_756, "resnet44": 667_188,
    "resnet56": 861_620, "resnet110": 1_736_564, "resnet8x4": 1_233_540, "resnet32x4": 7_433_860,
    "resnet50": 23_705_252, "wrn_16_1": 180_916, "wrn_16_2": 703_284, "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156, "vgg8": 3_965_028, "vgg11": 9_277_284, "vgg13": 9_462_180, "vgg16": 14_774_436,
    "vgg19": 20_086_692, "mobilenetv2_half": 812_836, "shufflenetv1": 949_258, "shufflenetv2": 1_355_528,
}  # fmt: skip
MAPS = {
    "resnet8x4": (256, 8, 8), "resnet50": (2048, 4, 4), "resnet20_a": (64, 8, 8), "wrn_16_2": (128, 8, 8),
    "vgg8": (512, 4, 4), "mobilenetv2_half": (1280, 2, 2), "shufflenetv1": (960, 4, 4),
    "shufflenetv2": (1024, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_count_is_the_benchmarks(name, count):
    with torch.device("meta"):
        network = build(f"cifar_{name}", num_classes=100, image_size=32)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("name", "shape"), MAPS.items())
def test_last_map_its_mean_and_the_classifier_make_the_logits(name, shape):
    network = build(f"cifar_{name}", num_classes=7, image_size=32, seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        last = network.forward_features(x)
        vector = network.forward_head(last, pre_logits=True)
        assert last.shape == (2, *shape) and (last >= 0).all()
        torch.testing.assert_close(vector, last.mean((2, 3)))
        assert torch.equal(network.get_classifier()(vector), network(x))
        final, levels = network.forward_intermediates(x)
    assert torch.equal(final, last) and torch.equal(levels[-1], last)
    assert [level.shape[1] for level in levels] == [info["num_chs"] for info in network.feature_info]
    assert [32 // level.shape[2] for level in levels] == [info["reduction"] for info in network.feature_info]
    assert network.num_features == shape[0]


def test_early_exit_gives_the_same_level():
    network = build("cifar_wrn_16_1", num_classes=3, image_size=32, seed=0).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        (early,) = network.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        _, levels = network.forward_intermediates(x)
    assert torch.equal(early, levels[1])


def test_zero_padded_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    y = ZeroPadShortcut(2, 2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, 0].any() and not y[:, 3].any()


def test_shuffle_interleaves_the_groups():
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffle_channels(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_convolutions_start_with_the_spread_of_the_fan_out():
    network = build("cifar_resnet50", num_classes=10, image_size=32, seed=0)
    weight = network.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    vgg = build("cifar_vgg8", num_classes=100, image_size=32, seed=0)
    assert vgg.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not vgg.classifier.bias.any()


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "mobilenetv2_half", "shufflenetv2"])
def test_classifier_can_be_replaced_and_taken_away(name):
    network = build(f"cifar_{name}", num_classes=4, image_size=32).eval()
    network.reset_classifier(9)
    assert isinstance(network.get_classifier(), nn.Linear)
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 9) and network.num_classes == 9
    network.reset_classifier(0)
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, network.num_features)


def test_vgg_pools_once_more_for_larger_images():
    network = build("cifar_vgg8", num_classes=4, image_size=64).eval()
    assert network.forward_features(torch.randn(1, 3, 64, 64)).shape[-2:] == (4, 4)


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_public_cifar10_weights_load_as_they_are(depth):
    folder = os.environ.get("QUESTPRESS_CIFAR_WEIGHTS")
    if not folder:
        pytest.skip("QUESTPRESS_CIFAR_WEIGHTS does not name a folder with resnet20-*.th and its siblings")
    (file,) = Path(folder).glob(f"resnet{depth}-*.th")
    load_into(build(f"cifar_resnet{depth}_a", num_classes=10, image_size=32), read_checkpoint(file))
