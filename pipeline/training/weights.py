"""Weights files and checkpoints: those that a run writes and reads, and those that it starts from."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.build import Size, build
from ...models.catalog import check_published, has_pretrained
from ...models.checkpoint import read_checkpoint, save_weights
from ...models.initialize import initialize
from ...models.weights import load_into
from ..config.network import NetworkSpec
from ..config.options import Options
from ..data.dataset import ImageSet
from ..errors import JobError, UsageError, is_system_fault
from ..runs.device import Engine
from ..runs.files import atomic_write
from ..runs.hashes import sha256
from .task import Teacher

MARK = b"\nsha256 "
"""Precedes the checksum at the end of the file, which torch's reader ignores. Without it, a flipped bit in a
tensor would go unnoticed."""

_TAIL = len(MARK) + hashlib.sha256().digest_size * 2


def weights_metadata(
    spec: NetworkSpec, classes: Sequence[str], key: str, license: str | None
) -> dict[str, str]:
    """Return the metadata with which a weights file can be another run's ``--teacher-weights``.

    ``license`` is that of the weights from which training started; it applies to the trained ones too.
    """
    return {
        "architecture": spec.name,
        **({"labels": json.dumps(list(classes), ensure_ascii=False)} if spec.classes else {}),
        "key": key,
        **({} if spec.activation is None else {"activation": spec.activation}),
        **({} if license is None else {"license": license}),
    }


def write_weights(
    run: Path, spec: NetworkSpec, network: nn.Module, classes: Sequence[str], key: str, license: str | None
) -> Path:
    """Write a network's weights into a run folder and return the file."""
    with atomic_write(run / spec.file) as part:
        save_weights(network, part, weights_metadata(spec, classes, key, license))
    return run / spec.file


def load_network(run: Path, spec: NetworkSpec) -> nn.Module:
    """Load a trained network of a run, on the CPU, in eval mode."""
    network = build(
        spec.name, num_classes=spec.classes, image_size=spec.image_size, activation=spec.activation
    )
    load_into(network, read_checkpoint(run / spec.file))
    return network.eval()


def load_teacher(run: Path, spec: NetworkSpec, engine: Engine) -> Teacher:
    """Load a trained network of a run as a frozen teacher, on the engine's device."""
    return Teacher(load_network(run, spec), spec.geometry, engine).to(engine.device)


def check_weights(options: Options, data: ImageSet, stages: Collection[str], *, download: bool) -> None:
    """Check the weights from which these stages start, before hours of work and not after.

    Files are loaded; published weights are looked up, and downloaded into the cache if ``download``.
    """
    published: list[tuple[str, str]] = []
    files: list[tuple[str, str, str, Size, int, str, str | None]] = []
    assert options.image_size is not None
    if "teacher" in stages:
        teachers = zip(options.teacher, options.teacher_weights, options.teacher_head, strict=True)
        for number, (name, source, head) in enumerate(teachers):
            if source == "auto":
                published.append((name, "--teacher-weights"))
            elif source != "none":
                files.append((name, source, head, options.image_size, options.seed + number, "teacher", None))
    if "student" in stages:
        name, source = options.student, options.student_weights
        # A student without published weights starts from scratch.
        if source == "auto" and has_pretrained(name):
            published.append((name, "--student-weights"))
        elif source not in ("auto", "none"):
            size = options.student_size or options.image_size
            files.append((name, source, "auto", size, options.seed, "student", options.activation))
    for name, source, mode, size, seed, role, activation in files:
        # The stage that loads the weights repeats the notes.
        initialize(name, source, mode, data.classes, size, seed, lambda _note: None, role, activation)
    check_published(published, download=download)


def starts_from_scratch(options: Options) -> bool:
    """Return True if the student starts without weights."""
    if options.student_weights != "auto":
        return options.student_weights == "none"
    return not has_pretrained(options.student)


def check_weights_file(source: str, role: str) -> None:
    """Raise UsageError unless ``--teacher-weights`` or ``--student-weights`` is auto, none or a file."""
    path = Path(source)
    if source in ("auto", "none") or path.is_file():
        return
    if not path.is_dir():
        raise UsageError(f"--{role}-weights {source} does not exist. Set it to auto, none or a file.")
    # The files of a run folder, which are numbered for several teachers.
    inside = sorted(path.glob(f"{role}.safetensors")) or sorted(path.glob(f"{role}.*.safetensors"))
    advice = f"a file in it, such as {inside[0]}" if inside else "auto, none or a file"
    raise UsageError(f"--{role}-weights {source} is a folder. Set it to {advice}.")


class Checkpoint:
    """The file with a training's state after its last saved step; states with another ``key`` are ignored."""

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
                try:  # a hard link, so that ``path`` exists at any time
                    self.previous.unlink(missing_ok=True)
                    self.previous.hardlink_to(self.path)
                except OSError:  # not supported by the file system
                    self.path.replace(self.previous)

    def load(self, device: str) -> dict[str, Any] | None:
        """Return the newest intact state, or None without one; raise JobError if all states are damaged."""
        files = [path for path in (self.path, self.previous) if _exists(path)]
        for path in files:
            state = _read_checkpoint(path, device)
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


def _read_checkpoint(path: Path, device: str) -> dict[str, Any] | None:
    if not _is_intact(path):
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises nearly any exception for a file that is not a checkpoint
        if is_system_fault(error):
            raise
        return None
    return state if isinstance(state, dict) else None


def _exists(path: Path) -> bool:
    """Return True if a file exists; raise OSError if that cannot be found out, unlike ``Path.exists``."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


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
