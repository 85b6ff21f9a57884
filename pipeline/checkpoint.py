"""The state of an interrupted training, on disk."""

import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from .errors import JobError
from .files import whole


class Checkpoint:
    """One training's state after its last finished epoch; it belongs to ``key`` and to no other training."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key

    def save(self, state: dict[str, Any]) -> None:
        # Given a path, torch would not say that the disk is full.
        with whole(self.path) as part, part.open("wb") as file:
            torch.save({"key": self.key, **state}, file)

    def load(self, device: str) -> dict[str, Any] | None:
        """The state, or None where there is none of this training.

        Raises:
            JobError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, BadZipFile, pickle.UnpicklingError, KeyError) as error:
            raise JobError(
                f"The checkpoint {self.path} is damaged; delete it to train from the start of this stage."
            ) from error
        return state if state.get("key") == self.key else None
