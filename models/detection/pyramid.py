"""What all detectors share: a timm backbone, a feature pyramid of five levels, anchors, targets, readouts.

Features that distillation methods read, from one forward pass:

- `map@i` [B,C,h,w]: level i of the feature pyramid (0 the finest, -1 the coarsest); `map` is the finest
- `tower@i` [B,C,h,w]: the map of level i that the class scores are computed from; RetinaNet heads only
- `logits` [B,A,K+4]: class logits and box deltas at each anchor; of a two-stage detector the class logits of
  its regions, [B,R,K+1]
- `losses` [n]: the parts of the loss on labels, which are those of the first L images, [L,M,7]
- `anchors` [A,4]: boxes (x1, y1, x2, y2) in fractions of the image
- `regions` [B,R,4]: boxes in pixels of the input that a two-stage detector classifies, or with labels is
  trained on; unused rows are 0
- `region_vectors` [B,R,D]: the output of the box head, which the class scores of regions are computed from
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from ..errors import ModelError, UnknownModel
from ..readout import LOGITS, Readouts, Reads, Shapes

STRIDES = (8, 16, 32)
"""Of the backbone's maps, in pixels of the input."""
LEVELS = 5
RATIOS = (0.5, 1.0, 2.0)
"""Height over width of anchors."""
DETECTIONS = 100
"""Largest number of detections per image."""


def create_backbone(name: str, **options: Any) -> nn.Module:
    """Build timm's network of a resolved name that returns its maps of strides 8, 16 and 32.

    Raises UnknownModel if it does not have them.
    """
    with torch.device("meta"):
        probe: Any = timm.create_model(name, features_only=True, **options)
    strides = probe.feature_info.reduction()
    if not set(STRIDES) <= set(strides):
        raise UnknownModel(
            f"Model {name} cannot be a detector's backbone: its maps have strides "
            f"{', '.join(map(str, sorted(set(strides))))}, not {', '.join(map(str, STRIDES))}. Choose "
            "another one, such as mobilenetv2_050 or resnet18."
        )
    levels = [max(i for i, stride in enumerate(strides) if stride == wanted) for wanted in STRIDES]
    backbone: nn.Module = timm.create_model(name, features_only=True, out_indices=levels, **options)
    return backbone


def create_anchors(scales: tuple[float, ...], image_size: tuple[int, int]) -> AnchorGenerator:
    """Return anchors of the usual 4 strides for images of 512 pixels and more, down to 2 for those of 256.

    Objects of smaller images are smaller, but the strides are the same.

    Args:
        scales: binary logarithms of the anchors' sizes at a level, relative to the smallest.
    """
    base = min(4.0, max(2.0, max(image_size) / 128))
    sizes = tuple(tuple(int(base * stride * 2**scale) for scale in scales) for stride in (8, 16, 32, 64, 128))
    return AnchorGenerator(sizes, (RATIOS,) * LEVELS)


class PyramidDetector(nn.Module):
    """A detector on a feature pyramid: P3 to P7 of strides 8 to 128, from a backbone's maps.

    A subclass calls `build_pyramid` once, and defines `raw`, `decode`, `compute_features` and `decoder`.
    """

    backbone: Any
    anchors: Tensor
    """All anchors [A,4]: x1, y1, x2, y2 in pixels of the input."""
    sides: Tensor
    """Width, height, width and height of the input in pixels [4]."""
    anchors_per_location: int
    output_names: tuple[str, ...] = ("logits", "boxes")
    """Names of the tensors that `raw` returns."""
    has_tower = False
    """True if class scores are computed from a tower of convolutions shared by all levels."""
    region_levels = 0
    """Number of levels, from the finest, that regions are pooled from; 0 if there are no regions."""
    region_width = 0
    """Numbers in the vector of a region."""

    def build_pyramid(
        self, generator: AnchorGenerator, num_classes: int, image_size: tuple[int, int], width: int
    ) -> None:
        """Add the pyramid and the anchors to a module with a `backbone`, see `create_backbone`."""
        self.image_size, self.num_classes, self.fpn_width = image_size, num_classes, width
        self.fpn = FeaturePyramidNetwork(
            self.backbone.feature_info.channels(), width, extra_blocks=LastLevelP6P7(width, width)
        )
        self.anchors_per_location = generator.num_anchors_per_location()[0]
        self.has_frozen_norm = False
        self.grids = self._compute_grids()
        with torch.device("cpu"):
            shown = ImageList(torch.empty(1, 3, *image_size), [image_size])
            anchors = generator(shown, [torch.empty(1, 1, *grid) for grid in self.grids])[0]
            sides = torch.tensor([*image_size[::-1], *image_size[::-1]], dtype=torch.float32)
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("sides", sides, persistent=False)
        # timm's name of the layers whose outputs are classes.
        self.pretrained_cfg = {"classifier": tuple(self.classifier_names())}

    def forward(self, x: Tensor) -> Tensor:
        """Return the detections of images [B,3,H,W], see `decode`."""
        return self.decode(*self.raw(x))

    def raw(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs `output_names` of images [B,3,H,W]."""
        raise NotImplementedError

    def decode(self, *outputs: Tensor) -> Tensor:
        """Return the detections [B,100,6] of the outputs of `raw`.

        Rows are (score, class, x1, y1, x2, y2) by falling score, with coordinates in 0..1 of the input's
        width and height; unused rows are 0. They are computed in fp32 even under autocast. On the meta device
        there are shapes only.
        """
        raise NotImplementedError

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the levels of the pyramid [B,C,h,w] of images [B,3,H,W], finest first."""
        levels = self.backbone(x)
        if str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC"):
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        return list(self.fpn(OrderedDict((str(i), level) for i, level in enumerate(levels))).values())

    def targets(self, labels: Tensor) -> list[dict[str, Tensor]]:
        """Return torchvision's targets of labels [B,M,7], with boxes in pixels of the input.

        Rows are (class, x1, y1, x2, y2, area, crowd) with coordinates in 0..1 of the input's width and
        height. Rows of class -1 are padding; crowds are not trained on.
        """
        targets = []
        for rows in labels:
            kept = rows[(rows[:, 0] >= 0) & (rows[:, 6] == 0)]
            targets.append({"labels": kept[:, 0].long(), "boxes": kept[:, 1:5] * self.sides})
        return targets

    def to_rows(self, images: list[dict[str, Tensor]], like: Tensor) -> Tensor:
        """Return torchvision's detections of images as those of `decode`."""
        detections = like.new_zeros(len(images), DETECTIONS, 6)
        for rows, image in zip(detections, images, strict=True):
            n = len(image["scores"])
            rows[:n, 0], rows[:n, 1] = image["scores"], image["labels"]
            rows[:n, 2:] = image["boxes"] / self.sides
        return detections

    def exportable(self) -> nn.Module:
        """Return the module to export: images [B,3,H,W] to the outputs of `raw`."""
        return _Exportable(self)

    def readouts(self, image_size: Any = None) -> "DetectorReadouts":
        """Return the features of this detector; its image size is that of `build`."""
        return DetectorReadouts(self)

    @property
    def level_counts(self) -> list[int]:
        """Number of anchors of each level."""
        return [height * width * self.anchors_per_location for height, width in self.grids]

    def classifier_names(self) -> list[str]:
        """Return the names of the layers whose outputs are classes."""
        raise NotImplementedError

    def freeze_norm(self) -> None:
        """Fix statistics and parameters of the backbone's BatchNorm, as batches of detection are small."""
        self.has_frozen_norm = True
        for module in self._backbone_norms():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.has_frozen_norm:
            for module in self._backbone_norms():
                module.eval()
        return self

    def _backbone_norms(self) -> list[nn.Module]:
        return [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]

    def _compute_grids(self) -> list[tuple[int, int]]:
        """Return height and width of each level by shapes alone."""
        shapes = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            levels = shapes.maps(torch.empty(1, 3, *self.image_size, device="meta"))
        return [(level.shape[2], level.shape[3]) for level in levels]


class DetectorReadouts(Readouts):
    """A detector that returns features; the network itself is not changed.

    Args:
        network: a `PyramidDetector`.
    """

    def __init__(self, network: Any) -> None:
        nn.Module.__init__(self)  # not that of Readouts, which explores a timm network
        self.network = network
        self.name = network.built_as.name
        self.compiled: dict[str, Callable[..., Any]] = {}
        self.embeds_alone = False
        levels = tuple((network.fpn_width, height, width) for height, width in network.grids)
        self.level_count = len(levels)
        towers = levels if network.has_tower else ()
        self.shapes = Shapes(
            map=levels[0],
            vector=None,
            logits=network.num_classes,
            levels=levels,
            towers=towers,
            region_vector=network.region_width or None,
            region_levels=network.region_levels,
        )

    @property
    def offers(self) -> Reads:
        """Names of the features without labels; levels with non-negative numbers."""
        levels = [f"map@{level}" for level in range(self.level_count)]
        towers = [f"tower@{level}" for level in range(len(self.shapes.towers))]
        regions = ("regions", "region_vectors") if self.shapes.region_vector else ()
        return frozenset({"map", "logits", "anchors", *levels, *towers, *regions})

    def check(self, reads: Reads) -> None:
        """Raise ModelError if the network does not have all requested features."""
        for read in sorted(reads):
            if self._from_finest(read) not in self.offers | {"losses"}:
                raise ModelError(
                    f"Detector {self.name} has no feature {read!r}. It has {', '.join(sorted(self.offers))}."
                )

    def compile_features(self, mode: str | None) -> None:
        """Compile backbone and pyramid by torch.compile with this mode; None to undo it."""
        self.compiled = {}
        if mode is not None:
            # Sizes do not change during training.
            self.compiled["maps"] = torch.compile(self.network.maps, dynamic=False, mode=mode)

    def forward(self, x: Tensor, reads: Reads = LOGITS, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the requested features of images [B,3,H,W] by name; labels are boxes [L,M,7]."""
        self.check(reads)
        maps = self.compiled.get("maps", self.network.maps)(x)
        features = {"map": maps[0], "anchors": self.network.anchors / self.network.sides}
        features |= {f"map@{level}": tensor for level, tensor in enumerate(maps)}
        if labels is not None and not len(labels):  # a micro-batch of unlabeled images
            features["losses"], labels = maps[0][:0].float().sum()[None], None
        needed = {self._from_finest(read) for read in reads}
        if needed - features.keys():
            features |= self.network.compute_features(maps, labels)
        return {read: features[self._from_finest(read)] for read in reads}

    def _from_finest(self, read: str) -> str:
        """Return the name of a feature with the level counted from the finest: `map@-1` is `map@4`."""
        name, separator, level = read.partition("@-")
        if separator and level.isdigit() and 0 < int(level) <= self.level_count:
            return f"{name}@{self.level_count - int(level)}"
        return read


class _Exportable(nn.Module):
    def __init__(self, detector: PyramidDetector) -> None:
        super().__init__()
        self.detector = detector
        self.output_names = detector.output_names

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.detector.raw(x)
