"""The networks of a run by name and size, without their weights."""

from dataclasses import dataclass, replace

from ...export.runtime import Preprocessing, Size
from ...models.build import Geometry, geometry

CROP_MODES = {"crop": "center", "squash": "squash", "pad": "border"}
"""Values of ``--resize`` and timm's names of them."""


@dataclass(frozen=True)
class NetworkSpec:
    """A network's architecture, its input and its weights file."""

    name: str
    """timm's full name."""
    image_size: Size
    """Pixels of the input."""
    classes: int
    """Number of logits; 0 without a head."""
    file: str
    """Weights file in the run folder."""
    activation: str | None = None
    """Activation that replaces the network's own."""
    resize: str | None = None
    """Value of ``--resize``: how images get the input's shape; as published if None."""

    gray_bits: int = 16
    """Number of bits that 16-bit gray images of the data use."""

    @property
    def geometry(self) -> Geometry:
        g = geometry(self.name, self.image_size)
        if self.resize is None:
            return g
        # The whole picture is shown, unless it is cropped.
        fraction = g.crop_fraction if self.resize == "crop" else 1.0
        return replace(g, crop_mode=CROP_MODES[self.resize], crop_fraction=fraction)

    @property
    def preprocessing(self) -> Preprocessing:
        """The runtime's path from an image to the input."""
        g = self.geometry
        return Preprocessing.create(
            g.image_size, g.crop_fraction, g.interpolation, g.crop_mode, g.mean, g.std, self.gray_bits
        )
