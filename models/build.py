"""Building any network by name for any image size, and knowing its input geometry without building it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ModelError, UnknownModel
from .names import resolve

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Geometry:
    """How an image becomes a network's input, from the network's own `pretrained_cfg`.

    image_size: pixels of the square input. crop_fraction: the share of the resized short side that the centre
    crop keeps. interpolation: "bilinear" or "bicubic". crop_mode: "center", "squash" (both sides resized,
    aspect lost) or "border" (long side resized, padded). mean, std: per channel, for values in 0..1.
    """

    image_size: int
    crop_fraction: float
    interpolation: str
    crop_mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class BuiltAs:
    """What `build` was asked for; kept on the network so that weights can be refitted to the same form."""

    name: str
    num_classes: int
    image_size: int
    activation: str | None = None


def pretrained_cfg(name: str) -> Any:
    """timm's PretrainedCfg of a name (its default tag where none is given), nothing built."""
    import timm

    full = resolve(name)
    found = timm.models.get_pretrained_cfg(full)
    return found if found is not None else timm.models.PretrainedCfg(architecture=full.partition(".")[0])


def default_image_size(name: str) -> int:
    """The square input size in pixels that the network was made for."""
    return int(max(pretrained_cfg(name).input_size[-2:]))


def geometry(name: str, image_size: int | None = None) -> Geometry:
    """The network's preprocessing at `image_size` pixels (its own size if None); builds nothing."""
    cfg = pretrained_cfg(name)
    if cfg.input_size[0] != 3 or len(cfg.mean) != 3 or len(cfg.std) != 3:
        raise UnknownModel(
            f"The model {name} does not take colour images of three channels; pick another one."
        )
    return Geometry(
        image_size=image_size or default_image_size(name),
        crop_fraction=float(cfg.crop_pct),
        interpolation=cfg.interpolation if cfg.interpolation in ("bilinear", "bicubic") else "bilinear",
        crop_mode=cfg.crop_mode or "center",
        mean=(float(cfg.mean[0]), float(cfg.mean[1]), float(cfg.mean[2])),
        std=(float(cfg.std[0]), float(cfg.std[1]), float(cfg.std[2])),
    )


def build(
    name: str,
    *,
    num_classes: int,
    image_size: int | None = None,
    seed: int | None = None,
    activation: str | None = None,
) -> "nn.Module":
    """A randomly initialised network for images of `image_size` pixels and `num_classes` logits (0: no head).

    With a seed, the weights depend on the seed alone and the global random state stays as it was.
    `activation`, 'relu' or 'relu6', stands in for the network's own; its weights have the same names and
    shapes. Raises UnknownModel for a wrong name, ModelError when the network cannot be had at this size or
    with this activation.
    """
    full = resolve(name)
    size = image_size or default_image_size(full)
    with _seeded(seed):
        network = create_network(full, num_classes, size, activation)
    _check_patches(network, full, size)
    note: Any = BuiltAs(full, num_classes, size, activation)
    network.built_as = note
    return network


def check_size(name: str, image_size: int) -> None:
    """Raise ModelError, with the next sizes that fit, unless the network takes images of this size.

    Runs the network's shapes on torch's meta device: no memory, no weights, a fraction of a second.
    """
    full = resolve(name)
    if image_size < 1:
        raise ModelError(f"An image size of {image_size} pixels is not possible; give a positive number.")
    try:
        _run_shapes(full, image_size)
    except Exception as error:  # whatever a forward pass of timm's thousand raises
        if isinstance(error, ModelError) and error.__cause__ is None:
            raise  # the patches' own sentence
        fitting = _fitting_sizes(full, image_size)
        if not fitting:
            raise ModelError(f"The model {full} cannot be run: {_brief(error)}.") from error
        raise ModelError(
            f"The model {full} does not take images of {image_size} pixels; the next sizes that fit are "
            f"{' and '.join(map(str, fitting))} (its own is {default_image_size(full)})."
        ) from error


def check_activation(name: str, activation: str | None) -> None:
    """Raise ModelError unless the network can be built with this activation; takes no memory."""
    import torch

    if activation is not None:
        with torch.device("meta"):
            create_network(resolve(name), 2, default_image_size(name), activation)


def create_network(
    full: str, num_classes: int, image_size: int, activation: str | None = None
) -> "nn.Module":
    """timm's network of a resolved name, on torch's default device, sized for the images; or ModelError."""
    import timm
    from torch import nn

    # timm marks the architectures whose weights depend on the input size; only those take img_size.
    options: dict[str, Any] = {"img_size": image_size} if pretrained_cfg(full).fixed_input_size else {}
    layer = {None: None, "relu": nn.ReLU, "relu6": nn.ReLU6}[activation]
    if layer is not None:
        options["act_layer"] = layer
    try:
        network: nn.Module = timm.create_model(full, pretrained=False, num_classes=num_classes, **options)
    except Exception as error:  # whatever a constructor of timm's thousand raises
        if layer is not None and "act_layer" in str(error):
            raise ModelError(_no_activation(full, activation)) from error
        raise ModelError(
            f"The model {full} cannot be built for images of {image_size} pixels and {num_classes} classes: "
            f"{_brief(error)}"
        ) from error
    if layer is not None and not any(isinstance(module, layer) for module in network.modules()):
        raise ModelError(_no_activation(full, activation))
    return network


def _no_activation(full: str, activation: str | None) -> str:
    return f"The model {full} has no activation that {activation} could stand in for; leave --activation out."


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    import torch

    if seed is None:
        yield
        return
    # Weights are drawn on the CPU, so its generator is the only one to keep.
    before = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before)


def _check_patches(network: "nn.Module", full: str, image_size: int) -> None:
    """A stride-p patch convolution would silently ignore the rim of an image that p does not divide."""
    embedding = getattr(network, "patch_embed", getattr(network, "stem", None))
    cut: Any = getattr(embedding, "proj", None)
    # Overlapping or padded convolutions reach the rim; timm pads the image itself where it is told to.
    disjoint = getattr(cut, "kernel_size", 0) == getattr(cut, "stride", 1)
    if not disjoint or getattr(embedding, "dynamic_img_pad", False):
        return
    side = int(max(cut.stride))
    if image_size % side:
        below, above = image_size // side * side, (image_size // side + 1) * side
        sizes = f"{below} or {above}" if below else f"{above}"
        raise ModelError(
            f"The model {full} cuts images into patches of {side} pixels, which do not divide {image_size}; "
            f"the next sizes that fit are {sizes}."
        )


def _run_shapes(full: str, image_size: int) -> None:
    import torch

    with torch.device("meta"):
        network = create_network(full, 2, image_size).eval()
    _check_patches(network, full, image_size)
    with torch.no_grad():
        network(torch.empty(1, 3, image_size, image_size, device="meta"))


def _fits(full: str, image_size: int) -> bool:
    try:
        _run_shapes(full, image_size)
    except Exception:  # whatever it is, this size isn't one to offer
        return False
    return True


def _fitting_sizes(full: str, image_size: int) -> list[int]:
    """The nearest sizes below and above that fit, as far as a few tries tell."""
    named = re.search(r"patch(\d+)", full)
    steps = {32, int(named[1])} if named else {32, 14, 16}
    own = default_image_size(full)
    reach = range(1, 2 * max(own, image_size))
    candidates = {own, *(size for size in reach if any(size % step == 0 for step in steps))}
    below = sorted((size for size in candidates if size < image_size), reverse=True)
    above = sorted(size for size in candidates if size > image_size)
    found = []
    for side in (below, above):
        tries = [*side[:6], *(size for size in side[6:] if size == own)]
        found += [size for size in (next((size for size in tries if _fits(full, size)), None),) if size]
    return found


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "…"
