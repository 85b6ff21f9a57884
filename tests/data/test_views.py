import numpy as np
import pytest
import torch
from questpress.pipeline.data.views import (
    ViewPolicy,
    below,
    draw_color_factors,
    draw_crops,
    draw_endless_order,
    draw_order,
    list_views,
    philox,
    random_words,
    to_listed_numbers,
    uniform,
)
from torch import Tensor
from torchvision.transforms import v2

CIFAR = ViewPolicy("pad_crop", side=32, crop=32, pad=4, mode="reflect")
PHOTOS = ViewPolicy("resized_crop")


def keys_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def draw(policy: ViewPolicy, keys: Tensor, views: Tensor, height: int = 32, width: int = 32, seed: int = 0):
    return draw_crops(policy, seed, keys, views, torch.full_like(keys, height), torch.full_like(keys, width))


# Random123's kat_vectors for philox4x32 with 10 rounds
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_matches_the_published_vectors(counter, key, expected) -> None:
    assert tuple(int(word) for word in philox(counter, key)) == expected


def chi_squared(values: Tensor, bins: int) -> float:
    """Standard deviations from what independent uniform values would give."""
    counts = torch.bincount(values, minlength=bins).double()
    expected = len(values) / bins
    return float((((counts - expected) ** 2 / expected).sum() - (bins - 1)) / (2 * (bins - 1)) ** 0.5)


@pytest.mark.parametrize("varied", ["keys", "views", "seed", "draw"])
def test_bits_are_uniform_and_independent_along_every_argument(varied: str) -> None:
    count = 20000
    steps = torch.arange(count)
    key, zero = torch.tensor([12345]), torch.zeros(1, dtype=torch.int64)
    if varied == "seed":
        drawn = torch.stack([torch.cat(random_words(seed, key, zero, 0)) for seed in range(2000)], 1)
    else:
        arguments = {"keys": key, "views": zero, "draw": zero} | {varied: steps}  # consecutive: the hard case
        drawn = torch.stack(list(random_words(7, arguments["keys"], arguments["views"], arguments["draw"])))
    for word in drawn:
        assert abs(chi_squared(below(word, 64), 64)) < 5
        assert abs(chi_squared(word & 63, 64)) < 5
        pairs = below(word[:-1], 16) * 16 + below(word[1:], 16)
        assert abs(chi_squared(pairs[::2], 256)) < 5
    assert abs(chi_squared(below(drawn[0], 16) * 16 + below(drawn[1], 16), 256)) < 5


def test_uniform_and_below_stay_in_their_range() -> None:
    ends = torch.tensor([0, 2**32 - 1])
    assert uniform(ends).tolist() == [0.0, 1 - 2.0**-24]
    assert below(ends, 10).tolist() == [0, 9]
    assert below(ends, 2**31).tolist() == [0, 2**31 - 1]


def test_seed_image_and_view_number_each_change_the_view() -> None:
    keys, views = keys_of(200), torch.zeros(200, dtype=torch.int64)
    first = draw(PHOTOS, keys, views)[0]
    for other in (
        draw(PHOTOS, keys, views + 1)[0],
        draw(PHOTOS, keys, views, seed=1)[0],
        draw(PHOTOS, keys, views, seed=1 << 40)[0],
        draw(PHOTOS, keys ^ 1, views)[0],
        draw(PHOTOS, keys ^ (1 << 62), views)[0],
    ):
        assert (first != other).any(1).float().mean() > 0.95


def test_views_are_the_same_in_every_release() -> None:
    keys, views = torch.tensor([1, 2**62 + 12345]), torch.tensor([0, 99])
    box, flips = draw(PHOTOS, keys, views, 144, 192, seed=42)
    assert (box.tolist(), flips.tolist()) == ([[10, 70, 76, 70], [61, 122, 56, 56]], [True, True])
    box, flips = draw(CIFAR, keys, views, seed=42)
    assert (box.tolist(), flips.tolist()) == ([[4, -2, 32, 32], [-4, 0, 32, 32]], [True, True])
    assert draw_order(42, 3, torch.arange(8)).tolist() == [2, 0, 5, 1, 3, 7, 6, 4]


def test_all_162_views_of_pad_4_crop_and_flip_come_equally_often() -> None:
    assert CIFAR.count == 162
    box, flips = draw(CIFAR, keys_of(162 * 200), torch.zeros(162 * 200, dtype=torch.int64))
    assert box[:, :2].min() == -4 and box[:, :2].max() == 4 and (box[:, 2:] == 32).all()
    place = ((box[:, 0] + 4) * 9 + box[:, 1] + 4).long() * 2 + flips
    assert abs(chi_squared(place, 162)) < 5
    listed, listed_flips = list_views(CIFAR)
    assert len(listed) == 162
    assert len({(*b, f) for b, f in zip(listed.tolist(), listed_flips.tolist(), strict=True)}) == 162
    drawn = {(*b, f) for b, f in zip(box.tolist(), flips.tolist(), strict=True)}
    assert drawn == {(*b, f) for b, f in zip(listed.tolist(), listed_flips.tolist(), strict=True)}


def test_pad_crops_of_rectangles_move_along_both_axes() -> None:
    policy = ViewPolicy("pad_crop", side=(20, 10), crop=(16, 8), pad=1)
    assert policy.count == 7 * 5 * 2
    keys = keys_of(2000)
    box, flips = draw(policy, keys, torch.zeros_like(keys), 20, 10)
    assert box.amin(0).tolist() == [-1, -1, 16, 8] and box.amax(0).tolist() == [5, 3, 16, 8]
    numbers = to_listed_numbers(policy, 0, keys, torch.zeros_like(keys))
    again, mirrored = draw(policy, keys, numbers, 20, 10)
    assert again.equal(box) and mirrored.equal(flips) and len(numbers.unique()) == 70


def test_crops_have_the_shape_of_the_views() -> None:
    keys = keys_of(500)
    wide = ViewPolicy("center", aspect=3.0)
    assert draw(wide, keys, keys * 0, 60, 90)[0][0].tolist() == [15, 0, 30, 90]
    box = draw(ViewPolicy("resized_crop", aspect=3.0), keys, keys * 0, 300, 900)[0].double()
    aspects = box[:, 3] / box[:, 2]
    assert 3 * 0.74 < aspects.min() < 2.4 and 3.8 < aspects.max() < 3 * 1.35


def test_view_count_is_none_for_unlimited_views() -> None:
    assert ViewPolicy("pad_crop", side=40, crop=32, flip=False).count == 81
    assert ViewPolicy("center").count == 2 and ViewPolicy("center", flip=False).count == 1
    assert PHOTOS.count is None


def test_resized_crops_have_torchvisions_distribution() -> None:
    count, height, width = 4000, 144, 192
    box, flips = draw(PHOTOS, keys_of(count), torch.zeros(count, dtype=torch.int64), height, width)
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(224)
    image = torch.empty(3, height, width)
    params = [reference.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params])
    for ours, other in zip(box.numpy().T, theirs.T, strict=True):
        # two-sample Kolmogorov-Smirnov: 1.95 √(2/n) is exceeded once in a thousand times
        grid = np.arange(max(ours.max(), other.max()) + 1)
        distance = max(abs((ours <= g).mean() - (other <= g).mean()) for g in grid)
        assert distance < 1.95 * (2 / count) ** 0.5
    assert abs(flips.float().mean() - 0.5) < 0.04


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 400), (400, 1), (2, 3), (20, 500), (500, 20)])
def test_every_size_of_image_has_crops_inside_it(height: int, width: int) -> None:
    box, _ = draw(PHOTOS, keys_of(300), torch.arange(300), height, width)
    top, left, tall, wide = box.long().T
    assert (top >= 0).all() and (left >= 0).all() and (tall >= 1).all() and (wide >= 1).all()
    assert (top + tall <= height).all() and (left + wide <= width).all()


def test_ten_misses_give_torchvisions_center_crop() -> None:
    policy = ViewPolicy("resized_crop", scale=(1.0, 1.0), flip=False)
    for height, width in ((100, 400), (400, 100)):
        box, _ = draw(policy, keys_of(5), torch.arange(5), height, width)
        params = v2.RandomResizedCrop(8, scale=(1.0, 1.0)).make_params([torch.empty(3, height, width)])
        assert box.tolist() == [[params["top"], params["left"], params["height"], params["width"]]] * 5


def test_center_view_is_the_largest_square() -> None:
    box, flips = draw(ViewPolicy("center", flip=False), keys_of(2), torch.arange(2), 20, 31)
    assert box.tolist() == [[0, 5, 20, 20]] * 2 and not flips.any()


def test_pad_crop_refuses_images_of_another_size() -> None:
    with pytest.raises(ValueError, match="32 × 32"):
        draw(CIFAR, keys_of(3), torch.arange(3), 32, 33)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "pad_crop", "side": 8, "crop": 12, "pad": 1},
        {"kind": "pad_crop", "side": 4, "crop": 4, "pad": 4, "mode": "reflect"},
        {"kind": "resized_crop", "scale": (0.0, 1.0)},
        {"kind": "resized_crop", "ratio": (2.0, 1.0)},
        {"kind": "center", "color_jitter": 2.0},
    ],
)
def test_impossible_policy_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        ViewPolicy(**wrong)


def test_order_of_images_is_independent_of_other_images() -> None:
    keys = keys_of(500)
    order = draw_order(0, 1, keys)
    assert sorted(order.tolist()) == list(range(500))
    assert not order.equal(draw_order(0, 2, keys)) and not order.equal(draw_order(1, 1, keys))
    fewer = keys[100:]
    assert keys[order][torch.isin(keys[order], fewer)].equal(fewer[draw_order(0, 1, fewer)])
    assert draw_order(0, 1, torch.tensor([5, 5, 5])).tolist() == [0, 1, 2]


def test_endless_order_has_every_image_once_in_each_pass() -> None:
    keys = keys_of(7)
    order, passes = draw_endless_order(3, 0, 21, keys)
    assert passes.equal(torch.arange(3).repeat_interleave(7))
    assert order.equal(torch.cat([draw_order(3, number, keys) for number in range(3)]))
    for start in range(20):
        for end in range(start, 21):
            part, numbers = draw_endless_order(3, start, end, keys)
            assert part.equal(order[start:end]) and numbers.equal(passes[start:end])


def test_orders_of_two_epochs_are_uncorrelated() -> None:
    keys = keys_of(3000)
    ranks = [draw_order(0, epoch, keys).argsort().double() for epoch in range(3)]
    for a, b in ((0, 1), (1, 2)):
        assert abs(torch.corrcoef(torch.stack([ranks[a], ranks[b]]))[0, 1]) < 5 / 3000**0.5


def test_jitter_factors_lie_around_one() -> None:
    factors = draw_color_factors(ViewPolicy("center", color_jitter=0.4), 0, keys_of(2000), torch.arange(2000))
    assert factors.shape == (2000, 3)
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() < 1.4
    assert abs(factors.mean() - 1) < 0.02
