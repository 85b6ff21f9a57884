"""ShuffleNet V1 (Zhang, CVPR 2018) and V2 (Ma, ECCV 2018) for 32-pixel images, as in the CRD benchmark."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import CifarNetwork, register_variants

_STEM = 24


def shuffled(x: Tensor, groups: int) -> Tensor:
    """[B,C,H,W] with the channels of the groups interleaved."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


class UnitV1(nn.Module):
    """Grouped pointwise, shuffle, depthwise, grouped pointwise; a pooled copy is appended where it halves."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        middle = outputs // 4
        self.stride = stride
        # The stem's few channels aren't divided.
        self.first_groups = 1 if inputs == _STEM else groups
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=self.first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = shuffled(F.relu(self.bn1(self.conv1(x))), self.first_groups)
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.stride == 1:
            return F.relu(x + y)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


class CifarShuffleNetV1(CifarNetwork):
    classifier_name = "linear"

    def __init__(
        self, widths: list[int], counts: list[int], groups: int, num_classes: int = 100, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        inputs = _STEM
        for index, (width, count) in enumerate(zip(widths, counts, strict=True)):
            first = UnitV1(inputs, width - inputs, 2, groups)
            rest = [UnitV1(width, width, 1, groups) for _ in range(count - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(first, *rest))
            inputs = width
        self._finish(widths, [2, 4, 8], num_classes)

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        for index in (1, 2, 3):
            x = self.get_submodule(f"layer{index}")(x)
            yield x


class UnitV2(nn.Module):
    """Half of the channels pass, half go through pointwise, depthwise, pointwise; then they are shuffled."""

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
        return shuffled(torch.cat([left, right], 1), 2)


class DownUnitV2(nn.Module):
    """Both branches see all channels and halve the resolution."""

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
        return shuffled(torch.cat([left, right], 1), 2)


class CifarShuffleNetV2(CifarNetwork):
    classifier_name = "linear"

    def __init__(
        self, widths: list[int], counts: list[int], num_classes: int = 100, in_chans: int = 3
    ) -> None:
        super().__init__()
        *widths, last = widths
        self.conv1 = nn.Conv2d(in_chans, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        inputs = _STEM
        for index, (width, count) in enumerate(zip(widths, counts, strict=True)):
            rest = [UnitV2(width) for _ in range(count)]
            self.add_module(f"layer{index + 1}", nn.Sequential(DownUnitV2(inputs, width), *rest))
            inputs = width
        self.conv2 = nn.Conv2d(inputs, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self._finish([*widths[:2], last], [2, 4, 8], num_classes)

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        for index in (1, 2, 3):
            x = self.get_submodule(f"layer{index}")(x)
            if index < 3:
                yield x
        yield F.relu(self.bn2(self.conv2(x)))


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
