from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from questpress.export import runtime
from questpress.export.runtime import Size, height_width
from questpress.pipeline.data import render
from questpress.pipeline.data.augment import jitter_colors
from questpress.pipeline.data.decode import Canonical, DecodedImages, decode_images
from questpress.pipeline.data.render import (
    Normalize,
    Views,
    copy_crop_rows,
    render_views,
    resize_batched,
)
from questpress.pipeline.data.views import ViewPolicy, draw_crops, list_views
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tests.support.pictures import in_memory, pixels, smooth

PHOTOS = ViewPolicy("resized_crop")


def photos() -> DecodedImages:
    sizes = [(40, 60), (60, 40), (33, 33), (20, 90), (17, 16), (64, 48)]
    return decode_images(
        in_memory([smooth(n, *size) for n, size in enumerate(sizes)]), Canonical("short_side", 64)
    )


def small(count: int = 6, side: int = 12) -> DecodedImages:
    return decode_images(in_memory([pixels(n, side, side) for n in range(count)]), Canonical("fixed", side))


def views_of(decoded: DecodedImages, policy: ViewPolicy, size: Size, seed: int = 0) -> Views:
    return Views(torch.arange(len(decoded.images)), decoded.keys, policy, seed, size, decoded.pixels)


def resized_crop(image: Tensor, box: list[int], size: Size, flip: bool) -> Tensor:
    """Return torchvision's crop, computed in float and rounded."""
    top, left, height, width = box
    crop = image.permute(2, 0, 1).float()
    shape = list(height_width(size))
    view = functional.resized_crop(crop, top, left, height, width, shape, antialias=True)
    return (view.flip(-1) if flip else view).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("way", ["one by one", "by products"])
@pytest.mark.parametrize("size", [8, 24, 80, (30, 11)])
def test_resized_crops_match_torchvision_within_one_level(way: str, size: Size) -> None:
    done = photos()
    indices, box, flips = boxes_of(done, PHOTOS)
    if way == "by products":
        rendered = resize_batched(done.pixels, indices, box, flips, size)
    else:
        rendered, labels = views_of(done, PHOTOS, size).batch(indices, torch.arange(60))
        assert labels.equal(indices)
    assert rendered.shape == (60, 3, *height_width(size)) and rendered.dtype == torch.uint8
    for row, index, b, flip in zip(rendered, indices.tolist(), box.tolist(), flips.tolist(), strict=True):
        expected = resized_crop(done.pixels.image(index), b, size, flip)
        assert (row.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["zeros", "reflect", "edge"])
@pytest.mark.parametrize(("side", "crop", "pad"), [(12, 12, 3), (12, 8, 0), (12, 10, 4)])
def test_pad_and_crop_equals_torchvision_for_every_view(mode, side: int, crop: int, pad: int) -> None:
    done = small(2, side)
    policy = ViewPolicy("pad_crop", side=side, crop=crop, pad=pad, mode=mode)
    box, flips = list_views(policy)
    for index in range(2):
        indices = torch.full((len(box),), index)
        rendered = render_views(done.pixels, indices, box, flips, crop, policy)
        image = done.pixels.image(index).permute(2, 0, 1)
        padded = v2.functional.pad(image, [pad] * 4, padding_mode={"zeros": "constant"}.get(mode, mode))
        for row, (top, left, *_), flip in zip(rendered, box.tolist(), flips.tolist(), strict=True):
            expected = padded[:, top + pad : top + pad + crop, left + pad : left + pad + crop]
            assert row.equal(expected.flip(-1) if flip else expected)


@pytest.mark.parametrize(
    "policy", [PHOTOS, ViewPolicy("pad_crop", side=12, crop=12, pad=2), ViewPolicy("center")]
)
def test_view_is_independent_of_the_batch(policy: ViewPolicy) -> None:
    views = views_of(small() if policy.kind == "pad_crop" else photos(), policy, 12)
    indices, numbers = torch.arange(6).repeat(4), torch.arange(24)
    whole, _ = views.batch(indices, numbers)
    for n in (0, 7, 23):
        assert views.batch(indices[n : n + 1], numbers[n : n + 1])[0][0].equal(whole[n])
    order = torch.randperm(24)
    assert views.batch(indices[order], numbers[order])[0].equal(whole[order])


def test_view_is_independent_of_the_images_position() -> None:
    arrays = [smooth(n, 30, 40) for n in range(4)]
    here, there = (
        decode_images(in_memory(some), Canonical("short_side", 64)) for some in (arrays, arrays[::-1])
    )
    numbers = torch.tensor([3])
    first, _ = views_of(here, PHOTOS, 16).batch(torch.tensor([1]), numbers)
    second, _ = views_of(there, PHOTOS, 16).batch(torch.tensor([2]), numbers)
    assert first.equal(second)


@pytest.mark.parametrize("policy", [PHOTOS, ViewPolicy("pad_crop", side=32, crop=32, pad=4)])
def test_another_size_shows_the_same_crop(policy: ViewPolicy) -> None:
    if policy.kind == "pad_crop":
        done = decode_images(in_memory([smooth(n, 32, 32) for n in range(6)]), Canonical("fixed", 32))
    else:
        done = photos()
    views = views_of(done, policy, 32)
    indices, numbers = torch.arange(6).repeat(3), torch.arange(18)
    large, _ = views.batch(indices, numbers)
    little, _ = views.batch(indices, numbers, sizes=(16,))
    assert little.shape == (18, 3, 16, 16)
    reduced = functional.resize(large.float(), [16, 16], antialias=True)
    assert (reduced - little.float()).abs().mean() < 6


def test_whole_crop_at_its_own_size_is_the_image() -> None:
    done = small()
    box = torch.tensor([[0, 0, 12, 12]] * 6, dtype=torch.int32)
    for rendered in (
        render_views(done.pixels, torch.arange(6), box, torch.zeros(6, dtype=torch.bool), 12, PHOTOS),
        resize_batched(done.pixels, torch.arange(6), box, torch.zeros(6, dtype=torch.bool), 12),
    ):
        assert rendered.permute(0, 2, 3, 1).equal(done.pixels.stack())


def test_batches_are_channels_last_in_memory_and_may_be_empty() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    for policy, done in ((PHOTOS, photos()), (ViewPolicy("pad_crop", side=12, crop=12, pad=2), small())):
        views = views_of(done, policy, 12)
        batch, labels = views.batch(empty, empty)
        assert batch.shape == (0, 3, 12, 12) and labels.shape == (0,)
        batch, _ = views.batch(torch.arange(4), torch.arange(4))
        assert batch.is_contiguous(memory_format=torch.channels_last)
    box = torch.empty(0, 4, dtype=torch.int32)
    assert resize_batched(photos().pixels, empty, box, empty.bool(), 5).shape == (0, 3, 5, 5)


def test_normalize_equals_the_runtime() -> None:
    batch = torch.from_numpy(np.stack([pixels(n, 12, 12) for n in range(3)]))
    p = runtime.Preprocessing.create(12, 1.0)
    ours = Normalize(p.mean, p.std)(batch.permute(0, 3, 1, 2))
    np.testing.assert_array_equal(ours.numpy(), runtime.normalize(batch.numpy(), p))
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_color_jitter_matches_torchvision_in_a_fixed_order() -> None:
    images = torch.from_numpy(np.stack([smooth(n, 16, 16) for n in range(4)])).permute(0, 3, 1, 2)
    factors = torch.tensor([[1.0, 1.0, 1.0], [0.7, 1.3, 0.6], [1.4, 0.6, 1.4], [0.6, 0.6, 0.6]])
    ours = jitter_colors(images, factors)
    assert ours[0].equal(images[0])
    for image, (brightness, contrast, saturation), got in zip(images, factors.tolist(), ours, strict=True):
        expected = functional.adjust_brightness(image.float() / 255, brightness)
        expected = functional.adjust_contrast(expected, contrast)
        expected = functional.adjust_saturation(expected, saturation)
        assert (got.float() - expected * 255).abs().max() <= 1


def boxes_of(done: DecodedImages, policy: ViewPolicy, count: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    indices = torch.arange(count) % len(done.images)
    sizes = done.pixels.heights[indices], done.pixels.widths[indices]
    return indices, *draw_crops(policy, 0, done.keys[indices], torch.arange(count), *sizes)


def test_large_crops_are_resized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    done = photos()
    indices, box, flips = boxes_of(done, PHOTOS)
    whole = resize_batched(done.pixels, indices, box, flips, 24)
    taken: list[int] = []
    products = render._resize_chunk

    def record(data: Tensor, numbers: Sequence[Tensor], tallest: int, widest: int, size: int) -> Tensor:
        taken.append(len(numbers[0]) * tallest * widest)
        return products(data, numbers, tallest, widest, size)

    monkeypatch.setattr(render, "_resize_chunk", record)
    monkeypatch.setattr(render, "MAX_BATCH_PIXELS", 50_000)
    pieces = resize_batched(done.pixels, indices, box, flips, 24)
    assert len(taken) > 1 and max(taken) <= 50_000
    assert (pieces.int() - whole.int()).abs().max() <= 1
    monkeypatch.setattr(render, "MAX_BATCH_PIXELS", 1)
    assert resize_batched(done.pixels, indices, box, flips, 24).shape == whole.shape


@pytest.mark.parametrize(
    "policy", [PHOTOS, ViewPolicy("center"), ViewPolicy("pad_crop", side=12, crop=12, pad=3, mode="reflect")]
)
def test_rows_copied_from_the_host_give_the_same_crops(policy: ViewPolicy) -> None:
    done = small() if policy.kind == "pad_crop" else photos()
    indices, box, flips = boxes_of(done, policy)
    there, among, moved = copy_crop_rows(done.pixels, indices, box, policy, torch.device("cpu"))
    assert len(there) == 60
    expected = render_views(done.pixels, indices, box, flips, 12, policy)
    assert render_views(there, among, moved, flips, 12, policy).equal(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("resident", ["device", "host"])
def test_gpu_batches_are_prefetched_without_synchronization(resident: str) -> None:
    policy = ViewPolicy("resized_crop", color_jitter=0.4)
    done = photos()
    pixels = done.pixels.to("cuda") if resident == "device" else done.pixels
    views = Views(done.labels, done.keys, policy, 0, 16, pixels)
    here = Views(done.labels, done.keys, policy, 0, 16, done.pixels)
    plan = [(torch.arange(6).repeat(8), torch.arange(48) + 48 * n) for n in range(5)]
    list(views.batches(plan[:1], "cuda"))  # initialization may synchronize
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(views.batches(plan, "cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (ours, _), (theirs, _) in zip(here.batches(plan), batches, strict=True):
        assert (ours.int() - theirs.cpu().int()).abs().max() <= 3  # jitter may double a level


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_gpu_views_match_the_cpu() -> None:
    padded = ViewPolicy("pad_crop", side=12, crop=12, pad=2)
    strong = replace(padded, randaugment=(3, 25), erasing=0.5, cutmix=1.0)
    for policy, done in ((PHOTOS, photos()), (padded, small()), (strong, small())):
        here = views_of(done, policy, 12)
        there = Views(here.labels, here.keys, policy, 0, 12, done.pixels.to("cuda"))
        indices, numbers = torch.arange(6).repeat(80), torch.arange(480)
        ours, _ = here.batch(indices, numbers)
        theirs, labels = there.batch(indices, numbers, "cuda")
        assert theirs.device.type == labels.device.type == "cuda"
        assert (ours.int() - theirs.cpu().int()).abs().max() <= (0 if policy.kind == "pad_crop" else 1)
