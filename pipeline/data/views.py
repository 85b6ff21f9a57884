"""A view: the random crop and flip of an image, a pure function of (seed, image, view number).

Whatever needs the same view again (teacher and student, a student of lower resolution, a resumed run, another
process, a stored answer of the teacher) asks for the same number. All geometry is integers.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Word = Tensor | int


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words; the four are broadcast together."""
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    a, b, c, d = torch.broadcast_tensors(*(torch.as_tensor(word, device=device) for word in counter))
    first, second = key
    for _ in range(_ROUNDS):
        # The high word of a product: the 64 bits are right even where their sign is not.
        ac, cc = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((cc >> 32) & _MASK) ^ b ^ first,
            cc & _MASK,
            ((ac >> 32) & _MASK) ^ d ^ second,
            ac & _MASK,
        )
        first, second = (first + _WEYL[0]) & _MASK, (second + _WEYL[1]) & _MASK
    return a, b, c, d


def words(seed: int, keys: Tensor, views: Word, draw: Word) -> tuple[Tensor, ...]:
    """Four independent words, int64 in [0, 2³²), for each image key and view; shapes are broadcast.

    ``keys`` are int64 in [0, 2⁶³), ``views`` and ``draw`` in [0, 2³²); of ``seed`` the lower 64 bits count.
    """
    return philox((keys & _MASK, keys >> 32, views, draw), (seed & _MASK, (seed >> 32) & _MASK))


def uniform(word: Tensor) -> Tensor:
    """float32 in [0, 1) from a word: its upper 24 bits, exact on every device."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def below(word: Tensor, limit: Word) -> Tensor:
    """int64 in [0, limit) from a word, for limits up to 2³¹: the upper half of their product.

    No value is likelier than another by more than limit / 2³².
    """
    return (word * limit) >> 32


LISTED = 1 << 31
"""View numbers from this one on name an image's different views one by one, as ``every_view`` lists them."""

# Which draw serves what; a new use takes a new number, so that the old views stay as they are.
TRIES = 10  # draws 0 to 9: the crop
_FLIP, _JITTER, _ORDER, _METHODS = 16, 17, 18, 19

# The aspect ratio is drawn from this many values, evenly spaced in its logarithm. They are computed once and
# rounded: exp may differ in its last bit from one machine to the next; what follows (×, ÷, √) may not.
_RATIOS = 4096


@dataclass(frozen=True)
class ViewPolicy:
    """How views are drawn.

    - ``pad_crop``: the square canonical image (``side`` R) is padded by ``pad`` p pixels (``mode``) and
      ``crop`` × ``crop`` cut out anywhere; (R + 2p − S + 1)² crops.
    - ``resized_crop``: torchvision's RandomResizedCrop: area from ``scale`` (of the whole), aspect from
      ``ratio`` (log-uniform), ten tries, then the largest crop of an allowed aspect at the centre.
    - ``center``: the largest square at the centre.

    ``flip`` mirrors half of the views. ``color_jitter`` j changes brightness, contrast and saturation by
    factors from [1 − j, 1 + j].
    """

    kind: Literal["pad_crop", "resized_crop", "center"]
    side: int = 0
    crop: int = 0
    pad: int = 0
    mode: Literal["zeros", "reflect", "edge"] = "zeros"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a policy that no view can be drawn by."""
        if self.kind == "pad_crop":
            if not 0 < self.crop <= self.side + 2 * self.pad or self.pad < 0:
                raise ValueError(f"no crop of {self.crop} pixels from {self.side} padded by {self.pad}")
            if self.mode == "reflect" and self.pad >= self.side:
                raise ValueError(f"reflection fills less than {self.side} pixels, not {self.pad}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"no crop of scale {self.scale} and ratio {self.ratio}")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter is {self.color_jitter}; it goes from 0 to 1")

    @property
    def count(self) -> int | None:
        """How many different views an image has; None where that is no useful number."""
        if self.kind == "resized_crop" or self.color_jitter:
            return None
        return (self._shifts**2 if self.kind == "pad_crop" else 1) * (2 if self.flip else 1)

    @property
    def _shifts(self) -> int:
        return self.side + 2 * self.pad - self.crop + 1


def boxes(
    policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor, heights: Tensor, widths: Tensor
) -> tuple[Tensor, Tensor]:
    """The crop of each view: int32 [B, 4] (top, left, height, width in canonical pixels) and flip, bool [B].

    ``keys``, ``views``, ``heights`` and ``widths`` are int64 [B]. With ``pad_crop`` top and left may be
    negative and the box reach beyond the image: the padding. Equal on every device with 64-bit floats. View
    numbers are all below ``LISTED``, or all not.

    Raises:
        ValueError: the images are not those the policy is for.
    """
    if policy.kind == "pad_crop":
        if not bool((heights == policy.side).all() and (widths == policy.side).all()):
            raise ValueError(f"pad_crop wants images of {policy.side} × {policy.side} pixels")
        if len(views) and int(views[0]) >= LISTED:
            listed, mirrored = every_view(policy)
            return listed[views - LISTED], mirrored[views - LISTED]
        row, column, *_ = words(seed, keys, views, 0)
        top, left = (below(word, policy._shifts) - policy.pad for word in (row, column))
        box = torch.stack(
            [top, left, torch.full_like(top, policy.crop), torch.full_like(top, policy.crop)], 1
        )
    elif policy.kind == "resized_crop":
        box = _resized_crop(policy, seed, keys, views, heights, widths)
    else:
        short = torch.minimum(heights, widths)
        box = torch.stack([(heights - short) // 2, (widths - short) // 2, short, short], 1)
    flips = words(seed, keys, views, _FLIP)[0] >> 31 if policy.flip else torch.zeros_like(keys)
    return box.to(torch.int32), flips.bool()


def every_view(policy: ViewPolicy) -> tuple[Tensor, Tensor]:
    """All different views of an image by ``pad_crop``: int32 [count, 4] and bool [count].

    Raises:
        ValueError: there are too many to list.
    """
    if policy.kind != "pad_crop" or policy.count is None:
        raise ValueError(f"the views of {policy.kind} cannot be listed")
    shifts = torch.arange(policy._shifts, dtype=torch.int32) - policy.pad
    flips = torch.arange(2 if policy.flip else 1, dtype=torch.int32)
    top, left, flip = torch.meshgrid(shifts, shifts, flips, indexing="ij")
    crop = torch.full_like(top, policy.crop)
    return torch.stack([top, left, crop, crop], -1).reshape(-1, 4), flip.reshape(-1).bool()


def listed(policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor) -> Tensor:
    """The same views by the numbers under which they are listed: int64 [B], from ``LISTED`` on.

    Raises:
        ValueError: the policy's views cannot be listed.
    """
    side = torch.full_like(keys, policy.side)
    box, flips = boxes(policy, seed, keys, views, side, side)
    if policy.kind != "pad_crop" or policy.count is None:
        raise ValueError(f"the views of {policy.kind} cannot be listed")
    row, column = (box[:, axis].long() + policy.pad for axis in (0, 1))
    place = row * policy._shifts + column
    return LISTED + (2 * place + flips if policy.flip else place)


def jitter(policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor) -> Tensor:
    """Factors of brightness, contrast and saturation: float32 [B, 3]."""
    drawn = torch.stack([uniform(word) for word in words(seed, keys, views, _JITTER)[:3]], 1)
    return 1 + policy.color_jitter * (2 * drawn - 1)


def permutation(seed: int, epoch: int, keys: Tensor) -> Tensor:
    """The order of an epoch, int64 [N] indices: images sorted by a hash of (seed, image, epoch).

    Copies of one image keep their order of index.
    """
    return torch.argsort(_number(words(seed, keys, epoch, _ORDER)), stable=True)


def draw_keys(seed: int, keys: Tensor) -> Tensor:
    """What the methods' own random draws follow: a number of each image and the seed, int64 [N] below 2⁶³."""
    return _number(words(seed, keys, 0, _METHODS))


def _number(drawn: tuple[Tensor, ...]) -> Tensor:
    high, low, *_ = drawn
    return ((high >> 1) << 32) | low


def _resized_crop(
    policy: ViewPolicy, seed: int, keys: Tensor, views: Tensor, heights: Tensor, widths: Tensor
) -> Tensor:
    tries = torch.arange(TRIES, device=keys.device)
    area, ratio, row, column = words(seed, keys[:, None], views[:, None], tries)
    low, high = policy.scale
    target = (heights * widths)[:, None] * (low + (high - low) * (area.double() * 2.0**-32))
    aspect = _ratios(policy.ratio).to(keys.device)[below(ratio, _RATIOS)]
    wide, tall = _rounded((target * aspect).sqrt()), _rounded((target / aspect).sqrt())
    fits = (wide >= 1) & (wide <= widths[:, None]) & (tall >= 1) & (tall <= heights[:, None])
    first = fits.int().argmax(1, keepdim=True)
    tall, wide, row, column = (x.gather(1, first)[:, 0] for x in (tall, wide, row, column))
    drawn = torch.stack(
        [
            below(row, (heights - tall + 1).clamp(min=1)),
            below(column, (widths - wide + 1).clamp(min=1)),
            tall,
            wide,
        ],
        1,
    )
    return torch.where(fits.any(1)[:, None], drawn, _centre(policy.ratio, heights, widths))


def _centre(ratio: tuple[float, float], heights: Tensor, widths: Tensor) -> Tensor:
    """The largest crop of an allowed aspect at the centre: what torchvision takes after ten misses."""
    widest, tallest = _rounded(heights.double() * ratio[1]), _rounded(widths.double() / ratio[0])
    wide, tall = torch.minimum(widths, widest), torch.minimum(heights, tallest)
    tall, wide = tall.clamp(min=1), wide.clamp(min=1)
    return torch.stack([(heights - tall) // 2, (widths - wide) // 2, tall, wide], 1)


def _rounded(x: Tensor) -> Tensor:
    return (x + 0.5).floor().long()


@cache
def _ratios(ratio: tuple[float, float]) -> Tensor:
    low, high = (math.log(end) for end in ratio)
    steps = ((step + 0.5) / _RATIOS for step in range(_RATIOS))
    return torch.tensor(
        [round(math.exp(low + (high - low) * t) * 2**20) / 2**20 for t in steps], dtype=torch.float64
    )


FIXED_SEED = 0
"""Views that are to be met again, by other epochs and by runs with other seeds, are drawn with this seed."""


@dataclass(frozen=True)
class Schedule:
    """View numbers by epoch; the views themselves are drawn with ``view_seed``.

    - ``views`` is None: a new view each epoch, drawn with the run's seed.
    - ``views`` V: V fixed views in turn, the same for runs of every seed.
    - V at least as many as there are different views: each epoch's new view, by the run's seed, named by its
      number in the list of them.
    """

    policy: ViewPolicy
    seed: int
    views: int | None = None

    @property
    def complete(self) -> bool:
        """Whether every view there is belongs to the fixed ones, so that the draw is free."""
        count = self.policy.count
        return (
            self.views is not None
            and count is not None
            and self.views >= count
            and self.policy.kind == "pad_crop"
        )

    @property
    def fixed(self) -> int | None:
        """V, or fewer where there are not so many different views; None: a new view each epoch."""
        if self.views is None:
            return None
        if self.complete or self.policy.count == 1:
            return self.policy.count
        return self.views

    @property
    def view_seed(self) -> int:
        return self.seed if self.views is None else FIXED_SEED

    def numbers(self, keys: Tensor, epoch: int) -> Tensor:
        """The view number of each image [N] in an epoch."""
        if self.complete:
            return listed(self.policy, self.seed, keys, torch.full_like(keys, epoch))
        return torch.full_like(keys, epoch if self.fixed is None else epoch % self.fixed)

    def needed(self, epoch: int) -> range:
        """The view numbers that may come up in an epoch."""
        if self.complete:
            assert self.policy.count is not None
            return range(LISTED, LISTED + self.policy.count)
        view = epoch if self.fixed is None else epoch % self.fixed
        return range(view, view + 1)

    def used(self, epochs: int) -> range:
        """The view numbers that may come up in so many epochs."""
        if self.complete:
            return self.needed(0)
        return range(epochs if self.fixed is None else min(epochs, self.fixed))
