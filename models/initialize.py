"""A network ready to be trained or asked: built for the data, its weights loaded, its head judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .build import build
from .checkpoint import Checkpoint, read_checkpoint
from .errors import ModelError
from .pretrained import fetch_pretrained, has_pretrained
from .weights import class_count, load_into


@dataclass(frozen=True)
class Start:
    """A network and where it starts from."""

    network: nn.Module
    weights: str
    """``scratch``, ``pretrained`` with the name of the weights, or a file's name with its hash."""
    head: Literal["kept", "replaced", "none"]
    licence: str | None
    """Of pretrained weights; None where they are the user's own or there are none."""
    names_classes: bool = False
    """Whether the weights say of their head that it knows these classes in this order."""


def start(
    name: str,
    source: str,
    head: str,
    classes: Sequence[str],
    image_size: int,
    seed: int,
    note: Callable[[str], None],
    role: str = "teacher",
    activation: str | None = None,
) -> Start:
    """Build a network and load what ``source`` names.

    Args:
        source: ``auto`` (timm's pretrained weights), ``none``, or a file.
        head: ``auto`` keeps a head whose class names (or count, where they are unknown) are the data's;
            ``keep``; ``replace``; ``none`` builds a network without one.
        activation: what stands in for the network's own.

    Raises:
        ModelError: the weights cannot be had or do not fit; with ``keep``, the head does not.
    """
    logits = 0 if head == "none" else len(classes)
    network: Any = build(name, num_classes=logits, image_size=image_size, seed=seed, activation=activation)
    if source == "none":
        return Start(network, "scratch", head="replaced", licence=None)
    checkpoint = (
        fetch_pretrained(name, f"--{role}-weights") if source == "auto" else read_checkpoint(Path(source))
    )
    learned_with = checkpoint.metadata.get("activation")
    if learned_with is not None and learned_with != activation:
        raise ModelError(
            f"The weights of {checkpoint.source} were trained with --activation {learned_with}: a {role} "
            f"{'without it' if activation is None else f'with {activation}'} computes something else; take "
            "other weights" + (", or repeat it." if role == "student" else ".")
        )
    if head == "none":
        load_into(network, checkpoint, features_only=True)
        described, licence = _described(source, checkpoint), _licence(source, checkpoint)
        return Start(network, described, head="none", licence=licence)
    keep = head == "keep" or (head == "auto" and _fits(checkpoint, network, classes, note))
    if head == "keep" and class_count(checkpoint, network) not in (None, len(classes)):
        raise ModelError(
            f"The head of {checkpoint.source} has {class_count(checkpoint, network)} classes and the data "
            f"{len(classes)}: it cannot be kept; say --teacher-head replace."
        )
    loaded = load_into(network, checkpoint, allow_head_mismatch=not keep)
    if not keep and not loaded.head_replaced:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.reset_classifier(len(classes))
    return Start(
        network,
        _described(source, checkpoint),
        head="kept" if keep else "replaced",
        licence=_licence(source, checkpoint),
        names_classes=_names(checkpoint, classes),
    )


def student_source(name: str, source: str, note: Callable[[str], None]) -> str:
    """``auto`` on an architecture without published weights is from scratch, with a note."""
    if source == "auto" and not has_pretrained(name):
        note(f"timm has no pretrained weights of {name}: the student starts from scratch")
        return "none"
    return source


def _fits(
    checkpoint: Checkpoint, network: nn.Module, classes: Sequence[str], note: Callable[[str], None]
) -> bool:
    count = class_count(checkpoint, network)
    if count != len(classes):
        return False
    if (checkpoint.label_names or checkpoint.label_descriptions) is None or _names(checkpoint, classes):
        return True
    note(f"the head of {checkpoint.source} has other classes of the same number: it is replaced")
    return False


def _names(checkpoint: Checkpoint, classes: Sequence[str]) -> bool:
    """Whether a file names just these classes, in this order."""
    named = [names for names in (checkpoint.label_names, checkpoint.label_descriptions) if names is not None]
    wanted = [plain(label) for label in classes]
    return any([plain(label) for label in names] == wanted for names in named)


def plain(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").split())


def _licence(source: str, checkpoint: Checkpoint) -> str | None:
    """Of published weights, or of those that a file was made from, where it is one of ours that says so."""
    if source == "auto":
        return checkpoint.licence or "an unknown licence"
    return checkpoint.metadata.get("licence")


def _described(source: str, checkpoint: Checkpoint) -> str:
    if source == "auto":
        return f"pretrained {checkpoint.source}"
    return f"{Path(source).name} (sha256 {checkpoint.sha256[:12]})"


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
