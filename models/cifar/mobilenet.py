"""MobileNetV2 at half width for 32-pixel images, as in the CRD benchmark (T = 6, width 0.5)."""

from collections.abc import Iterator

from torch import Tensor, nn

from . import CifarNetwork, kaiming, register_variants

# expansion, channels at width 1, blocks, stride of the first block
_PLAN = [
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]
_LAST = 1280


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3×3, linear pointwise projection; a residual if the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *_conv(inputs, hidden, 1),
            nn.ReLU(inplace=True),
            *_conv(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(inplace=True),
            *_conv(hidden, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class CifarMobileNetV2(CifarNetwork):
    classifier_name = "classifier.0"
    classifier_std = 0.01

    def __init__(self, width: float, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        inputs = int(32 * width)
        self.conv1 = nn.Sequential(*_conv(in_chans, inputs, 3, 2), nn.ReLU(inplace=True))
        groups = []
        for expansion, channels, count, stride in _PLAN:
            outputs = int(channels * width)
            layers = []
            for position in range(count):
                layers.append(InvertedResidual(inputs, outputs, stride if position == 0 else 1, expansion))
                inputs = outputs
            groups.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(groups)
        self.conv2 = nn.Sequential(*_conv(inputs, _LAST, 1), nn.ReLU(inplace=True))
        widths = [int(_PLAN[group][1] * width) for group in (1, 2, 4)]
        self._finish([*widths, _LAST], [2, 4, 8, 16], num_classes)
        kaiming(self)

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        x = self.conv1(x)
        for index, group in enumerate(self.blocks):
            x = group(x)
            if index in (1, 2, 4):
                yield x
        yield self.conv2(x)


register_variants(
    globals(), CifarMobileNetV2, {"cifar_mobilenetv2_half": {"width": 0.5}}, first_conv="conv1.0"
)
