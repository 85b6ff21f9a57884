"""ResNets and wide ResNets for 32-pixel images.

Those of the CRD benchmark (1×1 convolution shortcuts; ResNet-50 with a CIFAR stem), those with the
parameter-free shortcuts of He et al. 2016, "option A" (names ending in `_a`), and the benchmark's wide
ResNets (Zagoruyko, Komodakis, BMVC 2016).
"""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from . import CifarNetwork, kaiming, register_variants

Shortcut = Callable[[int, int, int], nn.Module]


def conv_shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return a 1×1 convolution with BatchNorm if the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ZeroPadShortcut(nn.Module):
    """Take every second pixel; pad new channels with zeros, half of them before and half after."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        thinned = x[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, self.before, self.after))


def zero_pad_shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return a shortcut without parameters if the shape changes."""
    return nn.Identity() if stride == 1 and inputs == outputs else ZeroPadShortcut(outputs - inputs, stride)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module, name: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut_name = name
        self.add_module(name, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + getattr(self, self.shortcut_name)(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module, name: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.shortcut_name = name
        self.add_module(name, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + getattr(self, self.shortcut_name)(x))


class CifarResNet(CifarNetwork):
    """A 3×3 stem at full resolution and a group for each entry of `blocks`, halving from the second on."""

    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    shortcut: Shortcut = staticmethod(conv_shortcut)
    shortcut_name = "downsample"

    def __init__(
        self, blocks: list[int], stem: int, widths: list[int], num_classes: int = 100, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.groups = [f"layer{index + 1}" for index in range(len(blocks))]
        inputs = stem
        for index, (group, count, width) in enumerate(zip(self.groups, blocks, widths, strict=True)):
            layers = []
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                outputs = width * self.block.expansion
                shortcut = type(self).shortcut(inputs, outputs, stride)
                layers.append(self.block(inputs, width, stride, shortcut, self.shortcut_name))
                inputs = outputs
            self.add_module(group, nn.Sequential(*layers))
        outputs_of = [width * self.block.expansion for width in widths]
        self._finish(outputs_of, [2**index for index in range(len(blocks))], num_classes)
        self._initialize()

    def _initialize(self) -> None:
        kaiming(self)

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        for group in self.groups:
            x = self.get_submodule(group)(x)
            yield x


class CifarResNet50(CifarResNet):
    """The benchmark's ResNet-50: bottlenecks, four groups, a 3×3 stem without pooling."""

    block = Bottleneck
    shortcut_name = "shortcut"
    classifier_name = "linear"


class CifarResNetA(CifarResNet):
    """The parameter-free variant, initialized as in the code its public CIFAR-10 weights come from."""

    shortcut = staticmethod(zero_pad_shortcut)
    shortcut_name = "shortcut"
    classifier_name = "linear"

    def _initialize(self) -> None:
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)


def _three_groups(depth: int, widening: int = 1) -> dict[str, int | list[int]]:
    """Depth 6n+2: three groups of n two-layer blocks, of 16, 32 and 64 channels times the widening."""
    widths = [16 * widening, 32 * widening, 64 * widening]
    return {"blocks": [(depth - 2) // 6] * 3, "stem": 32 if widening > 1 else 16, "widths": widths}


register_variants(
    globals(),
    CifarResNet,
    {f"cifar_resnet{depth}": _three_groups(depth) for depth in (8, 14, 20, 32, 44, 56, 110)}
    | {f"cifar_resnet{depth}x4": _three_groups(depth, widening=4) for depth in (8, 32)},
)
register_variants(
    globals(),
    CifarResNet50,
    {"cifar_resnet50": {"blocks": [3, 4, 6, 3], "stem": 64, "widths": [64, 128, 256, 512]}},
)
register_variants(
    globals(),
    CifarResNetA,
    {f"cifar_resnet{depth}_a": _three_groups(depth) for depth in (20, 32, 44, 56)},
    num_classes=10,
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
    origin_url="https://github.com/akamaster/pytorch_resnet_cifar10",
    paper_ids="arXiv:1512.03385",
)


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each convolution; if the width changes, before the shortcut too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return y + (x if self.convShortcut is None else self.convShortcut(activated))


class Group(nn.Module):
    """Blocks of one resolution, under the name the benchmark's checkpoints use."""

    def __init__(self, count: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = PreActivationBlock(inputs, outputs, stride)
        self.layer = nn.Sequential(
            first, *(PreActivationBlock(outputs, outputs, 1) for _ in range(count - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class CifarWideResNet(CifarNetwork):
    """Depth 6n+4: three groups of n blocks, of 16, 32 and 64 channels times the widening."""

    def __init__(self, depth: int, widening: int, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        count = (depth - 4) // 6
        widths = [16 * widening, 32 * widening, 64 * widening]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.block1 = Group(count, 16, widths[0], 1)
        self.block2 = Group(count, widths[0], widths[1], 2)
        self.block3 = Group(count, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self._finish(widths, [1, 2, 4], num_classes)
        kaiming(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            nn.init.zeros_(self.get_parameter("fc.bias"))

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        x = self.block1(self.conv1(x))
        yield x
        x = self.block2(x)
        yield x
        yield F.relu(self.bn1(self.block3(x)))


register_variants(
    globals(),
    CifarWideResNet,
    {
        f"cifar_wrn_{depth}_{widening}": {"depth": depth, "widening": widening}
        for depth in (16, 40)
        for widening in (1, 2)
    },
)
