"""VGG with BatchNorm and without hidden linear layers, for 32-pixel images, as in the CRD benchmark."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from . import CifarNetwork, kaiming, register_variants


class CifarVGG(CifarNetwork):
    """Five blocks of 3×3 convolutions, max-pooled in between; images of 64 pixels are pooled once more."""

    classifier_name = "classifier"
    classifier_std = 0.01
    pre_relu_layer = "block4"  # QuEST takes a VGG's last map before its ReLU

    def __init__(self, counts: list[int], num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        widths = [64, 128, 256, 512, 512]
        inputs = in_chans
        for index, (count, width) in enumerate(zip(counts, widths, strict=True)):
            layers: list[nn.Module] = []
            for position in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width)]
                layers += [nn.ReLU(inplace=True)] if position < count - 1 else []
                inputs = width
            self.add_module(f"block{index}", nn.Sequential(*layers))
        self._finish(widths, [1, 2, 4, 8, 8], num_classes)
        kaiming(self)

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        pools = [False, True, True, True, min(x.shape[-2:]) >= 64]
        for index, pool in enumerate(pools):
            if pool:
                x = F.max_pool2d(x, 2)
            x = F.relu(self.get_submodule(f"block{index}")(x))
            yield x


register_variants(
    globals(),
    CifarVGG,
    {
        "cifar_vgg8": {"counts": [1, 1, 1, 1, 1]},
        "cifar_vgg11": {"counts": [1, 1, 2, 2, 2]},
        "cifar_vgg13": {"counts": [2, 2, 2, 2, 2]},
        "cifar_vgg16": {"counts": [2, 2, 3, 3, 3]},
        "cifar_vgg19": {"counts": [2, 2, 4, 4, 4]},
    },
    first_conv="block0.0",
)
