"""A view: the random crop and flip of an image, a pure function of (seed, image, view number).

Teacher and student, a low-resolution student, a resumed run, another process and the teacher cache get the
same view by using the same number. All geometry is in integers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ...export.runtime import Size, height_width

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Word = Tensor | int


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Compute Philox4x32-10 on int64 tensors of unsigned 32-bit words, broadcast together."""
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    # A GPU fills a tensor without waiting, as it would for a copy of a number.
    a, b, c, d = torch.broadcast_tensors(
        *(word if isinstance(word, Tensor) else torch.full((), word, device=device) for word in counter)
    )
    first, second = key
    for _ in range(_ROUNDS):
        # The high word of a product: the 64 bits are correct even if they overflow into the sign.
        ac, cc = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = ((cc >> 32) & _MASK) ^ b ^ first, cc & _MASK
        c, d = ((ac >> 32) & _MASK) ^ d ^ second, ac & _MASK
        first, second = (first + _WEYL[0]) & _MASK, (second + _WEYL[1]) & _MASK
    return a, b, c, d


def random_words(seed: int, keys: Tensor, views: Word, draw: Word) -> tuple[Tensor, ...]:
    """Draw four independent words, int64 in [0, 2³²), for each image key and view; shapes are broadcast.

    ``keys`` are int64 in [0, 2⁶³), ``views`` and ``draw`` in [0, 2³²); ``seed`` is taken modulo 2⁶⁴.
    """
    return philox((keys & _MASK, keys >> 32, views, draw), (seed & _MASK, (seed >> 32) & _MASK))


def uniform(word: Tensor) -> Tensor:
    """Convert a word to float32 in [0, 1): its upper 24 bits, exact on every device."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def below(word: Tensor, limit: Word) -> Tensor:
    """Convert a word to int64 in [0, limit), for limits up to 2³¹: the upper half of their product.

    Probabilities differ by at most limit / 2³².
    """
    return (word * limit) >> 32


FIRST_LISTED = 1 << 31
"""View numbers from this one on are indices into ``list_views``."""

# Draw numbers. A new use takes a new number, so that existing views do not change.
TRIES = 10  # draws 0 to 9: the crop
_FLIP, _JITTER, _ORDER, _METHODS = 16, 17, 18, 19

# The aspect ratio is drawn from this many values, evenly spaced in its logarithm. They are rounded, because
# exp may differ in its last bit between machines; ×, ÷ and √ may not.
RATIO_STEPS = 4096


@dataclass(frozen=True)
class ViewPolicy:
    """How views are drawn.

    - ``pad_crop``: the canonical image, of ``side`` R pixels, is padded by ``pad`` p pixels (``mode``) and
      ``crop`` S is cropped anywhere; R + 2p − S + 1 positions along each axis.
    - ``resized_crop``: torchvision's RandomResizedCrop: area from ``scale`` (of the whole), aspect from
      ``ratio`` (log-uniform, times ``aspect``), ten tries, then the largest crop of an allowed aspect at the
      center.
    - ``center``: the largest crop at the center with ``aspect``.

    ``aspect`` is the width of views over their height. ``flip`` mirrors half of the views. ``color_jitter`` j
    changes brightness, contrast and saturation by factors from [1 − j, 1 + j]. ``randaugment`` is N, M,
    ``erasing`` a probability, ``mixup`` and ``cutmix`` are the parameters of Beta distributions; see
    ``augment.py``.
    """

    kind: Literal["pad_crop", "resized_crop", "center"]
    side: Size = 0
    crop: Size = 0
    pad: int = 0
    mode: Literal["zeros", "reflect", "edge"] = "zeros"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    color_jitter: float = 0.0
    aspect: float = 1.0
    randaugment: tuple[int, int] | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible policy."""
        if self.kind == "pad_crop":
            if min(height_width(self.crop)) <= 0 or min(self._shifts) <= 0 or self.pad < 0:
                raise ValueError(f"cannot crop {self.crop} pixels from {self.side} padded by {self.pad}")
            if self.mode == "reflect" and self.pad >= min(height_width(self.side)):
                raise ValueError(f"reflection padding must be less than {self.side} pixels, got {self.pad}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"invalid scale {self.scale} or ratio {self.ratio}")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter must be from 0 to 1, got {self.color_jitter}")

    @property
    def mixes(self) -> bool:
        """True if a view shows two images."""
        return bool(self.mixup or self.cutmix)

    @property
    def count(self) -> int | None:
        """Number of different views of an image; None if there are practically infinitely many."""
        is_changed = self.color_jitter or self.randaugment or self.erasing or self.mixes
        if self.kind == "resized_crop" or is_changed:
            return None
        return (math.prod(self._shifts) if self.kind == "pad_crop" else 1) * (2 if self.flip else 1)

    @property
    def _shifts(self) -> tuple[int, int]:
        """Number of positions of a pad crop, down and across."""
        (height, width), (tall, wide) = height_width(self.side), height_width(self.crop)
        return height + 2 * self.pad - tall + 1, width + 2 * self.pad - wide + 1


def draw_crops(
    policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor, heights: Tensor, widths: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw the crop of each view: int32 [B, 4] (top, left, height, width in canonical pixels), flip bool [B].

    ``keys``, ``views``, ``heights`` and ``widths`` are int64 [B]. With ``pad_crop`` the box may extend into
    the padding, with negative top and left. Equal on every device with 64-bit floats. View numbers must be
    all below ``FIRST_LISTED``, or none.

    Raises:
        ValueError: the images do not have the size that the policy requires.
    """
    if policy.kind == "pad_crop":
        height, width = height_width(policy.side)
        if not bool((heights == height).all() and (widths == width).all()):
            raise ValueError(f"pad_crop requires images of {height} × {width} pixels")
        if len(views) and int(views[0]) >= FIRST_LISTED:
            listed, mirrored = list_views(policy)
            return listed[views - FIRST_LISTED], mirrored[views - FIRST_LISTED]
    # All draws at once: each operation costs more than its few numbers.
    draws = torch.tensor([*range(TRIES if policy.kind == "resized_crop" else 1), _FLIP], device=keys.device)
    words = random_words(seed, keys[:, None], views[:, None], draws)
    if policy.kind == "pad_crop":
        top, left = (
            below(word[:, 0], shifts) - policy.pad
            for word, shifts in zip(words, policy._shifts, strict=False)
        )
        tall, wide = (torch.full_like(top, length) for length in height_width(policy.crop))
        box = torch.stack([top, left, tall, wide], 1)
    elif policy.kind == "resized_crop":
        box = _resized_crop(policy, [word[:, :-1] for word in words], heights, widths)
    else:
        box = _center_crop((policy.aspect, policy.aspect), heights, widths)
    flips = words[0][:, -1] >> 31 if policy.flip else torch.zeros_like(keys)
    return box.to(torch.int32), flips.bool()


def list_views(policy: ViewPolicy) -> tuple[Tensor, Tensor]:
    """Return all different views of ``pad_crop``: crops int32 [count, 4] and flips bool [count]."""
    down, across = (torch.arange(shifts, dtype=torch.int32) - policy.pad for shifts in policy._shifts)
    flips = torch.arange(2 if policy.flip else 1, dtype=torch.int32)
    top, left, flip = torch.meshgrid(down, across, flips, indexing="ij")
    tall, wide = (torch.full_like(top, length) for length in height_width(policy.crop))
    return torch.stack([top, left, tall, wide], -1).reshape(-1, 4), flip.reshape(-1).bool()


def to_listed_numbers(policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor) -> Tensor:
    """Return the numbers of the same views of ``pad_crop`` in ``list_views``: int64 [B]."""
    heights, widths = (torch.full_like(keys, length) for length in height_width(policy.side))
    box, flips = draw_crops(policy, seed, keys, views, heights, widths)
    row, column = (box[:, axis].long() + policy.pad for axis in (0, 1))
    place = row * policy._shifts[1] + column
    return FIRST_LISTED + (2 * place + flips if policy.flip else place)


def draw_color_factors(policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor) -> Tensor:
    """Draw the factors of brightness, contrast and saturation: float32 [B, 3]."""
    drawn = torch.stack([uniform(word) for word in random_words(seed, keys, views, _JITTER)[:3]], 1)
    return 1 + policy.color_jitter * (2 * drawn - 1)


def draw_order(seed: int, epoch: int, keys: Tensor) -> Tensor:
    """Draw the order of an epoch, indices int64 [N]: images sorted by a hash of (seed, image, epoch)."""
    return torch.argsort(_number(random_words(seed, keys, epoch, _ORDER)), stable=True)


def draw_endless_order(seed: int, start: int, end: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part from ``start`` to ``end`` of an endless order: indices and numbers of passes, int64.

    Every pass contains all images in another order, ``draw_order`` of the pass's number.
    """
    first, last = start // len(keys), -(-end // len(keys))
    order = torch.cat([draw_order(seed, number, keys) for number in range(first, max(first + 1, last))])
    order = order[start - first * len(keys) : end - first * len(keys)]
    return order, torch.arange(start, end) // len(keys)


def method_keys(seed: int, keys: Tensor) -> Tensor:
    """Return the keys for the methods' random draws, from image and seed: int64 [N] below 2⁶³."""
    return _number(random_words(seed, keys, 0, _METHODS))


def _number(drawn: tuple[Tensor, ...]) -> Tensor:
    high, low, *_ = drawn
    return ((high >> 1) << 32) | low


def _resized_crop(policy: ViewPolicy, words: Sequence[Tensor], heights: Tensor, widths: Tensor) -> Tensor:
    """Return the first of the tries, drawn as ``words`` [B, TRIES], that fits into its image."""
    area, ratio, row, column = words
    low, high = policy.scale
    target = (heights * widths)[:, None] * (low + (high - low) * (area.double() * 2.0**-32))
    ratios = policy.ratio[0] * policy.aspect, policy.ratio[1] * policy.aspect
    aspect = ratio_table(ratios).to(heights.device)[below(ratio, RATIO_STEPS)]
    wide, tall = _rounded((target * aspect).sqrt()), _rounded((target / aspect).sqrt())
    fits = (wide >= 1) & (wide <= widths[:, None]) & (tall >= 1) & (tall <= heights[:, None])
    first = fits.int().argmax(1, keepdim=True)
    tall, wide, row, column = (x.gather(1, first)[:, 0] for x in (tall, wide, row, column))
    top = below(row, (heights - tall + 1).clamp(min=1))
    left = below(column, (widths - wide + 1).clamp(min=1))
    drawn = torch.stack([top, left, tall, wide], 1)
    return torch.where(fits.any(1)[:, None], drawn, _center_crop(ratios, heights, widths))


def _center_crop(ratio: tuple[float, float], heights: Tensor, widths: Tensor) -> Tensor:
    """Return the largest central crop of an allowed aspect, torchvision's choice after ten misses."""
    widest, tallest = _rounded(heights.double() * ratio[1]), _rounded(widths.double() / ratio[0])
    wide, tall = torch.minimum(widths, widest), torch.minimum(heights, tallest)
    tall, wide = tall.clamp(min=1), wide.clamp(min=1)
    return torch.stack([(heights - tall) // 2, (widths - wide) // 2, tall, wide], 1)


def _rounded(x: Tensor) -> Tensor:
    return (x + 0.5).floor().long()


@cache
def ratio_table(ratio: tuple[float, float]) -> Tensor:
    """Return ``RATIO_STEPS`` aspect ratios, float64, evenly spaced in their logarithm."""
    low, high = (math.log(end) for end in ratio)
    steps = ((step + 0.5) / RATIO_STEPS for step in range(RATIO_STEPS))
    ratios = [round(math.exp(low + (high - low) * t) * 2**20) / 2**20 for t in steps]
    return torch.tensor(ratios, dtype=torch.float64)


FIXED_SEED = 0
"""Seed of views that are shared by epochs and by runs with other seeds."""


@dataclass(frozen=True)
class ViewSchedule:
    """View numbers by epoch, or by pass over unlabeled images; views are drawn with ``view_seed``.

    - ``views`` is None: a new view in each epoch, drawn with the run's seed.
    - ``views`` V: V fixed views in turn, the same for all seeds.
    - V at least the number of different views: a new view in each epoch, drawn with the run's seed and
      identified by its index in ``list_views``.
    """

    policy: ViewPolicy
    seed: int
    views: int | None = None

    @property
    def covers_all(self) -> bool:
        """True if V covers all different views, so that each epoch may draw any of them."""
        count = self.policy.count if self.policy.kind == "pad_crop" else None
        return self.views is not None and count is not None and self.views >= count

    @property
    def fixed(self) -> int | None:
        """Number of fixed views, at most that of different ones; None: a new view in each epoch."""
        if self.views is None:
            return None
        if self.covers_all or self.policy.count == 1:
            return self.policy.count
        return self.views

    @property
    def view_seed(self) -> int:
        return self.seed if self.views is None else FIXED_SEED

    def numbers(self, keys: Tensor, epochs: Tensor | int) -> Tensor:
        """Return the view number of each image [N] in its epoch, or if it is unlabeled in its pass."""
        epochs = torch.zeros_like(keys) + epochs
        if self.covers_all:
            return to_listed_numbers(self.policy, self.seed, keys, epochs)
        return epochs if self.fixed is None else epochs % self.fixed

    def epoch_views(self, epoch: int) -> range:
        """Return the view numbers that may occur in an epoch."""
        if self.covers_all:
            assert self.policy.count is not None
            return range(FIRST_LISTED, FIRST_LISTED + self.policy.count)
        view = epoch if self.fixed is None else epoch % self.fixed
        return range(view, view + 1)

    def all_views(self, epochs: int) -> range:
        """Return the view numbers that may occur in the first ``epochs`` epochs."""
        if self.covers_all:
            return self.epoch_views(0)
        return range(epochs if self.fixed is None else min(epochs, self.fixed))
