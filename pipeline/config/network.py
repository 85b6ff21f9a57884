"""The networks of a run by name and size, without their weights."""

from dataclasses import dataclass

from ...export.runtime import Preprocessing
from ...models.build import Geometry, geometry


@dataclass(frozen=True)
class NetworkSpec:
    """A network's architecture, its input and its weights file."""

    name: str
    """timm's full name."""
    image_size: int
    """Side of the input in pixels."""
    classes: int
    """Number of logits; 0 without a head."""
    file: str
    """Weights file in the run folder."""
    activation: str | None = None
    """Activation that replaces the network's own."""

    @property
    def geometry(self) -> Geometry:
        return geometry(self.name, self.image_size)

    @property
    def preprocessing(self) -> Preprocessing:
        """The runtime's path from an image to the input."""
        g = self.geometry
        return Preprocessing.create(
            g.image_size, g.crop_fraction, g.interpolation, g.crop_mode, g.mean, g.std
        )
