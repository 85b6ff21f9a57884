"""Labelled images as someone has given them, before it is decided which of them train, select and test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .dataset import Image, ImageSet, Role, Skipped
from .splits import assemble


@dataclass(frozen=True)
class Given:
    """``images`` by the role they were given; without ``has_roles`` all are in train, and none has one."""

    name: str
    source: str
    classes: tuple[str, ...]
    images: Mapping[Role, Sequence[Image]]
    has_roles: bool
    skipped: tuple[Skipped, ...] = ()
    ignored: int = 0
    multi_label: bool = False

    def assembled(self, select_fraction: float | None) -> ImageSet:
        """The image set to learn from; see ``split.assemble``.

        Raises:
            UsageError: as ``split.assemble``.
        """
        return assemble(
            self.name,
            self.source,
            self.classes,
            self.images,
            select_fraction,
            self.skipped,
            self.ignored,
            multi_label=self.multi_label,
        )
