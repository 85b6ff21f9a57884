"""Build a network for the data, load its weights, and keep or replace its head."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .build import Size, build, split_name
from .catalog import fetch_pretrained, has_pretrained, published_labels
from .checkpoint import Checkpoint, read_checkpoint
from .errors import ModelError
from .keys import Matched, list_parts
from .weights import (
    class_count,
    is_detector,
    is_torchvisions,
    load_backbone,
    load_into,
    load_torchvision,
)


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
    """True if the weights name the classes of their head, and the data's are among them."""
    selected: bool = False
    """True if the head consists of the data's rows of a head for more classes."""


def initialize(
    name: str,
    source: str,
    head: str,
    classes: Sequence[str],
    image_size: Size,
    seed: int,
    note: Callable[[str], None],
    role: str = "teacher",
    activation: str | None = None,
) -> InitialNetwork:
    """Build a network and load its weights. Raises ModelError if they, or the head to be kept, do not fit.

    Args:
        source: `auto` (timm's pretrained weights), `none`, or a file. A detector starts from weights of the
            whole detector or of its backbone; then BatchNorm of its backbone is frozen.
        head: `auto` keeps a head whose class names (or their number, if it has no names) are the data's;
            `keep`; `replace`; `none` builds a network without a head. A head that names all the data's
            classes is kept for these classes, in the data's order.
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
        matched = load_into(network, checkpoint, features_only=True)
        if source != "auto":
            weights = _describe_file(weights, checkpoint, matched, note)
        return InitialNetwork(network, weights, head="none", license=weights_license)
    if split_name(network.built_as.name)[0]:
        # Batches of detection are too small for statistics.
        network.freeze_norm()
        if not is_detector(checkpoint) or is_torchvisions(checkpoint):
            if head == "keep":
                raise ModelError(
                    f"--{role}-head keep: the classes of {checkpoint.source} are not those of this kind of "
                    f"detector. Use --{role}-head auto."
                )
            load = load_torchvision if is_torchvisions(checkpoint) else load_backbone
            matched = load(network, checkpoint)
            if source != "auto":
                weights = _describe_file(weights, checkpoint, matched, note)
            return InitialNetwork(network, weights, head="replaced", license=weights_license)
    count = class_count(checkpoint, network)
    rows = None if head == "replace" else _find_rows(checkpoint, classes, count, network)
    keep = head == "keep" or (head == "auto" and _head_fits(checkpoint, classes, count, rows, note))
    if head == "keep" and rows is None and count not in (None, len(classes)):
        raise ModelError(
            f"--teacher-head keep: {checkpoint.source} has {count} classes, not all of the data's "
            f"{len(classes)} among them. Use --teacher-head replace."
        )
    matched = load_into(network, checkpoint, allow_head_mismatch=not keep, rows=rows if keep else None)
    if source != "auto":
        weights = _describe_file(weights, checkpoint, matched, note, dropped=None if keep else count)
    if not keep:
        _reset_head(network, len(classes), seed)
    selected = keep and rows is not None and rows != list(range(count or 0))
    if selected:
        note(f"the head of {checkpoint.source} names the data's {len(classes)} classes: their rows are kept")
    return InitialNetwork(
        network,
        weights,
        head="kept" if keep else "replaced",
        license=weights_license,
        names_classes=rows is not None
        and (checkpoint.label_names or checkpoint.label_descriptions) is not None,
        selected=selected,
    )


def _describe_file(
    weights: str,
    checkpoint: Checkpoint,
    matched: Matched,
    note: Callable[[str], None],
    dropped: int | None = None,
) -> str:
    """Add to the description of a weights file which part of it was taken, and what was left out; report it.

    Args:
        dropped: the number of classes of its head, if that is not used.
    """
    notes = [*checkpoint.notes, matched.source]
    if dropped is not None:
        notes.append(f"without its head for {dropped:,} classes")
    elif matched.head:
        notes.append(f"head from {matched.head}")
    if matched.left_out:
        notes.append(f"left out: {list_parts(matched.left_out)}")
    if not any(notes):
        return weights
    text = "; ".join(filter(None, notes))
    note(f"weights of {checkpoint.source}: {text}")
    return f"{weights[:-1]}; {text})"


HEAD_STD = 0.01
"""Of the weights of a new head: small, so that the first steps barely change the pretrained layers."""


def _reset_head(network: Any, classes: int, seed: int) -> None:
    """Replace the classifier by timm's, with small random weights and biases of 0, or by a detector's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.reset_classifier(classes)
        heads = network.get_classifier() if hasattr(network, "get_classifier") else ()
        for head in heads if isinstance(heads, tuple) else (heads,):
            for layer in head.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    nn.init.trunc_normal_(layer.weight, std=HEAD_STD)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)


def student_source(name: str, source: str, note: Callable[[str], None]) -> str:
    """Return `none` instead of `auto` for an architecture without published weights, with a note."""
    if source == "auto" and not has_pretrained(name):
        note(f"timm has no pretrained weights for {name}: the student starts from scratch")
        return "none"
    return source


def _head_fits(
    checkpoint: Checkpoint,
    classes: Sequence[str],
    count: int | None,
    rows: Sequence[int] | None,
    note: Callable[[str], None],
) -> bool:
    if rows is not None:
        return True
    if count != len(classes):
        return False
    if checkpoint.label_names is None and checkpoint.label_descriptions is None:
        return True
    note(f"the head of {checkpoint.source} has the same number of classes, but other ones: it is replaced")
    return False


def _find_rows(
    checkpoint: Checkpoint, classes: Sequence[str], count: int | None, network: Any
) -> list[int] | None:
    """Return the row of the checkpoint's head for each class by name; None unless each class has its own.

    Files that name no classes have those of the architecture's published weights if their number is equal.
    """
    names = checkpoint.label_names, checkpoint.label_descriptions
    if names == (None, None) and count is not None and count != len(classes):
        names = published_labels(network.built_as.name, count)
    for labels in names:
        if labels is None or len(labels) != count:
            continue
        by_name: dict[str, set[int]] = {}
        for row, label in enumerate(labels):
            for synonym in (label, *label.split(",")):  # ImageNet: "tench, Tinca tinca"
                by_name.setdefault(normalize_label(synonym), set()).add(row)
        candidates = [by_name.get(normalize_label(name), set()) for name in classes]
        rows = [row for found in candidates for row in found]
        if all(len(found) == 1 for found in candidates) and len(set(rows)) == len(rows):
            return rows
    return None


def normalize_label(label: str) -> str:
    """Ignore case, underscores, repeated spaces and the form of accents, in which label files differ."""
    return " ".join(unicodedata.normalize("NFC", label).casefold().replace("_", " ").split())


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
