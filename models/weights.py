"""Fitting weights to a network: prefixes, other formats and image sizes, and a head for other classes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .build import pretrained_cfg
from .checkpoint import Checkpoint, StateDict
from .errors import ModelError


@dataclass(frozen=True)
class LoadReport:
    """What loading left: keys of the network without weights, keys of the file without a place.

    Both are empty unless the head was replaced, that is, left as it was initialised.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    head_replaced: bool


def load_into(
    network: nn.Module,
    checkpoint: Checkpoint,
    *,
    allow_head_mismatch: bool = False,
    features_only: bool = False,
) -> LoadReport:
    """Put a checkpoint's weights into a network; everything fits or nothing is changed.

    Wrapper prefixes are taken off. Weights in another known format, or made for another image size, go
    through timm's own conversion. With allow_head_mismatch, a classifier of another class count (or none in
    the file) keeps its initialisation. With features_only, what the file has beyond the network's own keys,
    such as a head or the projector of self-supervised training, is left out. Raises ModelError, naming the
    keys that don't fit.
    """
    target = network.state_dict()

    def wanted(weights: StateDict) -> StateDict:
        return _features(weights, target, network) if features_only else weights

    weights = wanted(fitted(checkpoint.state_dict, target))
    head = _head_keys(network, target)
    if _misfits(weights, target) - head:
        weights = wanted(_converted(network, checkpoint.state_dict) or weights)
    if _misfits(weights, target) - head:
        raise ModelError(_misfit_sentence(checkpoint, network, weights, target))
    odd = _misfits(weights, target)
    if odd and not allow_head_mismatch:
        raise ModelError(_head_sentence(checkpoint, network, weights, target))
    # A head of which one part fits by chance is still another head.
    dropped = {key for key in {*weights, *target} if key in head} if odd else set()
    fitting = {key: value for key, value in weights.items() if key not in dropped}
    _refuse_broken(fitting, target, checkpoint)
    try:
        network.load_state_dict(fitting, strict=not odd)
    except RuntimeError as error:  # numbers of a kind that torch cannot turn into the network's
        told = " ".join(str(error).split())[:300]
        raise ModelError(f"The weights in {checkpoint.source} cannot be taken over: {told}") from error
    return LoadReport(
        missing=tuple(key for key in target if key in dropped),
        unexpected=tuple(key for key in weights if key in dropped and key not in target),
        head_replaced=bool(odd),
    )


def _refuse_broken(weights: StateDict, target: StateDict, checkpoint: Checkpoint) -> None:
    """
    Raises:
        ModelError: some are no numbers, or whole ones where the network computes with others.
    """
    for key, value in weights.items():
        if key not in target or not target[key].is_floating_point():
            continue
        if not value.is_floating_point():
            raise ModelError(
                f"The weights in {checkpoint.source} cannot be taken over: {key!r} holds whole numbers "
                f"({value.dtype}) where the network has {target[key].dtype}."
            )
        # Minus infinity may stand in a mask.
        if not bool((value.float() < math.inf).all()):
            raise ModelError(
                f"The weights in {checkpoint.source} are broken: {key!r} holds numbers that are not finite; "
                "take others."
            )


def class_count(checkpoint: Checkpoint, network: nn.Module) -> int | None:
    """How many classes the checkpoint's head has for this network's architecture; None if it has no head."""
    names = _classifier_names(network)
    target = network.state_dict()
    weights = fitted(checkpoint.state_dict, target)
    if _rows(weights, names) is None and _misfits(weights, target) - _head_keys(network, target):
        # The file may be in another format, whose head has another name.
        weights = _converted(network, checkpoint.state_dict) or {}
    return _rows(weights, names)


def classifier_weight(network: nn.Module) -> Tensor | None:
    """The weight of the network's last linear layer, [N,D] or of a 1×1 convolution; None without a head."""
    named = dict(network.named_parameters())
    found = (named.get(f"{name}.weight") for name in _classifier_names(network))
    return next((weight.detach() for weight in found if weight is not None and weight.ndim >= 2), None)


def fitted(weights: StateDict, target: StateDict) -> StateDict:
    """The weights without the wrapper prefix (`module.`, `model.`, `backbone.`, …) that hides most of the
    target's names. What lies outside the prefix belongs to something else and is left out."""
    # In the file's order: of two networks side by side, as contrastive training keeps them, the first.
    matches = {"": sum(key in target for key in weights)}
    for key in weights:
        parts = key.split(".", 4)
        for depth in range(1, min(len(parts), 4)):
            prefix = ".".join(parts[:depth]) + "."
            matches[prefix] = matches.get(prefix, 0) + (key[len(prefix) :] in target)
    best = max(sorted(matches, key=len), key=matches.__getitem__)
    if 2 * matches[best] < len(target):  # too few to be this network; a chance match would only hide the rest
        return dict(weights)
    return {key[len(best) :]: value for key, value in weights.items() if key.startswith(best)}


def _features(weights: StateDict, target: StateDict, network: nn.Module) -> StateDict:
    """Without what belongs to a part that the network does not have, or to its head. Further keys of a part
    that it does have, such as more blocks, stay: they tell that this is another network.
    """

    def part(key: str) -> str:
        return key.partition(".")[0]

    own = {part(key) for key in target} - {part(name) for name in _classifier_names(network)}
    return {key: value for key, value in weights.items() if key in target or part(key) in own}


def _misfits(weights: StateDict, target: StateDict) -> set[str]:
    """Keys missing, unexpected or of another shape; old files may lack BatchNorm's batch counter."""
    missing = {key for key in target if key not in weights and not key.endswith("num_batches_tracked")}
    unexpected = {key for key in weights if key not in target}
    shapes = {key for key in weights if key in target and weights[key].shape != target[key].shape}
    return missing | unexpected | shapes


def _classifier_names(network: nn.Module) -> tuple[str, ...]:
    """Dotted names of the classifier's layers: timm's note of them, else found by `get_classifier`."""
    cfg = getattr(network, "pretrained_cfg", None) or {}
    noted = cfg.get("classifier")
    if noted:
        return (noted,) if isinstance(noted, str) else tuple(noted)
    get = getattr(network, "get_classifier", None)
    layer = get() if get is not None else None
    return tuple(name for name, module in network.named_modules() if module is layer and name)


def _head_keys(network: nn.Module, target: StateDict) -> set[str]:
    names = _classifier_names(network)
    keys = {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}
    return keys | {key for key in target if any(key.startswith(f"{name}.") for name in names)}


def _rows(weights: StateDict, classifiers: tuple[str, ...]) -> int | None:
    for name in classifiers:
        weight = weights.get(f"{name}.weight")
        if weight is not None and weight.ndim >= 2:
            return int(weight.shape[0])
    return None


def _converted(network: nn.Module, raw: StateDict) -> StateDict | None:
    """The weights in the network's own form by timm's loader for that architecture, or None if it fails too.

    It knows the formats of the original authors, and resamples position embeddings to another image size.
    """
    import timm
    from timm.models import clean_state_dict

    built_as = getattr(network, "built_as", None)
    if built_as is None:
        return None
    cleaned = clean_state_dict(raw)
    stripped = fitted(cleaned, network.state_dict())
    known = _rows(stripped, _classifier_names(network))
    # A foreign format hides its head: try the network's own classes, what the last matrix suggests, none.
    matrices = [int(value.shape[0]) for value in cleaned.values() if value.ndim == 2]
    counts = [known, built_as.num_classes, *matrices[-1:], 0] if known is None else [known]
    options: dict[str, Any] = (
        {"img_size": built_as.image_size} if pretrained_cfg(built_as.name).fixed_input_size else {}
    )
    for count in dict.fromkeys(count for count in counts if count is not None):
        for weights in (stripped,) if stripped.keys() == cleaned.keys() else (stripped, cleaned):
            overlay: dict[str, Any] = {"state_dict": dict(weights), "num_classes": count, "label_offset": 0}
            try:
                with torch.random.fork_rng(devices=[]):
                    twin = timm.create_model(
                        built_as.name,
                        pretrained=True,
                        num_classes=count,
                        pretrained_cfg_overlay=overlay,
                        **options,
                    )
            except Exception:  # each failure only means that this reading of the file was wrong
                continue
            converted: StateDict = twin.state_dict()
            return converted
    return None


def _misfit_sentence(
    checkpoint: Checkpoint, network: nn.Module, weights: StateDict, target: StateDict
) -> str:
    missing = [key for key in target if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in target]
    shapes = [
        f"{key} {list(weights[key].shape)} for {list(target[key].shape)}"
        for key in weights
        if key in target and weights[key].shape != target[key].shape
    ]
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:5])}{', …' if len(keys) > 5 else ''})"
        for keys, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of another shape"),
        )
        if keys
    ]
    return f"The weights in {checkpoint.source} don't fit {_name(network)}: keys {'; '.join(parts)}."


def _head_sentence(checkpoint: Checkpoint, network: nn.Module, weights: StateDict, target: StateDict) -> str:
    names = _classifier_names(network)
    had, needed = _rows(weights, names), _rows(target, names)
    has = f"a head for {had} classes" if had is not None else "no head that fits"
    needs = f"{needed} classes" if needed is not None else "no head"
    return f"The weights in {checkpoint.source} have {has}, but {_name(network)} here needs {needs}."


def _name(network: nn.Module) -> str:
    built_as = getattr(network, "built_as", None)
    return built_as.name if built_as is not None else type(network).__name__
