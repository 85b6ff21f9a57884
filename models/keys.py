"""Match the names in a checkpoint with a network's: wrappers, prefixes, averaged copies, heads."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .checkpoint import AVERAGED, StateDict

WRAPPERS = frozenset({
    "module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module"
})  # fmt: skip
"""Parts that DDP, torch.compile, activation checkpointing and FSDP add to names, at any depth."""

HEADS = frozenset({
    "classification_head", "classifier", "classifiers", "cls", "cls_head", "dense", "fc", "final",
    "final_layer", "head", "head_fc", "heads", "last_linear", "linear", "logits", "out", "output",
    "output_layer",
})  # fmt: skip
"""Names of classifiers in training programs."""

_COUNTERS = frozenset({
    "decay", "n_averaged", "num_batches_tracked", "num_updates", "total_ops", "total_params"
})  # fmt: skip
_TRAINING = re.compile(r"(?:^|_)(?:acc|accuracy|criterion|loss|metrics?)(?:_|$)", re.IGNORECASE)

MAX_LISTED = 5
"""Number of left-out parts that messages name."""


@dataclass(frozen=True)
class Matched:
    """Weights under the network's names."""

    weights: StateDict
    source: str = ""
    """The part of the file that they are, in words; empty for all of it."""
    head: str = ""
    """Name of the head in the file, if the network has another one."""
    left_out: frozenset[str] = frozenset()
    """Tensors that are not used, by their names within the used part or, outside of it, within the file."""


def match_keys(weights: StateDict, target: StateDict, classifiers: tuple[str, ...]) -> Matched:
    """Name a checkpoint's weights as the network does.

    A head under another name is taken if it is one layer that fits. Left out are tensors outside the prefix
    that matches best, other heads, other averaged copies, losses, metrics and counters.

    Args:
        target: the network's state_dict.
        classifiers: names of the layers of the network's head.
    """
    weights = remove_wrappers(weights, target)
    prefix = find_prefix(weights, target)
    own = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    source = f"{'averaged copy' if AVERAGED.search(prefix) else 'prefix'} {prefix[:-1]}" if prefix else ""
    rest = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    rest |= {prefix + key: value for key, value in own.items() if key not in target}
    heads = _group_heads(rest, prefix)
    left_out = {key for key in rest if not key.startswith(prefix) or _is_extra(key[len(prefix) :], rest[key])}
    left_out |= {f"{root}.{leaf}" for root, parts in heads.items() for leaf in parts}
    own = {key: value for key, value in own.items() if prefix + key not in left_out}
    layer, head = _choose_head(heads, target, classifiers)
    if head.keys() & own.keys():
        layer, head = "", {}
    left_out -= {f"{layer}.weight", f"{layer}.bias"}
    return Matched(own | head, source, layer, frozenset(key.removeprefix(prefix) for key in left_out))


def remove_wrappers(weights: StateDict, target: StateDict) -> StateDict:
    """Remove wrappers from names, unless the network has parts of these names or two names become equal."""
    wrappers = WRAPPERS - {part for key in target for part in key.split(".")}
    names = {key: ".".join(part for part in key.split(".") if part not in wrappers) for key in weights}
    if len(set(names.values())) < len(names):
        return dict(weights)
    return {names[key]: value for key, value in weights.items()}


def find_prefix(weights: StateDict, target: StateDict) -> str:
    """Return the prefix (`model.`, `backbone.` …) for which most names match the target's.

    Of equal ones, an averaged copy is preferred. It is empty if too few match for this network.
    """
    # In the file's order: of two networks, as in files of contrastive training, the first.
    matches = {"": sum(key in target for key in weights)}
    for key in weights:
        parts = key.split(".", 4)
        for depth in range(1, min(len(parts), 4)):
            prefix = ".".join(parts[:depth]) + "."
            matches[prefix] = matches.get(prefix, 0) + (key[len(prefix) :] in target)
    best = max(sorted(matches, key=len), key=lambda p: (matches[p], AVERAGED.search(p) is not None))
    return best if 2 * matches[best] >= len(target) else ""


def _is_extra(key: str, value: torch.Tensor) -> bool:
    """Return True for a tensor, unknown to the network, that belongs to training and not to a layer."""
    first, last = key.split(".")[0], key.rpartition(".")[2]
    is_counter = value.numel() == 1 and (last in _COUNTERS or not value.is_floating_point())
    return is_counter or bool(_TRAINING.search(first)) or (first != key and bool(AVERAGED.search(first)))


def _group_heads(rest: StateDict, prefix: str) -> dict[str, StateDict]:
    """Return unmatched tensors of heads, as {name of the head: {name within it: tensor}}."""
    heads: dict[str, StateDict] = defaultdict(dict)
    for key, value in rest.items():
        parts = key.split(".")
        first = next((i for i, part in enumerate(parts[:-1]) if part in HEADS), None)
        if first is not None and prefix.startswith("".join(f"{part}." for part in parts[:first])):
            heads[".".join(parts[: first + 1])][".".join(parts[first + 1 :])] = value
    return heads


def _choose_head(
    heads: dict[str, StateDict], target: StateDict, classifiers: tuple[str, ...]
) -> tuple[str, StateDict]:
    """Return the name of the only head that is one layer of the network's width, and its tensors renamed.

    Further layers, such as a norm before it, would be lost.
    """
    if len(classifiers) != 1 or f"{classifiers[0]}.weight" not in target:
        return "", {}
    fitting = []
    for root, parts in heads.items():
        layers = {f"{root}.{name}".rpartition(".")[0] for name in parts}
        layer = {name.rpartition(".")[2]: value for name, value in parts.items()}
        head = _rename_layer(layer, target, classifiers[0]) if len(layers) == 1 else None
        if head is not None:
            fitting.append((root.count("."), layers.pop(), head))
    nearest = max((depth for depth, *_ in fitting), default=0)  # to the matched tensors
    chosen = [(name, head) for depth, name, head in fitting if depth == nearest]
    return chosen[0] if len(chosen) == 1 else ("", {})


def _rename_layer(layer: StateDict, target: StateDict, classifier: str) -> StateDict | None:
    """Return weight and bias of a layer under a classifier's name; None if the layer does not fit."""
    weight, bias, expected = layer.get("weight"), layer.get("bias"), target[f"{classifier}.weight"]
    if weight is None or weight.ndim < 2 or not layer.keys() <= {"weight", "bias"}:
        return None
    if weight[:1].numel() != expected[:1].numel():
        return None
    renamed = {f"{classifier}.weight": weight.reshape(len(weight), *expected.shape[1:])}
    if f"{classifier}.bias" in target:
        renamed[f"{classifier}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    elif bias is not None:
        return None
    return renamed


def list_parts(keys: Iterable[str]) -> str:
    """Return the parts to which tensors belong, with the number of tensors."""
    counts = Counter(key.partition(".")[0] for key in keys)
    parts = [f"{part} ({count} tensor{'s' if count > 1 else ''})" for part, count in sorted(counts.items())]
    more = f" and {len(parts) - MAX_LISTED} more" if len(parts) > MAX_LISTED else ""
    return ", ".join(parts[:MAX_LISTED]) + more
