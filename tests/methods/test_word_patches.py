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
    count_images,
    find_patches,
    patch_side,
    select_patches,
)
from questpress.pipeline.methods.quest.vocabulary import summarize_usage

GRID = (4, 4)
SIZE = 32


def opened(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


@pytest.fixture(scope="module")
def facts() -> dict:
    """Twenty images of sixteen gray cells, shuffled; the features and the words are the gray values."""
    rng = np.random.default_rng(0)
    grays = np.stack([rng.permutation(16) for _ in range(20)]) * 10
    cells = grays.reshape(20, 4, 4)
    pixels = np.repeat(np.repeat(cells, 8, axis=1), 8, axis=2)[..., None].repeat(3, 3).astype(np.uint8)
    maps = torch.from_numpy(cells).float()[:, None]
    words = torch.arange(16).float()[:, None] * 10
    usage = torch.arange(16)
    seen = [(pixels[:7], {"map": maps[:7]}), (pixels[7:], {"map": maps[7:]})]
    return find_patches(seen, "map", GRID, words, usage)


def test_patches_show_the_positions_whose_features_are_nearest_to_the_word(facts: dict) -> None:
    for word in facts["shown"]:
        # The most used word is the last: 150.
        gray = 150 - 10 * (word["rank"] - 1)
        for patch in word["patches"]:
            middle = opened(patch)[20:28, 20:28]
            at_the_border = np.abs(opened(patch).astype(int) - gray).min() <= 2
            assert np.abs(middle.astype(int) - gray).max() <= 2 or at_the_border


def test_words_are_spread_from_the_most_used_to_the_rarest(facts: dict) -> None:
    ranks = [word["rank"] for word in facts["shown"]]
    assert len(ranks) == WORDS and ranks[0] == 1 and ranks[-1] == 16
    assert ranks == sorted(ranks)
    assert abs(facts["shown"][0]["share"] - 100 * 15 / 120) < 1e-9


def test_word_is_shown_by_patches_of_different_images(facts: dict) -> None:
    assert all(len(word["patches"]) == PATCHES for word in facts["shown"])
    assert facts["seen"] == 20 and facts["patch"] == 16


def test_word_that_is_nearest_in_few_images_has_fewer_patches() -> None:
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    maps = torch.tensor([[[[0.0]]], [[[1.0]]]])
    facts = find_patches(
        [(pixels, {"map": maps})], "map", (1, 1), torch.tensor([[0.0], [1.0]]), torch.tensor([1, 1])
    )
    assert [(word["rank"], word["share"], len(word["patches"])) for word in facts["shown"]] == [
        (1, 50.0, 1),
        (2, 50.0, 1),
    ]


def test_without_images_nothing_is_shown() -> None:
    assert find_patches([], "map", GRID, torch.zeros(2, 1), torch.zeros(2)) == {}


def test_patch_shows_two_cells_or_a_third_to_a_half_of_the_image() -> None:
    assert patch_side((224, 224), (7, 7)) == 75
    assert patch_side((64, 64), (1, 1)) == 64
    assert patch_side((64, 64), (2, 2)) == 32
    assert patch_side((60, 60), (5, 5)) == 24
    assert patch_side((32, 32), (8, 8)) == 11
    assert patch_side((60, 60), (4, 4)) == 30
    assert patch_side((96, 36), (3, 2)) == 32
    assert patch_side((96, 36), (1, 1)) == 36


def test_large_maps_use_fewer_images() -> None:
    assert count_images((7, 7)) == 256
    assert count_images((56, 56)) == 4
    assert count_images((1000, 1000)) == 1


def test_usage_is_sorted_with_unused_words_last() -> None:
    facts = summarize_usage(torch.tensor([3, 0, 9, 0, 1]))
    assert facts == {"usage": [(1, 9), (2, 3), (3, 1), (4, 0), (5, 0)], "dead": 2}
    long = summarize_usage(torch.arange(4096))
    assert len(long["usage"]) == 64 and long["usage"][0] == (1, 4095) and long["usage"][-1] == (4096, 0)


def test_patches_are_computed_once(tmp_path: Path) -> None:
    calls, keys = [], []

    def sample(t: int, reads: frozenset[str], limit: int):
        calls.append((t, reads, limit))
        pixels = np.zeros((2, 8, 8, 3), np.uint8)
        return [(pixels, {"map": torch.tensor([[[[0.0]]], [[[1.0]]]])})]

    def cached(t: int, kind: str, key: dict, write: Callable[[Path], None]) -> Path:
        folder = tmp_path / f"{t}.{kind}"
        if not folder.exists():
            folder.mkdir()
            write(folder)
        keys.append(key)
        return folder

    context = SimpleNamespace(sample=sample, cached=cached)
    words = torch.tensor([[0.0], [1.0]])
    vocabulary = SimpleNamespace(words=words, usage=torch.tensor([2, 1]))
    both = [select_patches(context, 0, "map", (1, 1), vocabulary) for _ in range(2)]
    assert calls == [(0, frozenset({"map"}), 256)]
    assert both[0] == both[1] and len(both[0]["shown"]) == 2
    other = SimpleNamespace(words=words + 1, usage=vocabulary.usage)
    select_patches(context, 1, "map", (1, 1), other)
    assert keys[0] == keys[1] != keys[2]
    assert select_patches(SimpleNamespace(sample=None), 0, "map", (1, 1), vocabulary) == {}
