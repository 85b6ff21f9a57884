"""Wide ResNets for 32-pixel images (Zagoruyko, Komodakis, BMVC 2016), as in the CRD benchmark."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from . import CifarNetwork, kaiming, register_variants


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
