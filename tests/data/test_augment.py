"""RandAugment against torchvision, mixup and CutMix against timm, random erasing, and how they are drawn."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from questpress.pipeline.config.options import Options
from questpress.pipeline.data.augment import (
    ERASED_COLOR,
    OPERATIONS,
    _reference,
    apply_changes,
    augment,
    draw_changes,
    draw_mixes,
    erase,
    mix,
    mix_labels,
    mixing_ratios,
)
from questpress.pipeline.data.views import ViewPolicy
from questpress.pipeline.tasks.classification import Classification
from scipy.stats import beta
from timm.data import mixup as timm_mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torchvision.transforms.v2 import functional

from tests.data.test_render import photos, small, views_of
from tests.support.pictures import smooth

TALL, WIDE = 24, 36
STRENGTH = 21
PART = STRENGTH / 30
IMAGES = torch.from_numpy(np.stack([smooth(n, TALL, WIDE) for n in range(5)])).permute(0, 3, 1, 2)
STRONG = ViewPolicy("center", color_jitter=0.4, randaugment=(2, 20), erasing=0.5, mixup=1.0, cutmix=1.0)


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


def test_contrast_blends_with_the_mean_gray_in_256ths() -> None:
    gray, mean = (_reference(IMAGES, name) for name in ("color", "contrast"))
    expected = [round(Fraction(256 * int(image.sum()), TALL * WIDE)) for image in gray]
    assert (256 * mean).flatten().tolist() == expected


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


@pytest.mark.parametrize("aspect", [1.0, 36 / 96, 3.0])
def test_changes_follow_their_probabilities(aspect: float) -> None:
    keys, policy = torch.arange(4000), ViewPolicy("center", randaugment=(2, 9), erasing=0.3, aspect=aspect)
    changes = draw_changes(policy, 0, keys, torch.zeros_like(keys))
    assert changes.shape == (4000, 8)
    for column in (0, 2):
        counts = changes[:, column].long().bincount(minlength=14)
        assert len(counts) == 14 and (counts - 4000 / 14).abs().max() < 5 * (4000 / 14) ** 0.5
        assert changes[:, column + 1].abs().eq(1).all() and changes[:, column + 1].mean().abs() < 0.08
    assert not changes[:, 0].equal(changes[:, 2])
    top, left, height, width = changes[:, 4:].unbind(1)
    is_erased = height > 0
    assert abs(is_erased.float().mean() - 0.3) < 0.04
    is_whole = is_erased & (height < 1) & (width < 1)
    area, ratio = (height * width)[is_erased], (height / width / aspect)[is_whole]
    assert area.min() > 0.01 and area.max() <= 0.4001 and 0.19 < area.mean() < 0.22
    assert 0.299 < ratio.min() < 0.33 and 3 < ratio.max() < 3.34, "in pixels"
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
    assert draw_changes(ViewPolicy("center"), 0, keys, keys).shape == (3, 0)
    assert ViewPolicy("center").count == 2 and STRONG.count is None
    assert ViewPolicy("center", mixup=0.2).count is None
    jittered = ViewPolicy("center", color_jitter=0.3, erasing=1.0)
    changes = draw_changes(jittered, 0, keys, keys)
    assert not apply_changes(IMAGES[:3], jittered, changes).equal(IMAGES[:3])


def test_mixup_is_timms() -> None:
    ratios = torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0]).mul(1 << 16).round() / (1 << 16)
    mixes = torch.cat([ratios[:, None], torch.zeros(5, 4)], 1)
    ours = mix(torch.cat([IMAGES, IMAGES.flip(0)]), mixes)
    pixels, lam = IMAGES.numpy().astype(np.float64), ratios.numpy()[:, None, None, None]
    np.testing.assert_array_equal(ours.numpy(), np.floor(pixels * lam + pixels[::-1] * (1 - lam) + 0.5))
    assert mixing_ratios(mixes, (TALL, WIDE)).equal(ratios)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    rows = [timm_mixup.mixup_target(labels, 4, lam=lam, smoothing=0.1)[n] for n, lam in enumerate(ratios)]
    expected = SoftTargetCrossEntropy()(logits, torch.stack(rows))
    pairs = mix_labels(labels, labels.flip(0), ratios)
    assert Classification().label_loss(0.1)(logits, pairs).item() == pytest.approx(expected.item(), rel=1e-5)
    assert Classification().main_labels(pairs).tolist() == [2, 2, 1, 2, 2]
    several = torch.eye(4)[labels]
    expected = torch.stack(
        [timm_mixup.mixup_target(several, 4, lam=lam, multi_label=True)[n] for n, lam in enumerate(ratios)]
    )
    assert mix_labels(several, several.flip(0), ratios).allclose(expected)


def test_rectangles_of_cutmix_are_timms_within_a_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, policy = torch.arange(500), ViewPolicy("center", cutmix=1.0)
    mixes, _ = draw_mixes(policy, 0, keys, keys, keys, 500, 500)
    assert mixes[:, 0].eq(1).all()
    views = torch.zeros(1000, 1, TALL, WIDE, dtype=torch.uint8)
    views[500:] = 1
    shown = mix(views, mixes)[:, 0]
    assert mixing_ratios(mixes, (TALL, WIDE)).allclose(1 - shown.float().mean((1, 2)))
    tops, lefts, bottoms, rights = mixes[:, 1:].double().numpy().T
    middle: list[int] = []
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: middle.pop())
    for n in range(0, 500, 7):
        inside = tops[n] > 0 and lefts[n] > 0 and bottoms[n] < 1 and rights[n] < 1
        if not inside:  # its center cannot be inferred
            continue
        middle += int((lefts[n] + rights[n]) / 2 * WIDE), int((tops[n] + bottoms[n]) / 2 * TALL)
        lam = 1 - (bottoms[n] - tops[n]) ** 2
        theirs = timm_mixup.rand_bbox((TALL, WIDE), lam)
        rows, columns = (shown[n].any(axis).nonzero()[:, 0] for axis in (1, 0))
        ours = [int(end) for x in (rows, columns) if len(x) for end in (x[0], x[-1] + 1)]
        assert all(abs(a - b) <= 1 for a, b in zip(ours, theirs, strict=False))


@pytest.mark.parametrize("parameter", [0.2, 1.0, 5.0])
def test_ratios_are_of_beta_and_partners_of_all_images(parameter: float) -> None:
    keys = torch.arange(6000)
    policy = ViewPolicy("center", mixup=parameter)
    indices = torch.arange(6000) % 10
    mixes, partners = draw_mixes(policy, 3, keys, keys, indices, 4, 10)
    ratios = mixes[:, 0].numpy()
    below = np.linspace(0.01, 0.99, 50)
    fractions = (ratios <= below[:, None]).mean(1)
    np.testing.assert_allclose(fractions, beta(parameter, parameter).cdf(below), atol=0.02)
    both, same = draw_mixes(replace(policy, cutmix=1.0), 3, keys, keys, indices, 4, 10)
    is_cut = both[:, 3] > 0
    assert 0.47 < is_cut.float().mean() < 0.53 and both[is_cut, 0].eq(1).all() and same.equal(partners)
    counts = [partners[indices == n].bincount(minlength=10) for n in (0, 9)]
    assert (counts[0][:4] > 100).all() and counts[0][4:].eq(0).all()
    assert (counts[1][4:] > 60).all() and counts[1][:4].eq(0).all()


def test_mixed_view_shows_the_views_of_image_and_partner() -> None:
    plain = ViewPolicy("pad_crop", side=12, crop=12, pad=2, randaugment=(2, 9))
    indices, numbers = torch.arange(6), torch.arange(6) + 40
    views = views_of(small(), replace(plain, mixup=1.0), 12)
    mixed, labels = replace(views, labels=torch.arange(3)).batch(indices, numbers)
    own, other, ratios = labels.unbind(1)
    assert own.tolist() == [0, 1, 2] and other.max() < 3, "the others have no labels"
    assert not views.batch(indices, numbers)[1][:, 1].equal(indices.float())
    numbers, mixed = numbers[:3], mixed[:3]
    first, second = (views_of(small(), plain, 12).batch(x.long(), numbers)[0].double() for x in (own, other))
    weights = ratios.double()[:, None, None, None]
    assert (first * weights + second * (1 - weights) - mixed).abs().max() <= 0.5 + 1e-9


@pytest.mark.parametrize("value", ["2", "2,31", "0,9", "9,9", "a,9", "2,9,5", [2.5, 9], 3])
def test_invalid_randaugment_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be N,M"):
        Options(teacher=["a"], student="b", randaugment=value)
    for text, parsed in (("2,9", [2, 9]), ("0", 0)):
        assert Options(teacher=["a"], student="b", randaugment=text).randaugment == parsed
