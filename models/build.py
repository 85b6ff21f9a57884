"""Resolve model names, build networks for any image size, and read their preprocessing without building them.

Names are timm's own and short aliases. This module imports neither torch nor timm before it needs them.
"""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .errors import ModelError, Size, UnknownModel, shorten, show_size

if TYPE_CHECKING:
    from torch import nn

# Never a name that timm has itself.
ALIASES: dict[str, str] = {
    "mobilenet": "mobilenetv2_100",
    "mobilenetv1": "mobilenetv1_100",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3": "mobilenetv3_large_100",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "mobilenetv4": "mobilenetv4_conv_small",
    "mobilenetv4_small": "mobilenetv4_conv_small",
    "mobilenetv4_medium": "mobilenetv4_conv_medium",
    "mobilenetv4_large": "mobilenetv4_conv_large",
    "mobilevit": "mobilevit_s",
    "efficientnet": "efficientnet_b0",
    "efficientnet_lite": "efficientnet_lite0",
    "efficientnetv2": "efficientnetv2_rw_s",
    "mnasnet": "mnasnet_100",
    "ghostnet": "ghostnet_100",
    "ghostnetv2": "ghostnetv2_100",
    "resnet": "resnet50",
    "wide_resnet50": "wide_resnet50_2",
    "resnext50": "resnext50_32x4d",
    "regnety": "regnety_016",
    "regnetx": "regnetx_016",
    "repvgg": "repvgg_a2",
    "densenet": "densenet121",
    "convnext": "convnext_tiny",
    "convnextv2": "convnextv2_tiny",
    "swin": "swin_tiny_patch4_window7_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "vit": "vit_base_patch16_224",
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "dinov2_small": "vit_small_patch14_dinov2",
    "dinov2_base": "vit_base_patch14_dinov2",
    "dinov2_large": "vit_large_patch14_dinov2",
    "dinov3_small": "vit_small_patch16_dinov3",
    "dinov3_base": "vit_base_patch16_dinov3",
    "dinov3_large": "vit_large_patch16_dinov3",
}

DETECTORS = ("fasterrcnn", "retinanet", "ssdlite")
"""Kinds of detectors, which are named `KIND:BACKBONE`, or `KIND@WIDTH:BACKBONE` with the pyramid's width."""

DETECTOR_WIDTH = 64
"""Channels of a detector's feature pyramid by default: a quarter of torchvision's, for small networks."""

DETECTOR_IMAGE_SIZE = 320
"""Default side of a detector's input in pixels, that of torchvision's small detectors."""

# Letters and digits that are often confused: resnet5O, mobi1enet.
_LOOK_ALIKES = str.maketrans("oil", "011")


def register() -> None:
    """Register the CIFAR networks with timm. Calling it again does nothing."""
    from .cifar import mobilenet, resnet, shufflenet, vgg  # noqa: F401


def list_architectures() -> list[str]:
    """Return all architectures that can be built, without aliases and pretrained tags, in natural order."""
    import timm

    register()
    return list(timm.list_models())


def resolve(name: str) -> str:
    """Return timm's name for a name typed by the user, with its pretrained tag (`resnet50.a1_in1k`) if any.

    The name of a detector is its kind and that of its backbone, see `DETECTORS`.
    Raises UnknownModel with the nearest names, or with the existing tags if only the tag is wrong.
    """
    import timm

    register()
    typed = name.strip()
    kind, separator, backbone = typed.partition(":")
    if separator:
        parse_kind(kind)
        return f"{kind}:{resolve(backbone)}"
    architecture, _, tag = typed.partition(".")
    architecture = ALIASES.get(architecture, architecture)
    if not architecture or not timm.is_model(architecture):
        raise UnknownModel(_describe_unknown(typed))
    full = f"{architecture}.{tag}" if tag else architecture
    full = _current_name(full, typed)
    architecture, _, tag = full.partition(".")
    names = timm.models.get_arch_pretrained_cfgs(architecture)
    tags = [name.partition(".")[2] for name in names if "." in name]
    if tag and tag not in tags:
        offer = f"Choose from {', '.join(tags)}" if tags else "Omit the tag"
        raise UnknownModel(f"Model {architecture} has no pretrained tag {tag!r}. {offer}.")
    return full


def find_nearest(name: str) -> list[str]:
    """Return up to 4 names most similar to a misspelled one, ignoring case and punctuation."""
    typed = _normalize(name.partition(".")[0])
    if not typed:
        return []
    scored = []
    for candidate in {*list_architectures(), *ALIASES}:
        key = _normalize(candidate)
        matcher = SequenceMatcher(None, typed, key)
        if matcher.real_quick_ratio() < 0.5:
            continue
        # A truncated name ("efficientnet_lit") is nearer than its ratio.
        score = matcher.ratio() + (0.25 if key.startswith(typed) else 0.0)
        if score >= 0.6:
            scored.append((-score, candidate not in ALIASES, len(candidate), candidate))
    return [candidate for *_, candidate in sorted(scored)[:4]]


def split_name(full: str) -> tuple[str, str]:
    """Return the kind of a detector, empty for a classifier, and timm's name of the network or backbone."""
    kind, _, name = full.rpartition(":")
    return kind, name


def parse_kind(kind: str) -> tuple[str, int]:
    """Return kind and pyramid width of `KIND` or `KIND@WIDTH`. Raises UnknownModel if there is none such."""
    name, separator, digits = kind.partition("@")
    if name not in DETECTORS:
        raise UnknownModel(f"Unknown detector {kind!r}. Choose from {', '.join(DETECTORS)}.")
    width = DETECTOR_WIDTH if not separator else int(digits) if digits.isdecimal() else 0
    if width not in range(16, 513, 16):  # whole groups of GroupNorm
        raise UnknownModel(
            f"The width in {kind!r} must be a multiple of 16 from 16 to 512, as in {name}@256."
        )
    return name, width


def is_detector(name: str) -> bool:
    """Return True for the name of a detector, KIND:BACKBONE."""
    return ":" in name


def _describe_unknown(typed: str) -> str:
    if not typed:
        return "The model name is empty. `compress models` lists all names."
    near = ", ".join(find_nearest(typed))
    advice = f"Did you mean {near}?" if near else "`compress models` lists all names, --import adds your own."
    return f"Unknown model {typed!r}. {advice}"


def _current_name(full: str, typed: str) -> str:
    """Return the current name of a renamed model. Raises UnknownModel if timm has removed it."""
    from timm.models import _registry

    renamed: dict[str, str | None] = _registry._deprecated_models
    architecture, _, tag = full.partition(".")
    if architecture not in renamed:
        return full
    current = renamed[architecture]
    if current is None:
        raise UnknownModel(f"timm has removed model {typed!r}. `compress models` lists all names.")
    return f"{current.partition('.')[0]}.{tag}" if tag else current


def _normalize(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).translate(_LOOK_ALIKES)


@dataclass(frozen=True)
class Geometry:
    """Preprocessing of a network's input, from its `pretrained_cfg`."""

    image_size: Size
    """Of the input."""
    crop_fraction: float
    """Fraction of the resized short side that the center crop keeps."""
    interpolation: str
    """`bilinear` or `bicubic`."""
    crop_mode: str
    """`center`, `squash` (both sides resized) or `border` (long side resized, then padded)."""
    mean: tuple[float, float, float]
    """Of each channel, for values in 0..1."""
    std: tuple[float, float, float]


@dataclass(frozen=True)
class BuiltAs:
    """Arguments of `build`, stored on the network so that weights can be converted for it."""

    name: str
    num_classes: int
    image_size: Size
    activation: str | None = None


def pretrained_cfg(name: str) -> Any:
    """Return timm's PretrainedCfg of a name (default tag if it has none) without building the network.

    That of a detector is its backbone's.
    """
    import timm

    _, full = split_name(resolve(name))
    cfg = timm.models.get_pretrained_cfg(full)
    return cfg if cfg is not None else timm.models.PretrainedCfg(architecture=full.partition(".")[0])


def default_image_size(name: str) -> int:
    """Return the input size in pixels that the network was designed for."""
    if is_detector(resolve(name)):
        return DETECTOR_IMAGE_SIZE
    return int(max(pretrained_cfg(name).input_size[-2:]))


def geometry(name: str, image_size: Size | None = None) -> Geometry:
    """Return the preprocessing at `image_size` pixels (default if None) without building the network."""
    cfg = pretrained_cfg(name)
    if cfg.input_size[0] != 3 or len(cfg.mean) != 3 or len(cfg.std) != 3:
        raise UnknownModel(f"Model {name} does not take RGB images. Choose another one.")
    sees_all = is_detector(name)
    return Geometry(
        image_size=image_size or default_image_size(name),
        crop_fraction=1.0 if sees_all else float(cfg.crop_pct),
        interpolation=cfg.interpolation if cfg.interpolation in ("bilinear", "bicubic") else "bilinear",
        crop_mode="border" if sees_all else cfg.crop_mode or "center",
        mean=(float(cfg.mean[0]), float(cfg.mean[1]), float(cfg.mean[2])),
        std=(float(cfg.std[0]), float(cfg.std[1]), float(cfg.std[2])),
    )


def build(
    name: str,
    *,
    num_classes: int,
    image_size: Size | None = None,
    seed: int | None = None,
    activation: str | None = None,
) -> "nn.Module":
    """Build a randomly initialized network. Raises UnknownModel, ModelError.

    Args:
        num_classes: number of logits; 0 for no head.
        seed: if given, the weights depend on it alone and the global random state is restored.
        activation: `relu` or `relu6`, replaces the network's activation; weights keep names and shapes.
    """
    import torch

    full = resolve(name)
    size = image_size or default_image_size(full)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.random.default_generator.manual_seed(seed)  # weights are drawn on the CPU
        network = create_network(full, num_classes, size, activation)
    _check_patches(network, full, size)
    built_as: Any = BuiltAs(full, num_classes, size, activation)
    network.built_as = built_as
    return network


def check_size(name: str, image_size: Size) -> None:
    """Raise ModelError, with the nearest sizes that fit, if the network does not support an image size."""
    from timm.layers import to_2tuple

    full = resolve(name)
    if min(to_2tuple(image_size)) < 1:
        raise ModelError(f"Image size must be positive, got {show_size(image_size)}.")
    try:
        _run_shapes(full, image_size)
    except Exception as error:  # whatever a forward pass of timm's thousand raises
        if isinstance(error, ModelError) and error.__cause__ is None:
            raise  # from _check_patches
        fitting = _fitting_sizes(full, image_size)
        if not fitting:
            raise ModelError(f"Model {full} cannot be run: {shorten(error)}.") from error
        raise ModelError(
            f"Model {full} does not support images of {show_size(image_size)} pixels. Use "
            f"{' or '.join(map(show_size, fitting))} (its default is {default_image_size(full)})."
        ) from error


def check_activation(name: str, activation: str | None) -> None:
    """Raise ModelError if the network cannot be built with this activation; needs no memory."""
    import torch

    if activation is not None:
        with torch.device("meta"):
            create_network(resolve(name), 2, default_image_size(name), activation)


def has_batch_norm(name: str) -> bool:
    """Return True if a network has BatchNorm layers, as most convolutional ones do; needs no memory."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    with torch.device("meta"):
        network = create_network(resolve(name), 2, default_image_size(name))
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def create_network(
    full: str, num_classes: int, image_size: Size, activation: str | None = None
) -> "nn.Module":
    """Build the network of a resolved name on torch's default device. Raises UnknownModel, ModelError."""
    import timm
    from timm.layers import to_2tuple

    kind, name = split_name(full)
    if kind and not num_classes:
        raise ModelError(f"Detector {full} cannot be built without classes, as --teacher-head none requires.")
    options = timm_options(name, image_size, activation)
    layer = options.get("act_layer")
    no_activation = f"--activation {activation} is not supported by model {full}. Omit it."
    network: nn.Module
    try:
        if kind:
            from .detection.dense import DenseDetector
            from .detection.pyramid import create_backbone
            from .detection.two_stage import TwoStageDetector

            kind, width = parse_kind(kind)
            detector = TwoStageDetector if kind == "fasterrcnn" else DenseDetector
            backbone = create_backbone(name, **options)
            network = detector(kind, backbone, num_classes, to_2tuple(image_size), width)
        else:
            network = timm.create_model(full, pretrained=False, num_classes=num_classes, **options)
    except UnknownModel:
        raise
    except Exception as error:  # whatever a constructor of timm's thousand raises
        if layer is not None and "act_layer" in str(error):
            raise ModelError(no_activation) from error
        raise ModelError(
            f"Model {full} cannot be built for images of {show_size(image_size)} pixels and {num_classes} "
            f"classes: {shorten(error)}."
        ) from error
    if layer is not None and not any(isinstance(module, layer) for module in network.modules()):
        raise ModelError(no_activation)
    return network


def timm_options(name: str, image_size: Size, activation: str | None) -> dict[str, Any]:
    """Return arguments of `timm.create_model` for a size and an activation."""
    from torch import nn

    # timm marks the architectures whose weights depend on the input size; only those take img_size.
    options: dict[str, Any] = {"img_size": image_size} if pretrained_cfg(name).fixed_input_size else {}
    layer = {None: None, "relu": nn.ReLU, "relu6": nn.ReLU6}[activation]
    return options if layer is None else {**options, "act_layer": layer}


def _check_patches(network: "nn.Module", full: str, image_size: Size) -> None:
    """Raise ModelError if patches do not divide the image, whose border would be ignored silently."""
    from timm.layers import to_2tuple

    embedding = getattr(network, "patch_embed", getattr(network, "stem", None))
    projection: Any = getattr(embedding, "proj", None)
    # Overlapping and padded convolutions reach the border, and timm can pad the image.
    disjoint = getattr(projection, "kernel_size", 0) == getattr(projection, "stride", 1)
    if not disjoint or getattr(embedding, "dynamic_img_pad", False):
        return
    side = int(max(projection.stride))
    if any(length % side for length in to_2tuple(image_size)):
        below, above = _multiples(image_size, side)
        sizes = f"{show_size(below)} or {show_size(above)}" if below else show_size(above)
        raise ModelError(
            f"Model {full} has patches of {side} pixels, which do not divide {show_size(image_size)}. "
            f"Use {sizes}."
        )


def _multiples(image_size: Size, step: int) -> tuple[Size | None, Size]:
    """Return the nearest multiples of `step` that are not larger, None if there are none, and not smaller."""
    if isinstance(image_size, int):
        return image_size // step * step or None, -(-image_size // step) * step
    height, width = image_size
    below, above = (height // step * step, width // step * step), (-(-height // step), -(-width // step))
    return below if min(below) else None, (above[0] * step, above[1] * step)


def fits_bf16(name: str, image_size: Size) -> bool:
    """Return False if a strided convolution reads a map of one row or column."""
    # In bf16 torch leaves parts of its weights' gradient uninitialized on CPUs (torch 2.14, oneDNN).
    return not _run_shapes(resolve(name), image_size)


@lru_cache(maxsize=64)
def _run_shapes(full: str, image_size: Size) -> bool:
    """Run a network without weights on meta; return True if a strided convolution reads a row or column."""
    import torch
    from timm.layers import to_2tuple

    with torch.device("meta"):
        network = create_network(full, 2, image_size).eval()
    _check_patches(network, full, image_size)
    strided = [False]
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and max(module.stride) > 1:
            module.register_forward_pre_hook(lambda _, inputs: strided.append(1 in inputs[0].shape[-2:]))
    with torch.no_grad():
        network(torch.empty(1, 3, *to_2tuple(image_size), device="meta"))
    return any(strided)


def _fits(full: str, image_size: Size) -> bool:
    try:
        _run_shapes(full, image_size)
    except Exception:  # whatever a forward pass raises, this size is not supported
        return False
    return True


def _fitting_sizes(full: str, image_size: Size) -> list[Size]:
    """Return the nearest sizes below and above that fit, from a few trials."""
    patch = re.search(r"patch(\d+)", full)
    steps = {32, int(patch[1])} if patch else {32, 14, 16}
    default = default_image_size(full)
    if not isinstance(image_size, int):
        sides = zip(*(_multiples(image_size, step) for step in sorted(steps)), strict=True)
        pairs = [next((pair for pair in side if pair and _fits(full, pair)), None) for side in sides]
        fitting: list[Size] = [pair for pair in pairs if pair is not None]
        return fitting or _fitting_sizes(full, max(image_size))
    sizes = range(1, 2 * max(default, image_size))
    candidates = {default, *(size for size in sizes if any(size % step == 0 for step in steps))}
    below = sorted((size for size in candidates if size < image_size), reverse=True)
    above = sorted(size for size in candidates if size > image_size)
    nearest: list[Size | None] = []
    for side in (below, above):
        trials = [*side[:6], *(size for size in side[6:] if size == default)]
        nearest.append(next((size for size in trials if _fits(full, size)), None))
    return [size for size in nearest if size is not None]
