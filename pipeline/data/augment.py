"""Changes of a view's pixels after crop and flip: color jitter, RandAugment, random erasing, mixup, CutMix.

All are drawn on the host from (seed, image, view), like the crop. All but the jitter compute in integers,
or in products and sums that are rounded alike everywhere, so they are bit-exact on every device.

RandAugment (Cubuk et al., 2019, arXiv 1909.13719) applies N of 14 operations in turn, with the strength M of
30. Operations, ranges, nearest-neighbor sampling and the black border are torchvision's. Signs are random.

Random erasing (Zhong et al., AAAI 2020, arXiv 1708.04896) fills a rectangle of 2 to 40 % of the view, with
sides in a ratio of 0.3 to 3.3, in pixels, by the mean color of ImageNet. A rectangle longer than the view is
clipped.

Mixup (Zhang et al., ICLR 2018, arXiv 1710.09412) returns λ·view + (1 − λ)·other, CutMix (Yun et al., ICCV
2019, arXiv 1905.04899) the view with a rectangle of the other one, of √(1 − λ) of each side around any point
and clipped, with λ from Beta(A, A). The other one is the view of the same number of a partner, which is any
of the N labeled images (of the unlabeled ones for one without a label), and with probability 1/N the image
itself. With both, each view draws one of them, as in timm.
"""

import math
from functools import cache

import torch
from scipy.special import betaincinv  # type: ignore[import-untyped]
from torch import Tensor
from torchvision.transforms.v2.functional import equalize_image

from ...export.runtime import Size, height_width
from .views import RATIO_STEPS, ViewPolicy, below, draw_color_factors, random_words, ratio_table, uniform

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color",
    "contrast", "sharpness", "posterize", "solarize", "auto_contrast", "equalize",
)  # fmt: skip
LAST_AFFINE = 5
"""Operations 1 to 5 move pixels and are applied together."""

MAX_STRENGTH = 30
SHEAR, TRANSLATE, DEGREES, BLEND, BITS = 0.3, 150 / 331, 30, 0.9, 4
"""Largest strengths; translations are fractions of the side."""

ERASED_AREA, ERASED_RATIO = (0.02, 0.4), (0.3, 1 / 0.3)
ERASED_COLOR = (125, 122, 114)

# Draw numbers: see views.py. RandAugment takes one for each of its operations.
_AUGMENT, _ERASE, _ERASE_AT, _MIX, _MIX_AT = 32, 28, 29, 30, 31

VERSION = 2
"""Of the pixels of RandAugment and random erasing, for the keys of cached teacher outputs."""

BETA_STEPS = 4096
"""Number of equally probable ratios λ."""

_ONE = 1 << 16
"""1 in fixed-point numbers."""


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a host tensor to the device; with CUDA asynchronously, through pinned memory."""
    device = torch.device(device)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    # On Apple GPUs an asynchronous copy may outlive the memory it reads.
    return tensor.to(device, non_blocking=device.type != "mps")


def draw_changes(policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor) -> Tensor:
    """Draw the changes of each view, float32 [B, K].

    Columns: the factors of the color jitter; for each operation of RandAugment its number and sign; the
    erased rectangle (top, left, height, width as fractions of the view), of height 0 for none.
    """
    columns = [torch.empty(len(keys), 0)]
    if policy.color_jitter:
        columns.append(draw_color_factors(policy, seed, keys, views))
    for step in range(policy.randaugment[0] if policy.randaugment else 0):
        operation, sign, *_ = random_words(seed, keys, views, _AUGMENT + step)
        columns.append(torch.stack([below(operation, len(OPERATIONS)), 1 - 2 * (sign >> 31)], 1).float())
    if policy.erasing:
        columns.append(_draw_rectangles(policy, seed, keys, views))
    return torch.cat(columns, 1)


def _draw_rectangles(policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor) -> Tensor:
    decision, area, ratio, _ = random_words(seed, keys, views, _ERASE)
    down, across, *_ = (word.double() * 2.0**-32 for word in random_words(seed, keys, views, _ERASE_AT))
    low, high = ERASED_AREA
    target = low + (high - low) * (area.double() * 2.0**-32)
    # The ratio is one of pixels; height and width are fractions of the view's.
    aspect = policy.aspect * ratio_table(ERASED_RATIO)[below(ratio, RATIO_STEPS)]
    height, width = (x.sqrt().clamp(max=1) for x in (target * aspect, target / aspect))
    height = torch.where(uniform(decision) < policy.erasing, height, 0.0)
    return torch.stack([down * (1 - height), across * (1 - width), height, width], 1).float()


def apply_changes(views: Tensor, policy: ViewPolicy, changes: Tensor, mixes: Tensor | None = None) -> Tensor:
    """Return views uint8 [B, 3, H, W] with the changes of ``draw_changes``, then mixed as by ``mix``.

    ``changes`` [B, K] and ``mixes`` are on the host.
    """
    if policy.color_jitter:
        views, changes = jitter_colors(views, changes[:, :3].contiguous()), changes[:, 3:]
    for _ in range(policy.randaugment[0] if policy.randaugment else 0):
        assert policy.randaugment is not None
        views = augment(views, changes[:, 0].long(), changes[:, 1], policy.randaugment[1])
        changes = changes[:, 2:]
    if policy.erasing:
        views = erase(views, changes)
    return views if mixes is None else mix(views, mixes)


def erase(views: Tensor, rectangles: Tensor) -> Tensor:
    """Fill rectangles, float32 [B, 4] (top, left, height, width as fractions), by the mean color."""
    start = rectangles[:, :2]
    inside = _cover(torch.cat([start, start + rectangles[:, 2:]], 1), views)
    color = to_device(torch.tensor(ERASED_COLOR, dtype=torch.uint8), views.device).view(1, 3, 1, 1)
    return torch.where(inside, color, views)


def _cover(edges: Tensor, views: Tensor) -> Tensor:
    """Return bool [B, 1, H, W]: the pixels of views [B, 3, H, W] between edges (see ``_to_pixels``)."""
    tall, wide = views.shape[2:]
    pixels = to_device(_to_pixels(edges, (tall, wide)), views.device)
    top, left, bottom, right = pixels.view(-1, 4, 1).unbind(1)
    down, across = (torch.arange(length, device=views.device) for length in (tall, wide))
    rows, columns = (down >= top) & (down < bottom), (across >= left) & (across < right)
    return rows[:, None, :, None] & columns[:, None, None, :]


def _to_pixels(edges: Tensor, size: Size) -> Tensor:
    """Convert top, left, bottom and right as fractions, float32 [B, 4], to pixels, int64 [B, 4]."""
    return (edges * torch.tensor(height_width(size)).repeat(2)).floor().long()


def draw_mixes(
    policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor, indices: Tensor, labeled: int, count: int
) -> tuple[Tensor, Tensor]:
    """Draw how each view is mixed, float32 [B, 5], and with which image, int64 [B].

    Columns: the ratio λ of mixup, 1 for CutMix; top, left, bottom and right of the rectangle of CutMix as
    fractions of the view, 0 for mixup. ``indices``, int64 [B], are the images of the views, of ``count``. The
    partner of one of the first ``labeled`` is any of them, and that of another one any of the others.
    """
    partner, word, choice, _ = random_words(seed, keys, views, _MIX)
    is_labeled = indices < labeled
    partners = below(partner, torch.where(is_labeled, labeled, count - labeled))
    center = torch.stack(random_words(seed, keys, views, _MIX_AT)[:2], 1).double() * 2.0**-32
    limit = (1 << 31 if policy.mixup else 1 << 32) if policy.cutmix else 0
    is_cut, step = (choice < limit)[:, None], below(word, BETA_STEPS)[:, None]
    of_cutmix, of_mixup = (beta_table(a or 1.0)[step] for a in (policy.cutmix, policy.mixup))
    ratio = torch.where(is_cut, of_cutmix, of_mixup)
    half = (1 - ratio).sqrt() / 2
    edges = torch.cat([center - half, center + half], 1).clamp(0, 1)
    mixes = torch.cat([torch.where(is_cut, 1.0, ratio), torch.where(is_cut, edges, 0.0)], 1).float()
    return mixes, torch.where(is_labeled, partners, labeled + partners)


@cache
def beta_table(parameter: float) -> Tensor:
    """Return ``BETA_STEPS`` quantiles of Beta(A, A), float64 rounded to multiples of 2⁻¹⁶."""
    steps = (torch.arange(BETA_STEPS, dtype=torch.float64) + 0.5) / BETA_STEPS
    quantiles = torch.from_numpy(betaincinv(parameter, parameter, steps.numpy()))
    return (quantiles * _ONE).round() / _ONE


def mixing_ratios(mixes: Tensor, size: Size) -> Tensor:
    """Return the fraction of each view of ``size`` that is its own image, float32 [B], for its labels."""
    top, left, bottom, right = _to_pixels(mixes[:, 1:], size).unbind(1)
    height, width = height_width(size)
    return mixes[:, 0] - ((bottom - top) * (right - left)).float() / (height * width)


def mix_labels(own: Tensor, other: Tensor, ratios: Tensor) -> Tensor:
    """Mix labels by ratios [L] of the first ones, float32.

    Of class numbers int64 [L]: both numbers and the ratio [L, 3]. Of 0 or 1 for each class, [L, classes]:
    the weighted mean.
    """
    if own.dim() == 1:
        return torch.stack([own.float(), other.float(), ratios], 1)
    return ratios[:, None] * own + (1 - ratios[:, None]) * other


def mix(views: Tensor, mixes: Tensor) -> Tensor:
    """Mix the first half of views, uint8 [2B, 3, H, W], with the second by ``mixes`` of ``draw_mixes``."""
    own, other = views.chunk(2)
    weight = to_device((mixes[:, 0] * _ONE).int(), views.device).view(-1, 1, 1, 1)
    blended = (own.int() * weight + other.int() * (_ONE - weight) + _ONE // 2) >> 16
    return torch.where(_cover(mixes[:, 1:], own), other, blended.to(torch.uint8))


def augment(views: Tensor, operations: Tensor, signs: Tensor, strength: int) -> Tensor:
    """Apply one operation of RandAugment to each view, uint8 [B, 3, H, W].

    ``operations`` (int64 [B], indices into ``OPERATIONS``) and ``signs`` ([B], 1 or −1) are on the host, so
    that the views of each operation are selected without waiting for the device.
    """
    views = views.clone()
    part = strength / MAX_STRENGTH
    groups = torch.where(operations > 0, operations.clamp(min=LAST_AFFINE), 0)
    for number in groups[groups > 0].unique().tolist():
        name, rows = OPERATIONS[number], (groups == number).nonzero()[:, 0]
        on_device = to_device(rows, views.device)
        images = views.index_select(0, on_device)
        if number == LAST_AFFINE:
            changed = _transform(images, operations[rows], signs[rows].double() * part)
        elif name in ("brightness", "color", "contrast", "sharpness"):
            changed = _blend(images, _reference(images, name), 1 + signs[rows].float() * (BLEND * part))
        elif name == "posterize":
            changed = images & (256 - (1 << round(BITS * part)))
        elif name == "solarize":
            changed = torch.where(images >= math.ceil(255 * (1 - part)), 255 - images, images)
        else:
            changed = _stretch(images) if name == "auto_contrast" else equalize_image(images)
        views.index_copy_(0, on_device, changed)
    return views


def _transform(images: Tensor, operations: Tensor, parts: Tensor) -> Tensor:
    """Shear, translate or rotate images [n, 3, H, W] by ``parts`` (float64 [n]) of the largest strengths."""
    tall, wide = images.shape[2:]
    rows = [
        _affine(OPERATIONS[number], part, tall, wide)
        for number, part in zip(operations.tolist(), parts.tolist(), strict=True)
    ]
    # Positions are counted in half pixels, from the edge of the image.
    a, b, c, d, right, down, center = to_device(torch.tensor(rows), images.device).view(-1, 7, 1, 1).unbind(1)
    x, y = (2 * torch.arange(length, device=images.device) + 1 for length in (wide, tall))
    x, y = x[None, None, :] - center * wide, y[None, :, None] - center * tall
    source_x = ((a * x + b * y + center * wide * _ONE) >> 17) - right
    source_y = ((c * x + d * y + center * tall * _ONE) >> 17) - down
    inside = (source_x >= 0) & (source_x < wide) & (source_y >= 0) & (source_y < tall)
    places = source_y.clamp(0, tall - 1) * wide + source_x.clamp(0, wide - 1)
    gathered = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, 3, -1))
    return gathered.view(images.shape) * inside[:, None]


def _affine(name: str, part: float, tall: int, wide: int) -> tuple[int, ...]:
    """Return the matrix of source positions row by row in fixed-point numbers, the shift, and 1 if centered.

    Source position = matrix · (position − center) + center − shift, at the centers of pixels.
    """
    sides = {"translate_x": (wide, 0), "translate_y": (0, tall)}.get(name, (0, 0))
    right, down = (int(TRANSLATE * side * part) for side in sides)
    shear_x, shear_y = (SHEAR * part if name == shear else 0.0 for shear in ("shear_x", "shear_y"))
    angle = math.radians(DEGREES * part) if name == "rotate" else 0.0
    matrix = math.cos(angle), shear_x - math.sin(angle), shear_y + math.sin(angle), math.cos(angle)
    return *(round(x * _ONE) for x in matrix), right, down, int(name == "rotate")


def _blend(images: Tensor, reference: Tensor, factors: Tensor) -> Tensor:
    """Return factor · image + (1 − factor) · reference, rounded."""
    ours, theirs = to_device(torch.stack([factors, 1 - factors]), images.device).view(2, -1, 1, 1, 1)
    # Two products, then a sum: a fused operation would be rounded differently on some devices.
    scaled, rest = images.to(torch.float32) * ours, reference.to(torch.float32) * theirs
    return (scaled + rest).round_().clamp_(0, 255).to(torch.uint8)


def _reference(images: Tensor, name: str) -> Tensor:
    """Return what a blend with factor 0 shows: black, gray, the mean gray, or a smoothed image."""
    if name == "brightness":
        return torch.zeros_like(images[:, :1, :1, :1])
    whole = images.to(torch.int32)
    if name == "sharpness":
        tall, wide = images.shape[2:]
        total = 4 * whole[..., 1:-1, 1:-1]
        for down in range(3):
            for across in range(3):
                total = total + whole[..., down : down + tall - 2, across : across + wide - 2]
        smooth = whole.clone()
        smooth[..., 1:-1, 1:-1] = (2 * total + 13) // 26
        return smooth
    red, green, blue = whole.split(1, dim=1)
    gray = (299 * red + 587 * green + 114 * blue) // 1000
    if name == "color":
        return gray
    # In 256ths: CUDA divides by a number as a product with its reciprocal, which is exact for powers of 2.
    pixels = images.shape[2] * images.shape[3]
    return (256 * gray.sum((2, 3), keepdim=True) + pixels // 2) // pixels / 256


def _stretch(images: Tensor) -> Tensor:
    """Scale each channel to the range from 0 to 255; a constant one stays.

    torchvision's function waits for the device.
    """
    whole = images.to(torch.int32)
    low, high = whole.amin((2, 3), keepdim=True), whole.amax((2, 3), keepdim=True)
    stretched = (whole - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched, whole).to(torch.uint8)


def jitter_colors(views: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of views, uint8 [B, 3, H, W], by ``factors`` [B, 3].

    Like torchvision's ColorJitter, in this order, but rounded once at the end: scale; blend with the image's
    mean gray; blend with each pixel's own gray (ITU-R 601).
    """
    brightness, contrast, saturation = to_device(factors, views.device).view(-1, 3, 1, 1, 1).unbind(1)
    image = (views.to(torch.float32) * brightness).clamp(0, 255)
    # Row by row, then the rows: the same sum with any number of threads.
    mean = _to_gray(image).mean(3, keepdim=True).mean(2, keepdim=True)
    image = (mean + contrast * (image - mean)).clamp(0, 255)
    gray = _to_gray(image)
    image = (gray + saturation * (image - gray)).clamp(0, 255)
    return image.round().to(torch.uint8)


def _to_gray(image: Tensor) -> Tensor:
    red, green, blue = image.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
