"""Fit weights to a network: prefixes, other formats and image sizes, heads for other classes."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .build import build, pretrained_cfg, split_name
from .checkpoint import Checkpoint, StateDict
from .errors import ModelError
from .keys import Matched, find_prefix, match_keys, remove_wrappers

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in Pillow's gray (ITU-R 601)."""


def load_into(
    network: nn.Module,
    checkpoint: Checkpoint,
    *,
    allow_head_mismatch: bool = False,
    features_only: bool = False,
    rows: Sequence[int] | None = None,
) -> Matched:
    """Load a checkpoint's weights into a network; return them under its names, see `match`.

    Raises ModelError, and changes nothing, if keys do not fit, or values are not finite.

    Args:
        allow_head_mismatch: keep the initialized classifier if the file has one for another number of
            classes, or none.
        features_only: ignore parts that the network does not have, such as a head or the projector of
            self-supervised training.
        rows: the checkpoint's class of each of the network's classes; the same ones by default.
    """
    target = network.state_dict()
    matched = match(network, checkpoint, features_only=features_only)
    weights, head = matched.weights, _head_keys(network, target)
    if rows is not None:
        count = _count_classes(weights, network)
        weights = {
            key: _select_rows(value, rows, count, network) if key in head else value
            for key, value in weights.items()
        }
    misfits = _misfit_keys(weights, target)
    if misfits - head:
        raise ModelError(_describe_misfits(checkpoint, network, weights, target))
    if misfits and not allow_head_mismatch:
        raise ModelError(_describe_head(checkpoint, network, weights, target))
    # A head of which only one part fits is still another head.
    fitting = {key: value for key, value in weights.items() if not misfits or key not in head}
    _refuse_broken(fitting, target, checkpoint)
    try:
        network.load_state_dict(fitting, strict=not misfits)
    except RuntimeError as error:  # a dtype that torch cannot convert
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"The weights in {checkpoint.source} cannot be loaded: {reason}") from error
    return matched


def is_detector(checkpoint: Checkpoint) -> bool:
    """Return True if these are weights of a detector with a feature pyramid, not only of a backbone."""
    return any("fpn" in key.split(".") for key in checkpoint.state_dict)


def load_backbone(detector: Any, checkpoint: Checkpoint) -> Matched:
    """Load weights of a classifier into a detector's backbone; see `load_into`."""
    built_as = detector.built_as
    _, name = split_name(built_as.name)
    with torch.random.fork_rng(devices=[]):
        classifier = build(
            name, num_classes=0, image_size=built_as.image_size, activation=built_as.activation
        )
    matched = load_into(classifier, checkpoint, features_only=True)
    # timm renames layers of some networks that return maps: `stages.0` is `stages_0`, or `model.stages.0`.
    target = detector.backbone.state_dict()
    names = {re.sub(r"^(model|body)\.", "", key).replace(".", "_"): key for key in target}
    state = {key.replace(".", "_"): value for key, value in classifier.state_dict().items()}
    detector.backbone.load_state_dict({key: state[flat] for flat, key in names.items()})
    return matched


def is_torchvisions(checkpoint: Checkpoint) -> bool:
    """Return True if these are weights of a detector of torchvision, such as those for COCO."""
    return any(key.startswith("backbone.body.") for key in checkpoint.state_dict)


def load_torchvision(detector: Any, checkpoint: Checkpoint) -> Matched:
    """Load weights of torchvision's detector of the same backbone, except its classes.

    The pyramid and the heads are loaded as far as they have the same layers: those of
    `retinanet_resnet50_fpn_v2` fit `retinanet@256:resnet50` except the two coarsest levels of the pyramid.
    Raises ModelError if the backbone is another one, or values are not finite.
    """
    target = detector.state_dict()
    weights = {
        re.sub(r"^backbone\.fpn\.", "fpn.", key.replace("backbone.body.", "backbone.", 1)): value
        for key, value in checkpoint.state_dict.items()
    }
    misfits = _misfit_keys(weights, target)
    if any(key.startswith("backbone.") for key in misfits):
        own = {key: value for key, value in target.items() if key.startswith("backbone.")}
        backbone = {key: value for key, value in weights.items() if key.startswith("backbone.")}
        raise ModelError(_describe_misfits(checkpoint, detector, backbone, own))
    layers = {key.rpartition(".")[0] for key in misfits | _head_keys(detector, target)}
    fitting = {key: value for key, value in weights.items() if key.rpartition(".")[0] not in layers}
    _refuse_broken(fitting, target, checkpoint)
    detector.load_state_dict(fitting, strict=False)
    return Matched(
        fitting, "layers of torchvision's detector", left_out=frozenset(weights.keys() - fitting.keys())
    )


def match(network: nn.Module, checkpoint: Checkpoint, *, features_only: bool = False) -> Matched:
    """Return a checkpoint's weights under the network's names, see `match_keys`.

    Weights in another known format, or for another image size, are converted by timm. ``features_only`` is
    that of `load_into`.
    """
    target = network.state_dict()

    def select(weights: StateDict) -> StateDict:
        return _select_features(weights, target, network) if features_only else weights

    matched = match_keys(checkpoint.state_dict, target, _classifier_names(network))
    expanded = _expand_gray(matched.weights, target)
    if expanded is not matched.weights:
        source = "; ".join(filter(None, (matched.source, "gray weights expanded to RGB")))
        matched = replace(matched, weights=expanded, source=source)
    weights = select(matched.weights)
    if _misfit_keys(weights, target) - _head_keys(network, target):
        converted = _convert(network, checkpoint.state_dict)
        if converted is not None:
            return Matched(select(converted), "names or shapes converted by timm")
    left_out = matched.left_out | (matched.weights.keys() - weights.keys())
    return replace(matched, weights=weights, left_out=left_out)


def _expand_gray(weights: StateDict, target: StateDict) -> StateDict:
    """Expand convolutions of one gray channel to RGB, so that they compute the same of an image's gray."""
    rgb = {
        key: value * value.new_tensor(LUMA).view(1, 3, 1, 1)
        for key, value in weights.items()
        if value.ndim == 4 and value.shape[1] == 1 and value.is_floating_point()
        if key in target and target[key].shape == (len(value), 3, *value.shape[2:])
    }
    return {**weights, **rgb} if rgb else weights


def _refuse_broken(weights: StateDict, target: StateDict, checkpoint: Checkpoint) -> None:
    for key, value in weights.items():
        if key not in target or not target[key].is_floating_point():
            continue
        if not value.is_floating_point():
            raise ModelError(
                f"The weights in {checkpoint.source} cannot be loaded: {key!r} has dtype {value.dtype}, "
                f"the network {target[key].dtype}."
            )
        # Masks contain minus infinity.
        if not bool((value.float() < math.inf).all()):
            raise ModelError(
                f"The weights in {checkpoint.source} are broken: {key!r} contains values that are not finite."
            )


def class_count(checkpoint: Checkpoint, network: nn.Module) -> int | None:
    """Return the number of classes of the checkpoint's head; None if it has no head."""
    target = network.state_dict()
    weights = match_keys(checkpoint.state_dict, target, _classifier_names(network)).weights
    misfits = _misfit_keys(weights, target) - _head_keys(network, target)
    if misfits and _count_classes(weights, network) is None:
        # The file may be in another format, whose head has another name.
        weights = _convert(network, checkpoint.state_dict) or {}
    return _count_classes(weights, network)


@torch.no_grad()
def permute_head(network: nn.Module, rows: Sequence[int]) -> None:
    """Reorder the classes of a network's head: class i is computed by the former row ``rows[i]``."""
    state = network.state_dict()
    for key in _head_keys(network, state) & state.keys():
        state[key].copy_(_select_rows(state[key], rows, len(rows), network))


def classifier_weight(network: nn.Module) -> Tensor | None:
    """Return the weight of the last linear layer, [N,D], or 1×1 convolution; None without a head."""
    named = dict(network.named_parameters())
    weights = (named.get(f"{name}.weight") for name in _classifier_names(network))
    return next((weight.detach() for weight in weights if weight is not None and weight.ndim >= 2), None)


def _select_features(weights: StateDict, target: StateDict, network: nn.Module) -> StateDict:
    """Drop the head and parts that the network does not have.

    Further keys of parts that it has, such as more blocks, stay: they show that this is another network.
    """

    def part(key: str) -> str:
        return key.partition(".")[0]

    own = {part(key) for key in target} - {part(name) for name in _classifier_names(network)}
    return {key: value for key, value in weights.items() if key in target or part(key) in own}


def _find_misfits(weights: StateDict, target: StateDict) -> dict[str, list[str]]:
    """Return the keys that do not fit by the reason; old files lack BatchNorm's counter."""
    return {
        "missing": [k for k in target if k not in weights and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in weights if k not in target],
        "of another shape": [k for k in weights if k in target and weights[k].shape != target[k].shape],
    }


def _misfit_keys(weights: StateDict, target: StateDict) -> set[str]:
    return set().union(*_find_misfits(weights, target).values())


def _classifier_names(network: Any) -> tuple[str, ...]:
    """Return dotted names of the classifier's layers, from timm's config or `get_classifier`."""
    cfg = getattr(network, "pretrained_cfg", None) or {}
    if names := cfg.get("classifier"):
        return (names,) if isinstance(names, str) else tuple(names)
    layer = network.get_classifier() if hasattr(network, "get_classifier") else None
    return tuple(name for name, module in network.named_modules() if module is layer and name)


def _head_keys(network: nn.Module, target: StateDict) -> set[str]:
    names = _classifier_names(network)
    keys = {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}
    return keys | {key for key in target if any(key.startswith(f"{name}.") for name in names)}


def _count_classes(weights: StateDict, network: nn.Module) -> int | None:
    heads = (weights.get(f"{name}.weight") for name in _classifier_names(network))
    rows = next((int(head.shape[0]) for head in heads if head is not None and head.ndim >= 2), None)
    return None if rows is None else rows // _count_groups(network) - _count_background(network)


def _count_groups(network: nn.Module) -> int:
    """Return the number of times that the classes are repeated in the rows of a head: once per anchor."""
    return int(getattr(network, "anchors_per_location", 1))


def _count_background(network: nn.Module) -> int:
    """Return the number of rows of a head before those of the classes."""
    return int(getattr(network, "background_classes", 0))


def _select_rows(value: Tensor, rows: Sequence[int], count: int | None, network: nn.Module) -> Tensor:
    """Return a head's tensor with `rows` of its `count` classes; tensors of another length unchanged."""
    groups, background = _count_groups(network), _count_background(network)
    if count is None or value.shape[:1] != (groups * (background + count),):
        return value
    kept = [*range(background), *(background + row for row in rows)]
    return value[[group * (background + count) + row for group in range(groups) for row in kept]]


def _convert(network: nn.Module, raw: StateDict) -> StateDict | None:
    """Convert weights by timm's loader for the architecture; None if it fails.

    It supports the formats of the original authors and resamples position embeddings.
    """
    import timm
    from timm.models import clean_state_dict

    built_as = getattr(network, "built_as", None)
    if built_as is None:
        return None
    target = network.state_dict()
    cleaned = remove_wrappers(clean_state_dict(raw), target)
    prefix = find_prefix(cleaned, target)
    stripped = {key[len(prefix) :]: value for key, value in cleaned.items() if key.startswith(prefix)}
    stripped = _expand_gray(stripped, target)
    head = classifier_weight(network)
    width = getattr(network, "head_hidden_size", None) if head is None else head.shape[1]
    # A head of another width does not fit: a network for its rows could take any memory.
    fitting = {key: value for key, value in stripped.items() if value.ndim < 2 or value.shape[1] == width}
    rows = _count_classes(fitting, network)
    # The head of another format has another name: try the network's classes, rows of the last matrix, none.
    matrices = [int(v.shape[0]) for v in cleaned.values() if v.ndim == 2 and v.shape[1] == width]
    counts = [built_as.num_classes, *matrices[-1:], 0] if rows is None else [rows]
    options: dict[str, Any] = (
        {"img_size": built_as.image_size} if pretrained_cfg(built_as.name).fixed_input_size else {}
    )
    for count in dict.fromkeys(counts):
        for weights in (stripped,) if stripped.keys() == cleaned.keys() else (stripped, cleaned):
            overlay: dict[str, Any] = {"state_dict": dict(weights), "num_classes": count, "label_offset": 0}
            try:
                with torch.random.fork_rng(devices=[]):
                    loaded = timm.create_model(
                        built_as.name,
                        pretrained=True,
                        num_classes=count,
                        pretrained_cfg_overlay=overlay,
                        **options,
                    )
            except Exception:  # this interpretation of the file was wrong
                continue
            converted: StateDict = loaded.state_dict()
            return converted
    return None


def _describe_misfits(
    checkpoint: Checkpoint, network: nn.Module, weights: StateDict, target: StateDict
) -> str:
    def describe(key: str) -> str:
        if key not in weights or key not in target:
            return key
        return f"{key} {list(weights[key].shape)} for {list(target[key].shape)}"

    parts = [
        f"{len(keys)} {reason} ({', '.join(map(describe, keys[:5]))}{', …' if len(keys) > 5 else ''})"
        for reason, keys in _find_misfits(weights, target).items()
        if keys
    ]
    return f"The weights in {checkpoint.source} do not fit {_name(network)}: keys {'; '.join(parts)}."


def _describe_head(checkpoint: Checkpoint, network: nn.Module, weights: StateDict, target: StateDict) -> str:
    rows, target_rows = _count_classes(weights, network), _count_classes(target, network)
    has = f"a head for {rows} classes" if rows is not None else "no head that fits"
    needs = f"{target_rows} classes" if target_rows is not None else "no head"
    return f"The weights in {checkpoint.source} have {has}, but {_name(network)} here needs {needs}."


def _name(network: nn.Module) -> str:
    built_as = getattr(network, "built_as", None)
    return built_as.name if built_as is not None else type(network).__name__
