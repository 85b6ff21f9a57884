"""Pixels of views: crop, resize and flip, in batches.

``pad_crop`` at its own size gathers whole pixels and is bit-exact on every device. Resizing is bilinear and
antialiased (a triangle filter as wide as the reduction), rounded to uint8:

- on a CPU, torch's own uint8 resize, image by image (fast integer arithmetic);
- on accelerators, two batched matrix products, rows and then columns, without a kernel launch per image.

Both match torchvision's ``resized_crop(antialias=True)``, and so each other, within 1 level of 255.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...export.runtime import Size, height_width
from .augment import apply_changes, draw_changes, draw_mixes, mix_labels, mixing_ratios, to_device
from .boxes import follow
from .views import ViewPolicy, draw_crops

T = TypeVar("T", bound=Iterable[Tensor])

MAX_BATCH_PIXELS = 1 << 23
"""Pixels of crops, padded to the largest of them, in one batched product: about 400 MB with intermediates."""


@dataclass(frozen=True)
class Pixels:
    """N images of any sizes in one buffer.

    ``data`` is uint8 [P, 3], the RGB pixels of all images row by row, one image after the other (possibly
    memory-mapped or on an accelerator). ``offsets`` (in pixels), ``heights`` and ``widths`` are int64 [N] and
    stay on the host, since geometry is computed there.
    """

    data: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor

    def __len__(self) -> int:
        return len(self.offsets)

    def image(self, index: int) -> Tensor:
        """Return a view of one image: uint8 [H, W, 3]."""
        start, height, width = (int(x[index]) for x in (self.offsets, self.heights, self.widths))
        return self.data[start : start + height * width].view(height, width, 3)

    def stack(self) -> Tensor:
        """Return a view of all images, which have the same size: uint8 [N, H, W, 3]."""
        return self.data.view(len(self), int(self.heights[0]), int(self.widths[0]), 3)

    def to(self, device: torch.device | str) -> "Pixels":
        return replace(self, data=self.data.to(device))


def pack_pixels(data: Tensor, sizes: Tensor) -> Pixels:
    """Return pixels from a buffer (uint8 [P, 3]) and the images' sizes (int64 [N, 2]: height, width)."""
    areas = sizes[:, 0] * sizes[:, 1]
    return Pixels(data, areas.cumsum(0) - areas, sizes[:, 0].clone(), sizes[:, 1].clone())


def prefetch(batches: Iterator[T], device: torch.device | str) -> Iterator[T]:
    """Yield the same batches, iterables of their tensors.

    On an NVIDIA GPU, each is computed on a separate stream while the batch before it is in use. On other
    devices, batches are computed on request.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # for the data that batches are computed from

    def compute() -> T | None:
        with torch.cuda.stream(stream):
            return next(batches, None)

    upcoming = compute()
    while upcoming is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in upcoming:
            tensor.record_stream(current)  # its memory is not reused before this stream has finished with it
        # Started before the step that uses `batch`, so that both run concurrently.
        batch, upcoming = upcoming, compute()
        yield batch


def render_views(
    pixels: Pixels,
    indices: Tensor,
    box: Tensor,
    flips: Tensor,
    size: Size,
    policy: ViewPolicy,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return crops at ``size`` pixels: uint8 [B, 3, H, W] on ``device``, channels last.

    ``indices`` (int64 [B]), ``box`` (int32 [B, 4]) and ``flips`` (bool [B]) from ``views.draw_crops`` are on
    the host; ``pixels`` may be there or on ``device``. The host never waits for the device.
    """
    device = torch.device(device)
    if pixels.data.device.type == "cpu" and device.type != "cpu":
        pixels, indices, box = copy_crop_rows(pixels, indices, box, policy, device)
    if policy.kind == "pad_crop":
        views = _gather_padded_crops(pixels, indices, box, flips, policy)
        if size == policy.crop:
            return views.permute(0, 3, 1, 2)
        # Already cropped and mirrored; resize the whole.
        count, (height, width) = len(indices), height_width(policy.crop)
        pixels = pack_pixels(views.reshape(-1, 3), torch.tensor([[height, width]]).repeat(count, 1))
        box = torch.tensor([0, 0, height, width]).expand(count, 4)
        indices, flips = torch.arange(count), torch.zeros(count, dtype=torch.bool)
    if device.type == "cpu":
        return _resize_each(pixels, indices, box, flips, size)
    return resize_batched(pixels, indices, box, flips, size)


def copy_crop_rows(
    pixels: Pixels, indices: Tensor, box: Tensor, policy: ViewPolicy, device: torch.device
) -> tuple[Pixels, Tensor, Tensor]:
    """Copy the rows that the crops lie in to the device: the copied pixels, and indices and boxes in them.

    They are packed in pinned memory, so that the copy is concurrent with the device's work.
    """
    top, height = box[:, 0].long(), box[:, 2].long()
    if policy.kind == "pad_crop":  # the padding may show any row
        top, height = torch.zeros_like(top), pixels.heights[indices]
    width = pixels.widths[indices]
    starts, lengths = pixels.offsets[indices] + top * width, height * width
    packed = torch.empty(int(lengths.sum()), 3, dtype=torch.uint8, pin_memory=device.type == "cuda")
    end = 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        packed[end : end + length] = pixels.data[start : start + length]
        end += length
    moved = box.long() - torch.stack([top, *[torch.zeros_like(top)] * 3], 1)
    copied = Pixels(to_device(packed, device), lengths.cumsum(0) - lengths, height, width)
    return copied, torch.arange(len(indices)), moved


def _copy_columns(device: torch.device, *columns: Tensor) -> Sequence[Tensor]:
    """Copy host tensors [B] to the device as int64, in one asynchronous copy."""
    return to_device(torch.stack([column.long() for column in columns]), device).unbind()


def _gather_padded_crops(
    pixels: Pixels, indices: Tensor, box: Tensor, flips: Tensor, policy: ViewPolicy
) -> Tensor:
    """Return crops of the padded images by gathering whole pixels: uint8 [B, H, W, 3]."""
    device, (height, width) = pixels.data.device, height_width(policy.side)
    starts, top, left, mirrored = (
        x[:, None] for x in _copy_columns(device, pixels.offsets[indices], box[:, 0], box[:, 1], flips)
    )
    down, across = (torch.arange(length, device=device) for length in height_width(policy.crop))
    rows = top + down
    columns = left + torch.where(mirrored.bool(), across.flip(0), across)
    first = starts + _source_position(rows, height, policy) * width
    views = pixels.data[first[:, :, None] + _source_position(columns, width, policy)[:, None, :]]
    if policy.mode == "zeros" and policy.pad:
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        views *= inside[..., None]
    return views


def _source_position(position: Tensor, side: int, policy: ViewPolicy) -> Tensor:
    """Map a position of the padded image to the pixel that is shown there."""
    if policy.mode == "reflect":
        position = position.abs()
        position = side - 1 - (side - 1 - position).abs()
    return position.clamp(0, side - 1)


def _resize_each(pixels: Pixels, indices: Tensor, box: Tensor, flips: Tensor, size: Size) -> Tensor:
    shape = height_width(size)
    views = torch.empty(len(indices), *shape, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for view, index, (top, left, height, width), flip in zip(
        views, indices.tolist(), box.tolist(), flips.tolist(), strict=True
    ):
        crop = pixels.image(index)[top : top + height, left : left + width].permute(2, 0, 1)[None]
        resized = interpolate(crop, shape, mode="bilinear", antialias=True)[0]
        view.copy_(resized.flip(-1) if flip else resized)
    return views


def resize_batched(pixels: Pixels, indices: Tensor, box: Tensor, flips: Tensor, size: Size) -> Tensor:
    """Return crops uint8 [B, 3, H, W] on the pixels' device, resized by two batched matrix products.

    Works in chunks of at most ``MAX_BATCH_PIXELS``.
    """
    shape = height_width(size)
    views = torch.empty(len(indices), *shape, 3, dtype=torch.uint8, device=pixels.data.device)
    # Maxima are computed on the host, so that it does not wait for the device.
    max_height, max_width = (int(length.max()) if len(length) else 1 for length in (box[:, 2], box[:, 3]))
    chunk = max(1, MAX_BATCH_PIXELS // (max_height * max_width))
    for start in range(0, len(indices), chunk):
        rows = slice(start, start + chunk)
        top, left, height, width = box[rows].long().T
        stride = pixels.widths[indices[rows]]
        first = pixels.offsets[indices[rows]] + top * stride + left
        geometry = _copy_columns(pixels.data.device, first, stride, height, width, flips[rows])
        resized = _resize_chunk(pixels.data, geometry, max_height, max_width, shape)
        views[rows] = resized.round_().clamp_(0, 255).transpose(1, 2)
    return views.permute(0, 3, 1, 2)


def _resize_chunk(
    data: Tensor, geometry: Sequence[Tensor], max_height: int, max_width: int, shape: tuple[int, int]
) -> Tensor:
    """Return resized crops, float32 [B, column, row, 3].

    ``geometry`` is, int64 [B] each: first pixel in ``data``, row stride, height, width, mirrored.
    """
    first, stride, height, width, mirrored = geometry
    rows = torch.arange(max_height, device=data.device).minimum(height[:, None] - 1) * stride[:, None]
    columns = torch.arange(max_width, device=data.device).minimum(width[:, None] - 1)
    crops = data[(first[:, None] + rows)[:, :, None] + columns[:, None, :]]
    tall, wide = shape
    down = _triangle_filter(height, max_height, tall)
    across = _triangle_filter(width, max_width, wide)
    across = torch.where(mirrored.bool()[:, None, None], across.flip(1), across)
    batch = len(first)
    reduced = torch.bmm(down, crops.to(down.dtype).reshape(batch, max_height, max_width * 3))
    reduced = reduced.view(batch, tall, max_width, 3).transpose(1, 2).reshape(batch, max_width, tall * 3)
    return torch.bmm(across, reduced).view(batch, wide, tall, 3)


def _triangle_filter(length: Tensor, max_length: int, size: int) -> Tensor:
    """Return weights float32 [B, S, max_length] that resize ``length`` (int64 [B]) pixels to S.

    The triangle is as wide as the step between output pixels, or as one input pixel if that is wider. Pixels
    outside the crop have weight 0, as in torch.nn.functional.interpolate with ``antialias=True``.
    """
    step = (length.to(torch.float32) / size)[:, None, None]
    output = torch.arange(size, device=length.device, dtype=torch.float32)[None, :, None]
    place = torch.arange(max_length, device=length.device)
    distance = (place + 0.5 - (output + 0.5) * step).abs() / step.clamp(min=1)
    weights = (1 - distance).clamp(min=0) * (place < length[:, None, None])
    return weights / weights.sum(-1, keepdim=True)


class Normalize(nn.Module):
    """Convert uint8 [B, 3, H, W] to a network's input: (pixels / 255 − mean) / std.

    Computed as in the runtime, in float32 and channels last.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1), persistent=False)

    def forward(self, views: Tensor) -> Tensor:
        # Channels last first: three copies of a small image are slower than one.
        views = views.contiguous(memory_format=torch.channels_last)
        return (views.to(torch.float32) / 255).sub_(self.mean).div_(self.std)


class Drawn(NamedTuple):
    """Views of a batch: crops, flips, changes of pixels, and labels.

    If views are mixed, those of their partners follow them, and ``mixes`` are ``augment.draw_mixes``'s.
    """

    box: Tensor
    flips: Tensor
    changes: Tensor
    labels: Tensor
    indices: Tensor
    mixes: Tensor | None


@dataclass(frozen=True)
class LabeledViews:
    """Training images whose views are drawn by ``policy`` and ``seed``, of ``size`` pixels.

    ``labels`` (int64 [L], float32 [L, classes] or [L, M, 7]) are those of the first L images, and the others
    have none. ``keys`` are int64 [N]. Both are on the host; see ``decode.ReadableImages``. Labels of mixed
    views are those of ``augment.mix_labels``.
    """

    labels: Tensor
    keys: Tensor
    policy: ViewPolicy
    seed: int
    size: Size

    def __len__(self) -> int:
        return len(self.keys)

    def draw(self, indices: Tensor, view_numbers: Tensor, heights: Tensor, widths: Tensor) -> Drawn:
        """Draw views of images ``indices`` with ``view_numbers``, int64 [B] both, labeled images first.

        ``heights`` and ``widths`` are int64 [N], of all images. Labels are those of the labeled images.
        """
        policy, seed, labeled, mixes = self.policy, self.seed, len(self.labels), None
        labels = self.labels[indices[indices < labeled]]
        rows = slice(len(labels))
        if policy.mixes:
            keys = self.keys[indices]
            mixes, partners = draw_mixes(policy, seed, keys, view_numbers, indices, labeled, len(self))
            labels = mix_labels(labels, self.labels[partners[rows]], mixing_ratios(mixes[rows], self.size))
            indices, view_numbers = torch.cat([indices, partners]), view_numbers.repeat(2)
        keys, heights, widths = self.keys[indices], heights[indices], widths[indices]
        box, flips = draw_crops(policy, seed, keys, view_numbers, heights, widths)
        labels = follow(labels, box[rows], flips[rows], heights[rows], widths[rows], self.size)
        changes = draw_changes(policy, seed, keys, view_numbers)
        return Drawn(box, flips, changes, labels, indices, mixes)


@dataclass(frozen=True)
class Views(LabeledViews):
    """Views of images whose pixels are in memory."""

    pixels: Pixels

    def batch(
        self,
        indices: Tensor,
        view_numbers: Tensor,
        device: torch.device | str = "cpu",
        sizes: tuple[Size, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Return views of images ``indices`` (int64 [B], host), uint8 [B, 3, H, W], and the labels.

        With ``sizes``, the same crops at the first of them; those at the others follow the labels. A view
        depends only on its image, view number and the seed, and if it is mixed on the images of the set, not
        on the other images of the batch.
        """
        pixels = self.pixels
        drawn = self.draw(indices, view_numbers, pixels.heights, pixels.widths)
        crops, policy = (pixels, drawn.indices, drawn.box, drawn.flips), self.policy
        views, *more = (
            apply_changes(render_views(*crops, size, policy, device), policy, drawn.changes, drawn.mixes)
            for size in sizes or (self.size,)
        )
        return views, to_device(drawn.labels, device), *more

    def batches(
        self,
        plan: Iterable[tuple[Tensor, Tensor]],
        device: torch.device | str = "cpu",
        also: Size | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield ``batch`` for each (indices, view numbers) of a plan; on a GPU one batch ahead.

        With ``also``, the third element of each batch is the same crops at that size.
        """
        sizes = (self.size,) if also is None else (self.size, also)
        return prefetch((self.batch(*step, device, sizes) for step in plan), device)
