"""Errors of the runtime."""

from __future__ import annotations


class ImageError(Exception):
    """An image that cannot be read: the message contains its `name`, `reason` does not."""

    exit_code = 1

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"cannot read {name}: {reason}" if name else reason)
        self.reason = reason


class ArtifactError(Exception):
    """A model file or artifact folder that is missing, damaged or of another kind."""

    exit_code = 1
