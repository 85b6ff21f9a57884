"""Image patches that illustrate visual words in the report: those whose features are nearest to a word."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...data.decode import encode_thumbnail
from ..base import Features, PrepareContext, positions
from .vocabulary import Vocabulary, hash_words, nearest_words

FILE, VERSION = "patches.json", 1
WORDS, PATCHES = 9, 6
SIDE = 48
"""Pixels of a patch in the report."""
MAX_IMAGES, MAX_POSITIONS = 256, 256 * 49
"""Limits that keep the search to a few seconds."""


def count_images(grid: tuple[int, int]) -> int:
    return max(1, min(MAX_IMAGES, MAX_POSITIONS // (grid[0] * grid[1])))


def select_patches(
    context: PrepareContext, teacher: int, level: str, grid: tuple[int, int], vocabulary: Vocabulary
) -> dict[str, Any]:
    """Return ``find_patches`` for a few images, from the cache if a run has computed it before."""
    sample = context.sample
    if sample is None:
        return {}
    limit = count_images(grid)

    def write(path: Path) -> None:
        images = sample(teacher, frozenset({level}), limit)
        facts = find_patches(images, level, grid, vocabulary.words, vocabulary.usage)
        (path / FILE).write_text(json.dumps(facts), encoding="utf-8")

    words = hash_words(vocabulary.words)
    key = {"version": VERSION, "level": level, "grid": list(grid), "limit": limit, "words": words}
    folder = context.cached(teacher, "patches", key, write)
    facts: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return facts


def find_patches(
    sample: Iterable[tuple[np.ndarray, Features]],
    level: str,
    grid: tuple[int, int],
    words: Tensor,
    usage: Tensor,
) -> dict[str, Any]:
    """Return words spread over their ranks by usage, each with its nearest patches, one per image.

    ``sample`` has rendered images uint8 [B,H,W,3] with the teacher's features, ``usage`` [K] the number of
    training features nearest to each of the ``words`` [K,C] of ``level``.
    """
    batches = [
        (pixels, positions(features[level].float(), grid).cpu().numpy()) for pixels, features in sample
    ]
    if not batches:
        return {}
    pixels, rows = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    distance, word = nearest_words(np.ascontiguousarray(rows), words.numpy())
    counts = usage.numpy()
    by_usage = np.argsort(-counts, kind="stable")
    rank = np.argsort(by_usage)
    places = grid[0] * grid[1]
    image = np.arange(len(rows)) // places
    shown = [
        {
            "rank": int(rank[chosen]) + 1,
            "share": float(100 * counts[chosen] / counts.sum()),
            "patches": [
                encode_thumbnail(_cut_patch(pixels[image[row]], row % places, grid), SIDE)
                for row in _nearest_rows(chosen, word, distance, image)
            ],
        }
        for chosen in _spread_words(by_usage, word, image)
    ]
    return {"shown": shown, "patch": patch_side(pixels.shape[1:3], grid), "seen": len(pixels)}


def _spread_words(by_usage: np.ndarray, word: np.ndarray, image: np.ndarray) -> list[int]:
    """Return words that are the nearest in sufficiently many images, evenly spread over their ranks."""
    pairs = np.unique(np.stack([word, image]), axis=1)
    images = np.bincount(pairs[0], minlength=len(by_usage))[by_usage]
    for required in range(PATCHES, 0, -1):
        candidates = by_usage[images >= required]
        if len(candidates) >= WORDS:
            break
    spread = np.unique(np.linspace(0, len(candidates) - 1, WORDS).round().astype(np.int64))
    return [int(candidate) for candidate in candidates[spread]]


def _nearest_rows(chosen: int, word: np.ndarray, distance: np.ndarray, image: np.ndarray) -> list[int]:
    """Return the rows with this nearest word, one per image, the nearest first."""
    rows = np.flatnonzero(word == chosen)
    rows = rows[np.argsort(distance[rows], kind="stable")]
    _, first = np.unique(image[rows], return_index=True)
    return [int(row) for row in rows[np.sort(first)][:PATCHES]]


def patch_side(lengths: tuple[int, ...], grid: tuple[int, int]) -> int:
    """Return the side of a patch in pixels: two grid cells, limited to a third to a half of the short side.

    It is never smaller than one cell, unless the image is.
    """
    size, cell = min(lengths), max(length / cells for length, cells in zip(lengths, grid, strict=True))
    return round(min(size, max(cell, size / 3, min(2 * cell, size / 2))))


def _cut_patch(image: np.ndarray, place: int, grid: tuple[int, int]) -> np.ndarray:
    """Cut the surroundings of a position, moved inwards at the border of the image [H,W,3]."""
    lengths, position = image.shape[:2], divmod(place, grid[1])
    side = patch_side(lengths, grid)
    centers = ((p + 0.5) * length / cells for p, length, cells in zip(position, lengths, grid, strict=True))
    top, left = (
        min(max(round(center - side / 2), 0), length - side)
        for center, length in zip(centers, lengths, strict=True)
    )
    return image[top : top + side, left : left + side]
