"""RandAugment's operations against torchvision's, random erasing, and how both are drawn."""

import math

import numpy as np
import pytest
import torch
from questpress.pipeline.config.options import Options
from questpress.pipeline.data.augment import (
    ERASED_COLOR,
    OPERATIONS,
    apply_changes,
    augment,
    draw_changes,
    erase,
)
from questpress.pipeline.data.render import Views
from questpress.pipeline.data.views import ViewPolicy
from torch import Tensor
from torchvision.transforms.v2 import functional

from tests.data.test_render import photos, small, views_of
from tests.support.pictures import smooth

TALL, WIDE = 24, 36
STRENGTH = 21
PART = STRENGTH / 30
IMAGES = torch.from_numpy(np.stack([smooth(n, TALL, WIDE) for n in range(5)])).permute(0, 3, 1, 2)
STRONG = ViewPolicy("center", randaugment=(2, 20), erasing=0.5)


def torchvisions(image: Tensor, name: str, sign: int) -> Tensor:
    def shear(x: float, y: float) -> Tensor:
        degrees = [math.degrees(math.atan(sign * 0.3 * PART * part)) for part in (x, y)]
        return functional.affine(image, 0.0, [0, 0], 1.0, degrees, center=[0, 0])

    def shift(x: float, y: float) -> Tensor:
        pixels = [int(sign * 150 / 331 * PART * side) for side in (x * WIDE, y * TALL)]
        return functional.affine(image, 0.0, pixels, 1.0, [0.0, 0.0])

    factor = 1 + sign * 0.9 * PART
    operations = {
        "identity": lambda: image,
        "shear_x": lambda: shear(1, 0),
        "shear_y": lambda: shear(0, 1),
        "translate_x": lambda: shift(1, 0),
        "translate_y": lambda: shift(0, 1),
        "rotate": lambda: functional.rotate(image, sign * 30 * PART),
        "brightness": lambda: functional.adjust_brightness(image, factor),
        "color": lambda: functional.adjust_saturation(image, factor),
        "contrast": lambda: functional.adjust_contrast(image, factor),
        "sharpness": lambda: functional.adjust_sharpness(image, factor),
        "posterize": lambda: functional.posterize(image, 8 - round(4 * PART)),
        "solarize": lambda: functional.solarize(image, 255 * (1 - PART)),
        "auto_contrast": lambda: functional.autocontrast(image),
        "equalize": lambda: functional.equalize(image),
    }
    result: Tensor = operations[name]()
    return result


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvisions(name: str, sign: int) -> None:
    count = len(IMAGES)
    ours = augment(IMAGES, torch.full((count,), OPERATIONS.index(name)), torch.full((count,), sign), STRENGTH)
    theirs = torch.stack([torchvisions(image, name, sign) for image in IMAGES])
    difference = (ours.int() - theirs.int()).abs()
    # Positions in the middle between two pixels may be rounded either way.
    is_moved = name in ("shear_x", "shear_y", "rotate")
    assert (difference > 2).float().mean() <= (0.01 if is_moved else 0)
    assert name == "identity" or not ours.equal(IMAGES)


def test_constant_images_are_neither_stretched_nor_equalized() -> None:
    flat = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    numbers = torch.tensor([OPERATIONS.index(name) for name in ("auto_contrast", "equalize")])
    assert augment(flat, numbers, torch.ones(2), 9).equal(flat)


def test_operations_of_a_batch_are_those_of_each_image() -> None:
    numbers, signs = torch.arange(14), torch.tensor([1, -1]).repeat(7)
    images = IMAGES[torch.arange(14) % len(IMAGES)].contiguous(memory_format=torch.channels_last)
    whole = augment(images, numbers, signs, 17)
    rows = [slice(n, n + 1) for n in range(14)]
    assert whole.equal(torch.cat([augment(images[r], numbers[r], signs[r], 17) for r in rows]))
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_erased_rectangles_have_the_mean_color() -> None:
    views = torch.zeros(2, 3, 20, 30, dtype=torch.uint8)
    erased = erase(views, torch.tensor([[0.25, 0.5, 0.5, 0.1], [0.9, 0.9, 0.0, 0.1]]))
    expected = views.clone()
    expected[0, :, 5:15, 15:18] = torch.tensor(ERASED_COLOR, dtype=torch.uint8)[:, None, None]
    assert erased.equal(expected)


def test_changes_follow_their_probabilities() -> None:
    keys, policy = torch.arange(4000), ViewPolicy("center", randaugment=(2, 9), erasing=0.3)
    changes = draw_changes(policy, 0, keys, torch.zeros_like(keys))
    assert changes is not None and changes.shape == (4000, 8)
    for column in (0, 2):
        counts = changes[:, column].long().bincount(minlength=14)
        assert len(counts) == 14 and (counts - 4000 / 14).abs().max() < 5 * (4000 / 14) ** 0.5
        assert changes[:, column + 1].abs().eq(1).all() and changes[:, column + 1].mean().abs() < 0.08
    assert not changes[:, 0].equal(changes[:, 2])
    top, left, height, width = changes[:, 4:].unbind(1)
    is_erased = height > 0
    assert abs(is_erased.float().mean() - 0.3) < 0.04
    area = (height * width)[is_erased]
    assert area.min() > 0.01 and area.max() <= 0.4001 and 0.19 < area.mean() < 0.22
    assert (top + height).max() <= 1.0001 and (left + width).max() <= 1.0001 and top.min() >= 0


def test_strong_views_depend_on_seed_image_and_view_alone() -> None:
    views, indices, numbers = views_of(photos(), STRONG, 12), torch.arange(6), torch.arange(6)
    whole, _ = views.batch(indices, numbers)
    for n in range(6):
        assert views.batch(indices[n : n + 1], numbers[n : n + 1])[0][0].equal(whole[n])
    assert not views.batch(indices, numbers + 6)[0].equal(whole)
    assert not views_of(photos(), STRONG, 12, seed=1).batch(indices, numbers)[0].equal(whole)


def test_weak_views_have_no_changes_and_strong_ones_are_not_counted() -> None:
    keys = torch.arange(3)
    assert draw_changes(ViewPolicy("center"), 0, keys, keys) is None
    assert ViewPolicy("center").count == 2 and STRONG.count is None
    jittered = ViewPolicy("center", color_jitter=0.3, erasing=1.0)
    changes = draw_changes(jittered, 0, keys, keys)
    assert changes is not None and not apply_changes(IMAGES[:3], changes, jittered).equal(IMAGES[:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_gpu_views_equal_the_cpus() -> None:
    policy = ViewPolicy("pad_crop", side=12, crop=12, pad=2, randaugment=(3, 25), erasing=0.5)
    here, plan = views_of(small(), policy, 12), (torch.arange(6).repeat(80), torch.arange(480))
    there = Views(here.labels, here.keys, policy, 0, 12, here.pixels.to("cuda"))
    assert there.batch(*plan, "cuda")[0].cpu().equal(here.batch(*plan)[0])


@pytest.mark.parametrize("value", ["2", "2,31", "0,9", "9,9", "a,9", "2,9,5", [2.5, 9], 3])
def test_invalid_randaugment_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be N,M"):
        Options(teacher=["a"], student="b", randaugment=value)
    assert Options(teacher=["a"], student="b", randaugment="2,9").randaugment == [2, 9]
