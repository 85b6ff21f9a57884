"""The views of an epoch: new ones, fixed ones in turn, or all of them."""

import numpy as np
import pytest
import torch
from questpress.pipeline.data.render import Views, pack_pixels
from questpress.pipeline.data.views import FIRST_LISTED, FIXED_SEED, ViewPolicy, ViewSchedule

SIDE, COUNT = 8, 40
PAD = ViewPolicy("pad_crop", side=SIDE, crop=SIDE, pad=2, flip=True)  # 5 · 5 · 2 = 50 views
KEYS = torch.from_numpy(np.random.default_rng(0).integers(0, 2**63 - 1, COUNT))


def shown(schedule: ViewSchedule, epoch: int) -> torch.Tensor:
    """The pixels of every image in an epoch."""
    data = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (COUNT * SIDE * SIDE, 3), np.uint8))
    pixels = pack_pixels(data, torch.full((COUNT, 2), SIDE))
    labels = torch.zeros(COUNT, dtype=torch.int64)
    views = Views(labels, KEYS, schedule.policy, schedule.view_seed, SIDE, pixels)
    return views.batch(torch.arange(COUNT), schedule.numbers(KEYS, epoch))[0]


def test_views_differ_by_epoch_and_seed_without_fixed_views():
    one, other = ViewSchedule(PAD, seed=3), ViewSchedule(PAD, seed=4)
    assert not torch.equal(shown(one, 0), shown(one, 1))
    assert not torch.equal(shown(one, 0), shown(other, 0))
    assert one.epoch_views(7) == range(7, 8) and one.all_views(9) == range(9)


def test_fixed_views_repeat_and_are_equal_for_all_seeds():
    one, other = ViewSchedule(PAD, seed=3, views=4), ViewSchedule(PAD, seed=9, views=4)
    epochs = [shown(one, epoch) for epoch in range(4)]
    for epoch in range(12):
        assert torch.equal(shown(one, epoch), epochs[epoch % 4])
        assert torch.equal(shown(other, epoch), epochs[epoch % 4])
        assert set(one.numbers(KEYS, epoch).tolist()) == set(one.epoch_views(epoch)) == {epoch % 4}
    assert not torch.equal(epochs[0], epochs[1])
    assert one.all_views(3) == range(3) and one.all_views(100) == range(4)
    assert one.view_seed == FIXED_SEED and not one.covers_all


@pytest.mark.parametrize("views", [50, 1000])
def test_training_on_all_cached_views_equals_online_views(views):
    cached, online = ViewSchedule(PAD, seed=5, views=views), ViewSchedule(PAD, seed=5)
    assert cached.covers_all
    for epoch in (0, 1, 17, 300):
        assert torch.equal(shown(cached, epoch), shown(online, epoch))
        assert set(cached.numbers(KEYS, epoch).tolist()) <= set(cached.epoch_views(epoch))
    epochs = torch.arange(COUNT)
    assert cached.numbers(KEYS, epochs)[9] == cached.numbers(KEYS, 9)[9]
    assert len(cached.epoch_views(0)) == len(cached.all_views(2)) == 50
    assert cached.epoch_views(0)[0] == FIRST_LISTED


@pytest.mark.parametrize(
    "policy",
    [
        ViewPolicy("pad_crop", side=SIDE, crop=SIDE, pad=2, color_jitter=0.1),
        ViewPolicy("resized_crop"),
        ViewPolicy("pad_crop", side=SIDE, crop=SIDE, pad=3),  # 98
    ],
)
def test_fewer_views_do_not_cover_all(policy):
    schedule = ViewSchedule(policy, seed=5, views=50)
    assert not schedule.covers_all and schedule.all_views(1000) == range(50)


def test_single_view_is_cached_once():
    schedule = ViewSchedule(ViewPolicy("center", flip=False), seed=1, views=50)
    assert schedule.all_views(60) == range(1)
    for epoch in range(3):
        assert set(schedule.numbers(KEYS, epoch).tolist()) == set(schedule.epoch_views(epoch)) == {0}
