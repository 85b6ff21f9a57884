"""Build a network for the data, load its weights, and keep or replace its head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .build import build
from .catalog import fetch_pretrained, has_pretrained
from .checkpoint import Checkpoint, read_checkpoint
from .errors import ModelError
from .weights import class_count, load_into


@dataclass(frozen=True)
class InitialNetwork:
    """A network and the origin of its weights."""

    network: nn.Module
    weights: str
    """``scratch``, ``pretrained`` with the name of the weights, or a file's name with its hash."""
    head: Literal["kept", "replaced", "none"]
    license: str | None
    """License of pretrained weights; None for files of the user and without weights."""
    names_classes: bool = False
    """True if the weights name the classes of their head, and these are the data's in the same order."""


def initialize(
    name: str,
    source: str,
    head: str,
    classes: Sequence[str],
    image_size: int,
    seed: int,
    note: Callable[[str], None],
    role: str = "teacher",
    activation: str | None = None,
) -> InitialNetwork:
    """Build a network and load its weights. Raises ModelError if they, or the head to be kept, do not fit.

    Args:
        source: `auto` (timm's pretrained weights), `none`, or a file.
        head: `auto` keeps a head whose class names (or their number, if it has no names) are the data's;
            `keep`; `replace`; `none` builds a network without a head.
        note: called with messages for the user.
    """
    logits = 0 if head == "none" else len(classes)
    network: Any = build(name, num_classes=logits, image_size=image_size, seed=seed, activation=activation)
    if source == "none":
        return InitialNetwork(network, "scratch", head="replaced", license=None)
    checkpoint = (
        fetch_pretrained(name, f"--{role}-weights") if source == "auto" else read_checkpoint(Path(source))
    )
    trained_with = checkpoint.metadata.get("activation")
    if trained_with is not None and trained_with != activation:
        raise ModelError(
            f"--{role}-weights: {checkpoint.source} was trained with --activation {trained_with}, "
            f"the {role} has {activation or 'its default activation'}. Use other weights"
            + (f" or --activation {trained_with}." if role == "student" else ".")
        )
    weights_license = checkpoint.metadata.get("license")
    weights = f"{Path(source).name} (sha256 {checkpoint.sha256[:12]})"
    if source == "auto":
        weights, weights_license = f"pretrained {checkpoint.source}", checkpoint.license or "unknown license"
    if head == "none":
        load_into(network, checkpoint, features_only=True)
        return InitialNetwork(network, weights, head="none", license=weights_license)
    keep = head == "keep" or (head == "auto" and _head_fits(checkpoint, network, classes, note))
    if head == "keep" and class_count(checkpoint, network) not in (None, len(classes)):
        raise ModelError(
            f"--teacher-head keep: {checkpoint.source} has {class_count(checkpoint, network)} classes, "
            f"the data {len(classes)}. Use --teacher-head replace."
        )
    head_is_new = load_into(network, checkpoint, allow_head_mismatch=not keep)
    if not keep and not head_is_new:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.reset_classifier(len(classes))
    return InitialNetwork(
        network,
        weights,
        head="kept" if keep else "replaced",
        license=weights_license,
        names_classes=_names_classes(checkpoint, classes),
    )


def student_source(name: str, source: str, note: Callable[[str], None]) -> str:
    """Return `none` instead of `auto` for an architecture without published weights, with a note."""
    if source == "auto" and not has_pretrained(name):
        note(f"timm has no pretrained weights for {name}: the student starts from scratch")
        return "none"
    return source


def _head_fits(
    checkpoint: Checkpoint, network: nn.Module, classes: Sequence[str], note: Callable[[str], None]
) -> bool:
    if class_count(checkpoint, network) != len(classes):
        return False
    has_names = checkpoint.label_names is not None or checkpoint.label_descriptions is not None
    if not has_names or _names_classes(checkpoint, classes):
        return True
    note(f"the head of {checkpoint.source} has the same number of classes, but other ones: it is replaced")
    return False


def _names_classes(checkpoint: Checkpoint, classes: Sequence[str]) -> bool:
    """Return True if the checkpoint names exactly these classes in this order."""
    expected = [normalize_label(label) for label in classes]
    return any(
        names is not None and [normalize_label(name) for name in names] == expected
        for names in (checkpoint.label_names, checkpoint.label_descriptions)
    )


def normalize_label(label: str) -> str:
    """Ignore case, underscores and repeated spaces, in which label files differ."""
    return " ".join(label.casefold().replace("_", " ").split())


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
