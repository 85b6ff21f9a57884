"""BatchNorm is folded where that changes nothing, and stays where it would."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from questpress.models.build import build
from questpress.models.fold import fold_batch_norm
from questpress.models.readout import Readouts
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

# Of each family an image size, and how many of its BatchNorms directly follow an unshared convolution.
FAMILIES = {
    "resnet18": (64, 20, 20),
    "mobilenetv2_100": (64, 52, 52),
    "cifar_resnet20": (32, 21, 21),
    "cifar_wrn_16_2": (32, 7, 13),  # pre-activation: a sum comes first in half of them
    "cifar_vgg8": (32, 5, 5),  # the map before the last ReLU is the folded convolution's
    "resnetv2_18": (64, 8, 17),
    "densenet121": (64, 59, 121),
    "efficientnet_b0": (64, 49, 49),
    "vgg11_bn": (64, 8, 8),
    "convnext_atto": (64, 0, 0),
    "swin_tiny_patch4_window7_224": (64, 0, 0),
}


def randomize(network: nn.Module, seed: int = 1) -> nn.Module:
    """Statistics and factors as training leaves them; fresh ones would fold to nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return network.eval()


def batch_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_folding_preserves_every_feature(name: str) -> None:
    size, folds, of = FAMILIES[name]
    if name == "vgg11_bn":  # with a head that is not most of the test's time
        network = randomize(timm.create_model(name, num_classes=7, mlp_ratio=0.05))
    else:
        network = randomize(build(name, num_classes=7, image_size=size, seed=0))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold_batch_norm(network, torch.randn(2, 3, size, size))
    assert batch_norms(network) == of and batch_norms(folded) == of - folds
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    own, its = Readouts(network, size), Readouts(folded, size)
    assert own.shapes == its.shapes
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    expected, found = own(images, own.offers), its(images, its.offers)
    for read in own.offers:
        scale = expected[read].abs().max()
        assert (expected[read] - found[read]).abs().max() <= 1e-4 * scale, read
    torch.testing.assert_close(its(images)["logits"], found["logits"], rtol=1e-5, atol=1e-5)


def test_folding_preserves_precision_and_frozen_weights() -> None:
    network = randomize(build("cifar_resnet8", num_classes=3, image_size=16, seed=0)).requires_grad_(False)
    folded = fold_batch_norm(network, torch.randn(1, 3, 16, 16))
    assert folded.built_as == network.built_as
    assert {p.dtype for p in folded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in folded.parameters())
    assert not any(module.training for module in folded.modules())


def pair(network: "Toy", x: Tensor) -> Tensor:
    return F.relu(network.bn(network.conv(x)))


class Toy(nn.Module):
    """Convolution, BatchNorm and what a test puts around them; timm's three methods."""

    def __init__(self, around: Callable[["Toy", Tensor], Tensor] = pair, **layers: nn.Module) -> None:
        super().__init__()
        self.around = around
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = layers.get("conv", nn.Conv2d(8, 8, 3, padding=1, bias=False))
        self.bn = layers.get("bn", nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 4)

    def body(self, x: Tensor) -> Tensor:
        return self.around(self, x)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        vector = x.mean((2, 3))
        return vector if pre_logits else self.fc(vector)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def skip(network: Toy, x: Tensor) -> Tensor:
    y = network.conv(x)
    return network.bn(y) + y


def tied() -> Toy:
    network = Toy(lambda n, x: n.bn(n.conv(x)) + n.other(x))
    network.other = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    network.other.weight = network.conv.weight
    return network


def shared_batch_norm(network: Toy, x: Tensor) -> Tensor:
    return network.bn(network.conv(pair(network, x)).relu()) + network.bn(network.conv(x))


KINDS: dict[str, tuple[Callable[[], Toy], int]] = {
    "a pair": (Toy, 0),
    "the same pair twice": (lambda: Toy(lambda n, x: pair(n, pair(n, x))), 0),
    "a BatchNorm after two convolutions": (lambda: Toy(shared_batch_norm), 1),
    "a convolution whose output is used twice": (lambda: Toy(skip), 1),
    "an output changed in place": (lambda: Toy(lambda n, x: n.bn(n.conv(x).mul_(2))), 1),
    "a weight that another layer has": (tied, 1),
    "a BatchNorm whose weight is read": (lambda: Toy(lambda n, x: pair(n, x) * n.bn.weight.mean()), 1),
    "a standardized weight": (lambda: Toy(conv=StdConv2d(8, 8, 3, padding=1, bias=False)), 1),
    "a computed weight": (lambda: Toy(conv=weight_norm(nn.Conv2d(8, 8, 3, padding=1))), 1),
    "statistics of the batch": (lambda: Toy(bn=nn.BatchNorm2d(8, track_running_stats=False)), 1),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_batch_norm_is_folded_only_into_an_unshared_convolution(kind: str) -> None:
    torch.manual_seed(0)
    make, left = KINDS[kind]
    network = randomize(make())
    images = torch.randn(2, 3, 8, 8)
    folded = fold_batch_norm(network, images)
    assert batch_norms(folded) == left
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_foldable_layers_are_folded_next_to_others() -> None:
    torch.manual_seed(0)
    kinds = ("a pair", "a standardized weight", "a pair", "a BatchNorm whose weight is read", "a pair")
    network = randomize(Stack([KINDS[kind][0]() for kind in kinds]))
    images = torch.randn(2, 3, 8, 8)
    folded = fold_batch_norm(network, images)
    assert batch_norms(folded) == 2
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-5)


class Stack(nn.Module):
    def __init__(self, parts: list[Toy]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        y = self.parts[0].stem(x)
        for part in self.parts:
            y = part.body(y)
        return self.parts[-1].forward_head(y)
