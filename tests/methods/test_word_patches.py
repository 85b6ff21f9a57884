import base64
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from questpress.pipeline.methods.quest.patches import (
    PATCHES,
    WORDS,
    images_to_see,
    patch_side,
    patches_facts,
    shown_words,
)
from questpress.pipeline.methods.quest.vocabulary import usage_facts

GRID = (4, 4)
SIZE = 32


def opened(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


@pytest.fixture(scope="module")
def facts() -> dict:
    """Twenty images whose sixteen cells are grey in steps of ten, in another order in each; a feature is its
    cell's grey, and the words are these greys.
    """
    rng = np.random.default_rng(0)
    greys = np.stack([rng.permutation(16) for _ in range(20)]) * 10
    cells = greys.reshape(20, 4, 4)
    pixels = np.repeat(np.repeat(cells, 8, axis=1), 8, axis=2)[..., None].repeat(3, 3).astype(np.uint8)
    maps = torch.from_numpy(cells).float()[:, None]
    words = torch.arange(16).float()[:, None] * 10
    usage = torch.arange(16)
    seen = [(pixels[:7], {"map": maps[:7]}), (pixels[7:], {"map": maps[7:]})]
    return patches_facts(seen, "map", GRID, words, usage)


def test_patches_show_the_positions_whose_features_are_nearest_to_the_word(facts: dict) -> None:
    for one in facts["shown"]:
        # The most used word is the last: 150.
        grey = 150 - 10 * (one["rank"] - 1)
        for patch in one["patches"]:
            middle = opened(patch)[20:28, 20:28]
            at_the_border = np.abs(opened(patch).astype(int) - grey).min() <= 2
            assert np.abs(middle.astype(int) - grey).max() <= 2 or at_the_border


def test_words_are_spread_from_the_most_used_to_the_rarest(facts: dict) -> None:
    ranks = [one["rank"] for one in facts["shown"]]
    assert len(ranks) == WORDS and ranks[0] == 1 and ranks[-1] == 16
    assert ranks == sorted(ranks)
    assert abs(facts["shown"][0]["share"] - 100 * 15 / 120) < 1e-9


def test_a_word_is_shown_by_patches_of_different_images(facts: dict) -> None:
    assert all(len(one["patches"]) == PATCHES for one in facts["shown"])
    assert facts["seen"] == 20 and facts["patch"] == 16


def test_a_word_that_is_nearest_in_few_images_has_fewer_patches() -> None:
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    maps = torch.tensor([[[[0.0]]], [[[1.0]]]])
    facts = patches_facts([(pixels, {"map": maps})], "map", (1, 1), torch.tensor([[0.0], [1.0]]), None)
    assert [(one["rank"], one["share"], len(one["patches"])) for one in facts["shown"]] == [
        (1, 50.0, 1),
        (2, 50.0, 1),
    ]


def test_the_same_images_give_the_same_patches() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    maps, words = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.eye(3)
    both = [patches_facts([(pixels, {"map": maps})], "map", (2, 2), words, None) for _ in range(2)]
    assert both[0] == both[1]


def test_without_images_nothing_is_shown() -> None:
    assert patches_facts([], "map", GRID, torch.zeros(2, 1), None) == {}


def test_a_patch_shows_two_cells_or_a_third_to_a_half_of_the_image() -> None:
    assert patch_side(224, (7, 7)) == 75
    assert patch_side(64, (1, 1)) == 64
    assert patch_side(64, (2, 2)) == 32
    assert patch_side(60, (5, 5)) == 24
    assert patch_side(32, (8, 8)) == 11
    assert patch_side(60, (4, 4)) == 30


def test_few_images_are_looked_at_where_maps_are_large() -> None:
    assert images_to_see((7, 7)) == 256
    assert images_to_see((56, 56)) == 4
    assert images_to_see((1000, 1000)) == 1


def test_usage_is_told_in_falling_order_with_the_words_nobody_uses() -> None:
    facts = usage_facts(torch.tensor([3, 0, 9, 0, 1]))
    assert facts == {"usage": [(1, 9), (2, 3), (3, 1), (4, 0), (5, 0)], "dead": 2}
    long = usage_facts(torch.arange(4096))
    assert len(long["usage"]) == 64 and long["usage"][0] == (1, 4095) and long["usage"][-1] == (4096, 0)
    assert usage_facts(None) == {}


def test_what_was_seen_once_is_not_looked_for_again(tmp_path: Path) -> None:
    looks, keys = [], []

    def seen(t: int, reads: frozenset[str], most: int):
        looks.append((t, reads, most))
        pixels = np.zeros((2, 8, 8, 3), np.uint8)
        return [(pixels, {"map": torch.tensor([[[[0.0]]], [[[1.0]]]])})]

    def shared(t: int, kind: str, key: dict, write: Callable[[Path], None]) -> Path:
        folder = tmp_path / f"{t}.{kind}"
        if not folder.exists():
            folder.mkdir()
            write(folder)
        keys.append(key)
        return folder

    preparation = SimpleNamespace(seen=seen, shared=shared)
    words = torch.tensor([[0.0], [1.0]])
    both = [shown_words(preparation, 0, "map", (1, 1), words, None) for _ in range(2)]
    assert looks == [(0, frozenset({"map"}), 256)]
    assert both[0] == both[1] and len(both[0]["shown"]) == 2
    shown_words(preparation, 1, "map", (1, 1), words + 1, None)
    assert keys[0] == keys[1] != keys[2]
    assert shown_words(SimpleNamespace(seen=None), 0, "map", (1, 1), words, None) == {}
