"""The state of an interrupted training, on disk: the newest one, and the one before it."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import JobError
from ..runs.files import atomic_write, sha256

MARK = b"\nsha256 "
"""Before the checksum at the file's end, which torch's reader passes over: a flipped bit in a tensor would
otherwise be read as a number like any other."""

_TAIL = len(MARK) + hashlib.sha256().digest_size * 2


class Curve(Protocol):
    """A training's epochs as lines of text, which are kept with its state."""

    lines: list[str]

    def go_on(self, lines: Sequence[str]) -> None: ...


class Checkpoint:
    """One training's state after its last saved step; it belongs to ``key`` and to no other training."""

    def __init__(
        self,
        path: Path,
        key: str,
        warn: Callable[[str], None] | None = None,
        curve: Curve | None = None,
    ) -> None:
        """``warn`` is told when the newest state is damaged and the one before it is taken; ``curve`` is
        saved with each state, and told what was saved with the one that is loaded.
        """
        self.path = path
        self.previous = path.with_suffix(f".previous{path.suffix}")
        self.key = key
        self.warn = warn or (lambda _: None)
        self.curve = curve

    def save(self, state: dict[str, Any]) -> None:
        lines = [] if self.curve is None else self.curve.lines
        # Given a path, torch would not say that the disk is full.
        with atomic_write(self.path) as part:
            with part.open("wb") as file:
                torch.save({"key": self.key, "curve": lines, **state}, file)
            sum = sha256(part).encode()
            with part.open("ab") as file:
                file.write(MARK + sum)
                file.flush()
                os.fsync(file.fileno())
            if self.path.exists():
                self._keep()

    def _keep(self) -> None:
        """Give what is the newest now a second name, so that there is a newest at any time."""
        try:
            self.previous.unlink(missing_ok=True)
            self.previous.hardlink_to(self.path)
        except OSError:  # a file system without second names
            self.path.replace(self.previous)

    def load(self, device: str) -> dict[str, Any] | None:
        """The newest state that is whole, or None where there is none of this training.

        Raises:
            JobError: what there is is damaged.
        """
        there = [path for path in (self.path, self.previous) if path.exists()]
        for path in there:
            state = _read(path, device)
            if state is None:
                continue
            mine = state.get("key") == self.key
            if path != there[0] and not mine:
                self.warn(
                    f"The checkpoint {there[0]} is damaged, and the one before it is of another training: "
                    "this one begins at its start."
                )
            if not mine:
                return None
            if path != there[0]:
                self.warn(
                    f"The checkpoint {there[0]} is damaged: the training goes on from the one before it."
                )
            lines = state.pop("curve", None)  # older ones have none
            if self.curve is not None and lines is not None:
                self.curve.go_on(lines)
            return state
        if there:
            raise JobError(
                f"The checkpoint {there[0]} is damaged, and there is no other; delete it to train from the "
                "start of this stage."
            )
        return None


def _read(path: Path, device: str) -> dict[str, Any] | None:
    """What was saved, or None where it is not as it was written."""
    if not _intact(path):
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # of an archive that is none, or holds more than tensors, torch raises nearly anything
        return None
    return state if isinstance(state, dict) else None


def _intact(path: Path) -> bool:
    """Whether the checksum at the file's end is that of what stands before it."""
    size = path.stat().st_size - _TAIL
    if size <= 0:
        return False
    seen = hashlib.sha256()
    with path.open("rb") as file:
        while size and (chunk := file.read(min(size, 1 << 20))):
            seen.update(chunk)
            size -= len(chunk)
        return file.read() == MARK + seen.hexdigest().encode()
