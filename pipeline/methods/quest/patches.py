"""A few words as pictures: the patches of images whose features are nearest to them, for the report."""

import base64
import io
import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..base import PrepareContext, Features
from .vocabulary import nearest, positions


def thumbnail(image: np.ndarray, side: int) -> str:
    """An image uint8 [H,W,3] at ``side`` pixels, as base64 of a PNG."""
    small = Image.fromarray(np.ascontiguousarray(image)).resize((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


FILE, VERSION = "patches.json", 1
WORDS, PATCHES = 9, 6
SIDE = 48
"""Pixels of a patch as shown."""
MOST_IMAGES, MOST_POSITIONS = 256, 256 * 49


def images_to_see(grid: tuple[int, int]) -> int:
    """So many that a few seconds suffice."""
    return max(1, min(MOST_IMAGES, MOST_POSITIONS // (grid[0] * grid[1])))


def shown_words(
    preparation: PrepareContext,
    teacher: int,
    level: str,
    grid: tuple[int, int],
    words: Tensor,
    usage: Tensor | None,
) -> dict[str, Any]:
    """What ``patches_facts`` finds in a few images that the preparation gives; from the cache where an
    earlier run has looked, so that nobody need ask the teacher.
    """
    look = preparation.seen
    if look is None:
        return {}
    most = images_to_see(grid)

    def write(path: Path) -> None:
        seen = look(teacher, frozenset({level}), most)
        facts = patches_facts(seen, level, grid, words, usage)
        (path / FILE).write_text(json.dumps(facts), encoding="utf-8")

    key = {
        "version": VERSION,
        "level": level,
        "grid": list(grid),
        "most": most,
        "words": sha256(words.numpy().tobytes()).hexdigest(),
        "usage": usage is not None,
    }
    found = preparation.shared(teacher, "patches", key, write) / FILE
    facts: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return facts


def patches_facts(
    seen: Iterable[tuple[np.ndarray, Features]],
    level: str,
    grid: tuple[int, int],
    words: Tensor,
    usage: Tensor | None,
) -> dict[str, Any]:
    """Some words, spread over their ranks by usage, each with the patches nearest to it, one an image.

    Args:
        seen: rendered images uint8 [B,S,S,3] with the teacher's readouts of them.
        level: the readout that the words [K,C] belong to.
        usage: of each word [K], over the training images; None: these images' own is taken.
    """
    images, features = [], []
    for pixels, readout in seen:
        images.append(pixels)
        features.append(positions(readout[level].float(), grid).cpu().numpy())
    if not images:
        return {}
    pixels, rows = np.concatenate(images), np.concatenate(features)
    distance, word = nearest(np.ascontiguousarray(rows), words.numpy())
    counts = np.bincount(word, minlength=len(words)) if usage is None else usage.numpy()
    by_usage = np.argsort(-counts, kind="stable")
    rank = np.empty(len(words), np.int64)
    rank[by_usage] = np.arange(len(words))
    image = np.arange(len(rows)) // (grid[0] * grid[1])
    shown = [
        {
            "rank": int(rank[chosen]) + 1,
            "share": float(100 * counts[chosen] / counts.sum()),
            "patches": [
                thumbnail(_patch(pixels[image[place]], place % (grid[0] * grid[1]), grid), SIDE)
                for place in _nearest_of(chosen, word, distance, image)
            ],
        }
        for chosen in _chosen(by_usage, word, image)
    ]
    return {"shown": shown, "patch": patch_side(pixels.shape[1], grid), "seen": len(pixels)}


def _chosen(by_usage: np.ndarray, word: np.ndarray, image: np.ndarray) -> list[int]:
    """Words that are the nearest in enough images to be shown, evenly spread from the most used."""
    pairs = np.unique(np.stack([word, image]), axis=1)
    images_of = np.bincount(pairs[0], minlength=len(by_usage))[by_usage]
    for enough in range(PATCHES, 0, -1):
        able = by_usage[images_of >= enough]
        if len(able) >= WORDS:
            break
    spread = np.unique(np.linspace(0, len(able) - 1, WORDS).round().astype(np.int64))
    return [int(one) for one in able[spread]]


def _nearest_of(chosen: int, word: np.ndarray, distance: np.ndarray, image: np.ndarray) -> list[int]:
    """Positions whose nearest word this is, the nearest first, and of each image only the nearest."""
    places = np.flatnonzero(word == chosen)
    places = places[np.argsort(distance[places], kind="stable")]
    _, first = np.unique(image[places], return_index=True)
    return [int(one) for one in places[np.sort(first)][:PATCHES]]


def patch_side(size: int, grid: tuple[int, int]) -> int:
    """Of a patch, in pixels of the image: two cells of the grid, but a third to a half of the image, and
    a cell at least.
    """
    cell = size / min(grid)
    return round(max(cell, size / 3, min(2 * cell, size / 2)))


def _patch(image: np.ndarray, place: int, grid: tuple[int, int]) -> np.ndarray:
    """The surroundings of a position, moved inwards where they would leave the image [S,S,3]."""
    size = len(image)
    side = patch_side(size, grid)
    middles = ((place // grid[1] + 0.5) * size / grid[0], (place % grid[1] + 0.5) * size / grid[1])
    top, left = (min(max(round(middle - side / 2), 0), size - side) for middle in middles)
    return image[top : top + side, left : left + side]
