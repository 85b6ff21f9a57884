"""The saved state of an unfinished training: the newest one and the one before it."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import JobError
from ..runs.files import atomic_write
from ..runs.hashes import sha256

MARK = b"\nsha256 "
"""Precedes the checksum at the end of the file, which torch's reader ignores. Without it, a flipped bit in a
tensor would go unnoticed."""

_TAIL = len(MARK) + hashlib.sha256().digest_size * 2


class Checkpoint:
    """The file with a training's state after its last saved step.

    Args:
        key: identifies the training; states with another key are ignored.
    """

    def __init__(self, path: Path, key: str, warn: Callable[[str], None] = lambda _: None) -> None:
        self.path = path
        self.previous = path.with_suffix(f".previous{path.suffix}")
        self.key = key
        self.warn = warn

    def save(self, state: dict[str, Any]) -> None:
        # Given a path instead of a file, torch would not report a full disk.
        with atomic_write(self.path) as part:
            with part.open("wb") as file:
                torch.save({"key": self.key, **state}, file)
            checksum = sha256(part).encode()
            with part.open("ab") as file:
                file.write(MARK + checksum)
                file.flush()
                os.fsync(file.fileno())
            if self.path.exists():
                self._keep_previous()

    def _keep_previous(self) -> None:
        try:  # a hard link, so that ``path`` exists at any time
            self.previous.unlink(missing_ok=True)
            self.previous.hardlink_to(self.path)
        except OSError:  # not supported by the file system
            self.path.replace(self.previous)

    def load(self, device: str) -> dict[str, Any] | None:
        """Return the newest intact state, or None if this training has none.

        Raises:
            JobError: all states are damaged.
        """
        files = [path for path in (self.path, self.previous) if path.exists()]
        for path in files:
            state = _read(path, device)
            if state is None:
                continue
            if path != files[0]:
                self.warn(
                    f"The checkpoint {files[0]} is damaged. Training resumes from the previous one."
                    if state.get("key") == self.key
                    else f"The checkpoint {files[0]} is damaged, and the previous one belongs to another "
                    "training. Training starts from the beginning."
                )
            return state if state.get("key") == self.key else None
        if files:
            raise JobError(
                f"The checkpoint {files[0]} is damaged, and there is no other. Delete it to start over."
            )
        return None


def _read(path: Path, device: str) -> dict[str, Any] | None:
    if not _is_intact(path):
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch raises nearly any exception for a file that is not a checkpoint
        return None
    return state if isinstance(state, dict) else None


def _is_intact(path: Path) -> bool:
    """Compare the checksum at the end of the file."""
    size = path.stat().st_size - _TAIL
    if size <= 0:
        return False
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while size and (chunk := file.read(min(size, 1 << 20))):
            checksum.update(chunk)
            size -= len(chunk)
        return file.read() == MARK + checksum.hexdigest().encode()
