"""Views become pixels: crop, resize, flip, many at a time.

``pad_crop`` at its own size is a gather of whole pixels, equal to the bit on every device. Anything resized
is antialiased and bilinear (a triangle filter as wide as the reduction) and rounded to uint8:

- on a CPU, torch's own uint8 resize, image by image (fast in whole numbers);
- on accelerators, two batched matrix products, rows and then columns, without a launch for each image.

Both agree with torchvision's ``resized_crop(antialias=True)``, and so with each other, within 1 level of 255.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .decode import Pixels
from .views import ViewPolicy, boxes, jitter

T = TypeVar("T", bound=Iterable[Tensor])


def prefetch(batches: Iterator[T], device: torch.device | str) -> Iterator[T]:
    """The same batches, iterables of their tensors. On an NVIDIA GPU each is made, on a stream of its own,
    while the one before it is worked on; elsewhere each is made when it is asked for.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))  # what the batches are made from is there by then

    def made() -> T | None:
        with torch.cuda.stream(beside):
            return next(batches, None)

    coming = made()
    while coming is not None:
        here = torch.cuda.current_stream(device)
        here.wait_stream(beside)
        for tensor in coming:
            tensor.record_stream(here)  # its memory is not used again before this stream is done with it
        # Begun before the step that uses `ready`, so that the two run side by side.
        ready, coming = coming, made()
        yield ready


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device; with CUDA by way of pinned memory, from which a copy waits for
    nothing and is not waited for.
    """
    device = torch.device(device)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    # On Apple's GPUs such a copy may outlive the memory it reads.
    return tensor.to(device, non_blocking=device.type != "mps")


PRODUCT_PIXELS = 1 << 23
"""Pixels of crops, padded to the largest of them, that one product takes: some 400 MB with all between."""


def render_views(
    pixels: Pixels,
    indices: Tensor,
    box: Tensor,
    flips: Tensor,
    size: int,
    policy: ViewPolicy,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The crops ``box`` (int32 [B, 4], as ``views.boxes`` gives them) of images ``indices`` (int64 [B]) at
    ``size`` × ``size`` pixels, mirrored where ``flips``: uint8 [B, 3, S, S] on ``device``, channels last.

    ``indices``, ``box`` and ``flips`` are on the host; ``pixels`` may be there or on ``device``. The host
    never waits for the device.
    """
    device = torch.device(device)
    if pixels.data.device.type == "cpu" and device.type != "cpu":
        pixels, indices, box = brought(pixels, indices, box, policy, device)
    if policy.kind == "pad_crop":
        views = _padded_crops(pixels, indices, box, flips, policy)
        if size == policy.crop:
            return views.permute(0, 3, 1, 2)
        # Cropped and mirrored already; only the size is still to come.
        number = len(indices)
        whole = torch.tensor([0, 0, policy.crop, policy.crop]).expand(number, 4)
        side = torch.full((number,), policy.crop)
        pixels = Pixels(views.reshape(-1, 3), torch.arange(number) * policy.crop**2, side, side)
        indices, box, flips = torch.arange(number), whole, torch.zeros(number, dtype=torch.bool)
    if device.type == "cpu":
        return _resized_one_by_one(pixels, indices, box, flips, size)
    return resized_by_products(pixels, indices, box, flips, size)


def brought(
    pixels: Pixels, indices: Tensor, box: Tensor, policy: ViewPolicy, device: torch.device
) -> tuple[Pixels, Tensor, Tensor]:
    """The rows that the crops lie in, from the host to the device: its pixels, and the same crops in them.

    They are packed in pinned memory, so that the copy runs beside the device's work.
    """
    top, height = box[:, 0].long(), box[:, 2].long()
    if policy.kind == "pad_crop":  # what the padding shows may be any row
        top, height = torch.zeros_like(top), pixels.heights[indices]
    width = pixels.widths[indices]
    starts, lengths = pixels.offsets[indices] + top * width, height * width
    packed = torch.empty(int(lengths.sum()), 3, dtype=torch.uint8, pin_memory=device.type == "cuda")
    end = 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        packed[end : end + length] = pixels.data[start : start + length]
        end += length
    moved = box.long() - torch.stack([top, *[torch.zeros_like(top)] * 3], 1)
    there = Pixels(to_device(packed, device), lengths.cumsum(0) - lengths, height, width)
    return there, torch.arange(len(indices)), moved


def _all_sent(device: torch.device, *columns: Tensor) -> Sequence[Tensor]:
    """Numbers from the host, [B] each, as int64 on the device, in one copy that nothing waits for."""
    return to_device(torch.stack([column.long() for column in columns]), device).unbind()


def _padded_crops(pixels: Pixels, indices: Tensor, box: Tensor, flips: Tensor, policy: ViewPolicy) -> Tensor:
    """uint8 [B, S, S, 3] by gathering whole pixels."""
    device, side = pixels.data.device, policy.side
    starts, top, left, mirrored = (
        x[:, None] for x in _all_sent(device, pixels.offsets[indices], box[:, 0], box[:, 1], flips)
    )
    steps = torch.arange(policy.crop, device=device)
    rows = top + steps
    columns = left + torch.where(mirrored.bool(), steps.flip(0), steps)
    first = starts + _within(rows, side, policy) * side
    views = pixels.data[first[:, :, None] + _within(columns, side, policy)[:, None, :]]
    if policy.mode == "zeros" and policy.pad:
        inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
        views *= inside[..., None]
    return views


def _within(position: Tensor, side: int, policy: ViewPolicy) -> Tensor:
    """The pixel that stands at a position of the padded image."""
    if policy.mode == "reflect":
        position = position.abs()
        position = side - 1 - (side - 1 - position).abs()
    return position.clamp(0, side - 1)


def _resized_one_by_one(pixels: Pixels, indices: Tensor, box: Tensor, flips: Tensor, size: int) -> Tensor:
    views = torch.empty(len(indices), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for view, index, (top, left, height, width), flip in zip(
        views, indices.tolist(), box.tolist(), flips.tolist(), strict=True
    ):
        crop = pixels.image(index)[top : top + height, left : left + width].permute(2, 0, 1)[None]
        resized = interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        view.copy_(resized.flip(-1) if flip else resized)
    return views


def resized_by_products(pixels: Pixels, indices: Tensor, box: Tensor, flips: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, S, S] on the pixels' device by two batched matrix products (see ``render_views``), in as
    many pieces as ``PRODUCT_PIXELS`` asks for.
    """
    views = torch.empty(len(indices), size, size, 3, dtype=torch.uint8, device=pixels.data.device)
    # The tallest and the widest crop are known on the host: the device is not waited for.
    tallest, widest = (int(length.max()) if len(length) else 1 for length in (box[:, 2], box[:, 3]))
    most = max(1, PRODUCT_PIXELS // (tallest * widest))
    for start in range(0, len(indices), most):
        some = slice(start, start + most)
        top, left, height, width = box[some].long().T
        stride = pixels.widths[indices[some]]
        first = pixels.offsets[indices[some]] + top * stride + left
        numbers = _all_sent(pixels.data.device, first, stride, height, width, flips[some])
        products = _products(pixels.data, numbers, tallest, widest, size)
        views[some] = products.round_().clamp_(0, 255).transpose(1, 2)
    return views.permute(0, 3, 1, 2)


def _products(data: Tensor, numbers: Sequence[Tensor], tallest: int, widest: int, size: int) -> Tensor:
    """float32 [B, column, row, 3] of crops: ``numbers`` are first pixel in ``data``, pixels from a row to the
    next, height, width and whether mirrored, int64 [B] each.
    """
    first, stride, height, width, mirrored = numbers
    rows = torch.arange(tallest, device=data.device).minimum(height[:, None] - 1) * stride[:, None]
    columns = torch.arange(widest, device=data.device).minimum(width[:, None] - 1)
    crops = data[(first[:, None] + rows)[:, :, None] + columns[:, None, :]]
    down = _triangles(height, tallest, size)
    across = _triangles(width, widest, size)
    across = torch.where(mirrored.bool()[:, None, None], across.flip(1), across)
    batch = len(first)
    squeezed = torch.bmm(down, crops.to(down.dtype).reshape(batch, tallest, widest * 3))
    squeezed = squeezed.view(batch, size, widest, 3).transpose(1, 2).reshape(batch, widest, size * 3)
    return torch.bmm(across, squeezed).view(batch, size, size, 3)


def _triangles(length: Tensor, longest: int, size: int) -> Tensor:
    """Weights float32 [B, S, longest] that resize ``length`` (int64 [B]) pixels to S, antialiased.

    The triangle is as wide as the step from one output pixel to the next, or as one input pixel where that is
    more; pixels outside the crop count nothing: torch.nn.functional.interpolate's ``antialias=True``.
    """
    step = (length.to(torch.float32) / size)[:, None, None]
    output = torch.arange(size, device=length.device, dtype=torch.float32)[None, :, None]
    place = torch.arange(longest, device=length.device)
    distance = (place + 0.5 - (output + 0.5) * step).abs() / step.clamp(min=1)
    weights = (1 - distance).clamp(min=0) * (place < length[:, None, None])
    return weights / weights.sum(-1, keepdim=True)


def colour_jittered(views: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation changed by ``factors`` (float32 [B, 3]), in this order.

    As torchvision's ColorJitter changes them, but rounded once, at the end: scale; blend with the image's
    mean grey; blend with each pixel's own grey (ITU-R 601). ``views`` uint8 [B, 3, S, S].
    """
    brightness, contrast, saturation = to_device(factors, views.device).view(-1, 3, 1, 1, 1).unbind(1)
    image = (views.to(torch.float32) * brightness).clamp(0, 255)
    # Row by row, then the rows: the same sum however many threads there are.
    mean = _grey(image).mean(3, keepdim=True).mean(2, keepdim=True)
    image = (mean + contrast * (image - mean)).clamp(0, 255)
    grey = _grey(image)
    image = (grey + saturation * (image - grey)).clamp(0, 255)
    return image.round().to(torch.uint8)


def _grey(image: Tensor) -> Tensor:
    red, green, blue = image.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


class Normalise(nn.Module):
    """uint8 [B, 3, S, S] to a network's input on the same device: (pixels / 255 − mean) / std, computed as
    the runtime does it, in float32 and channels last.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1), persistent=False)

    def forward(self, views: Tensor) -> Tensor:
        # Channels last from the start: three copies of a small image are dearer than one.
        views = views.contiguous(memory_format=torch.channels_last)
        return (views.to(torch.float32) / 255).sub_(self.mean).div_(self.std)


@dataclass(frozen=True)
class Views:
    """The training images of a job and how their views are drawn.

    ``labels`` (int64 [N], or float32 [N, classes]) and ``keys`` (int64 [N]) are on the host (see
    ``decode.Readable``); ``size`` is the side of a view in pixels.
    """

    pixels: Pixels
    labels: Tensor
    keys: Tensor
    policy: ViewPolicy
    seed: int
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self,
        indices: Tensor,
        view_numbers: Tensor,
        device: torch.device | str = "cpu",
        size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Views of images ``indices`` (int64 [B], host): uint8 [B, 3, S, S], and their labels.

        Another ``size`` gives the same crops at that size. What comes out depends on each image, its view
        number and the seed alone, not on what else is in the batch.
        """
        keys, height, width = self.keys[indices], self.pixels.heights[indices], self.pixels.widths[indices]
        box, flips = boxes(self.policy, self.seed, keys, view_numbers, height, width)
        views = render_views(self.pixels, indices, box, flips, size or self.size, self.policy, device)
        if self.policy.color_jitter:
            views = colour_jittered(views, jitter(self.policy, self.seed, keys, view_numbers))
        return views, to_device(self.labels[indices], device)

    def batches(
        self,
        plan: Iterable[tuple[Tensor, Tensor]],
        device: torch.device | str = "cpu",
        also: int | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """``batch`` for each (indices, view numbers) of a plan, in its order; on a GPU one step ahead.

        With ``also``, each batch's third part is the same crops at that size.
        """

        def made(indices: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
            batch = self.batch(indices, numbers, device)
            return batch if also is None else (*batch, self.batch(indices, numbers, device, also)[0])

        return prefetch((made(indices, numbers) for indices, numbers in plan), device)
