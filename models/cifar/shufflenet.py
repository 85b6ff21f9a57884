"""ShuffleNet V1 (Zhang, CVPR 2018) and V2 (Ma, ECCV 2018) for 32-pixel images, as in the CRD benchmark."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import CifarNetwork, register_variants

_STEM = 24


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of the groups in a map [B,C,H,W]."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


class UnitV1(nn.Module):
    """Grouped pointwise, shuffle, depthwise, grouped pointwise; with stride 2 a pooled input is appended."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        middle = outputs // 4
        self.stride = stride
        # As in the paper, the few channels of the stem are not grouped.
        self.first_groups = 1 if inputs == _STEM else groups
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=self.first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = shuffle_channels(F.relu(self.bn1(self.conv1(x))), self.first_groups)
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.stride == 1:
            return F.relu(x + y)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


class _ShuffleNet(CifarNetwork):
    """A pointwise stem and three groups of units, built by `group` from inputs, outputs and count."""

    classifier_name = "linear"

    def __init__(
        self, widths: list[int], counts: list[int], group: Callable[..., nn.Sequential], in_chans: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        for index, (inputs, width) in enumerate(pairwise([_STEM, *widths])):
            self.add_module(f"layer{index + 1}", group(inputs, width, counts[index]))

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        for index in (1, 2, 3):
            x = self.get_submodule(f"layer{index}")(x)
            yield x


class CifarShuffleNetV1(_ShuffleNet):
    def __init__(
        self, widths: list[int], counts: list[int], groups: int, num_classes: int = 100, in_chans: int = 3
    ) -> None:
        def group(inputs: int, width: int, count: int) -> nn.Sequential:
            first = UnitV1(inputs, width - inputs, 2, groups)
            return nn.Sequential(first, *(UnitV1(width, width, 1, groups) for _ in range(count - 1)))

        super().__init__(widths, counts, group, in_chans)
        self._finish(widths, [2, 4, 8], num_classes)


class UnitV2(nn.Module):
    """Half of the channels pass, half go through pointwise, depthwise, pointwise; then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.passing = half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[:, : self.passing], x[:, self.passing :]
        right = F.relu(self.bn1(self.conv1(right)))
        right = self.bn2(self.conv2(right))
        right = F.relu(self.bn3(self.conv3(right)))
        return shuffle_channels(torch.cat([left, right], 1), 2)


class DownUnitV2(nn.Module):
    """Two branches that read all channels and halve the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)))
        return shuffle_channels(torch.cat([left, right], 1), 2)


class CifarShuffleNetV2(_ShuffleNet):
    def __init__(
        self, widths: list[int], counts: list[int], num_classes: int = 100, in_chans: int = 3
    ) -> None:
        def group(inputs: int, width: int, count: int) -> nn.Sequential:
            rest = [UnitV2(width) for _ in range(count)]  # first, as seeds give weights in this order
            return nn.Sequential(DownUnitV2(inputs, width), *rest)

        *widths, last = widths
        super().__init__(widths, counts, group, in_chans)
        self.conv2 = nn.Conv2d(widths[-1], last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self._finish([*widths[:2], last], [2, 4, 8], num_classes)

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        for index, level in enumerate(super().levels(x)):
            yield level if index < 2 else F.relu(self.bn2(self.conv2(level)))


register_variants(
    globals(),
    CifarShuffleNetV1,
    {"cifar_shufflenetv1": {"widths": [240, 480, 960], "counts": [4, 8, 4], "groups": 3}},
)
register_variants(
    globals(),
    CifarShuffleNetV2,
    {"cifar_shufflenetv2": {"widths": [116, 232, 464, 1024], "counts": [3, 7, 3]}},
)
