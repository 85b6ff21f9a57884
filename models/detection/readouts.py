"""Readouts of detectors: the features that distillation methods use, from one forward pass.

- `map@i` [B,C,h,w]: level i of the feature pyramid (0 the finest, -1 the coarsest); `map` is the finest
- `tower@i` [B,C,h,w]: the map of level i that the class scores are computed from; RetinaNet heads only
- `logits` [B,A,K+4]: class logits and box deltas at each anchor; of a two-stage detector the class logits of
  its regions, [B,R,K+1], or with labels its losses, as these depend on the regions that are sampled
- `anchors` [A,4]: boxes (x1, y1, x2, y2) in fractions of the image
- `regions` [B,R,4]: boxes in pixels of the input that a two-stage detector classifies, or with labels is trained
  on; unused rows are 0
- `region_vectors` [B,R,D]: the output of the box head, which the class scores of regions are computed from
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..readout import LOGITS, Readouts, Reads, Shapes


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
        """Names of the features of this network; levels with non-negative numbers."""
        levels = [f"map@{level}" for level in range(self.level_count)]
        towers = [f"tower@{level}" for level in range(len(self.shapes.towers))]
        regions = ("regions", "region_vectors") if self.shapes.region_vector else ()
        return frozenset({"map", "logits", "anchors", *levels, *towers, *regions})

    def check(self, reads: Reads) -> None:
        """Raise ModelError if the network does not have all requested features."""
        for read in sorted(reads):
            if self._from_finest(read) not in self.offers:
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
        """Return the requested features of images [B,3,H,W] by name; labels are boxes [B,M,7]."""
        self.check(reads)
        maps = self.compiled.get("maps", self.network.maps)(x)
        height, width = self.network.image_size
        anchors = self.network.anchors
        features = {"map": maps[0], "anchors": anchors / anchors.new_tensor([width, height, width, height])}
        features |= {f"map@{level}": tensor for level, tensor in enumerate(maps)}
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
