"""Find copies of images: files with equal pixels, and the same picture in another format, size or quality.

A small picture of each image gives its pHash (64 signs of a discrete cosine transform; Zauner 2010) and a
thumbnail. Images with similar hashes are compared by their thumbnails, and similar ones by all their pixels.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from scipy.fft import dctn  # type: ignore[import-untyped]
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from ...export.runtime import NeededSize
from ..runs.cache import Cache
from .dataset import Copies, Image, Progress, hash_array
from .decode import decode_each

VERSION = 2
"""Version of the signatures. Independent of the decoder's, which must not change a split."""

SIDE = 16
"""Side in pixels of the small picture; a thumbnail has half of it."""

DECODED_SIDE = 64
"""Least side in pixels of a JPEG that is decoded at a fraction of its size for the small picture.

This changes at most 2 of the 64 signs, and thumbnails by an RMS difference of 2 % of their std.
"""

PICTURE, HASH, THUMBNAIL = slice(0, 32), slice(32, 40), slice(40, 40 + 3 * (SIDE // 2) ** 2)
"""Parts of a signature, uint8 [232]: SHA-256 of the small picture, pHash and thumbnail."""

BLOCK = 20_000
"""Number of images after which signatures are cached."""

NEIGHBORS = 8
"""Maximum number of images with similar hashes that an image is compared with."""

MAX_DIFFERENCE, MAX_COLOR_DIFFERENCE = 0.1, 0.3
"""Limits for near copies, in brightness and in RGB: RMS difference of the thumbnails over their std.

99 of 100 CIFAR-10 images have less between a PNG and a JPEG of quality 50; of 10,000 different ones, two.
"""

MIN_STD = 8.0
"""Lower limit of that std, so that flat images do not differ by rounding."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def find_copies(
    images: Iterable[Image], cache: Cache | None = None, progress: Progress | None = None
) -> Copies:
    """Find the copies among images. The result does not depend on their order."""
    by_key: dict[str, Image] = {}
    labels: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for image in images:
        by_key[image.key] = image
        labels[image.key].add(image.labels)
    keys = sorted(by_key)
    signatures = _compute(SIGNATURES, [by_key[key] for key in keys], cache, progress)
    compared = np.flatnonzero(signatures.any(1))
    if len(compared) < 2:
        return Copies()
    pictures = signatures[compared, PICTURE]
    _, classes = np.unique([str(sorted(labels[key])) for key in keys], return_inverse=True)
    class_bytes = classes[compared, None].astype(np.int64).view(np.uint8)
    same = compared[_find_first(np.concatenate([pictures, class_bytes], 1))]
    distinct = np.unique(same)
    pairs = distinct[_find_pairs(signatures[distinct])]
    # Equal pixels are searched among the images with an equal or similar picture.
    first = _find_first(pictures)
    repeated = compared[np.bincount(first, minlength=len(first))[first] > 1]
    similar = np.union1d(repeated, pairs)
    pixels = _compute(PIXELS, [by_key[keys[row]] for row in similar], cache, progress)
    similar, pixels = similar[pixels.any(1)], pixels[pixels.any(1)]
    equal = np.stack([similar, similar[_find_first(pixels)]], 1)
    pairs = pairs[classes[pairs[:, 0]] == classes[pairs[:, 1]]]
    links = np.concatenate([equal, np.stack([compared, same], 1), pairs])
    graph = coo_array((np.ones(len(links)), links.T), shape=(len(keys), len(keys)))
    _, component = connected_components(graph, directed=False)
    _, smallest = np.unique(component, return_index=True)
    near = np.stack([compared, smallest[component[compared]]], 1)
    return Copies(_name_groups(equal, keys), _name_groups(near, keys))


def _find_first(values: np.ndarray) -> np.ndarray:
    """Return the first row, int64 [n], that equals each row of ``values`` [n, k]."""
    _, first, inverse = np.unique(values, axis=0, return_index=True, return_inverse=True)
    return np.asarray(first[inverse.ravel()])


def _name_groups(first: np.ndarray, keys: list[str]) -> dict[str, str]:
    """Return the key of the first member of each group by key, without groups of one.

    ``first`` is int64 [n, 2]: the row of an image, and that of the first member of its group.
    """
    several = {group for row, group in first.tolist() if row != group}
    return {keys[row]: keys[group] for row, group in first.tolist() if group in several}


@dataclass(frozen=True)
class _Form:
    """What is computed from an image's pixels: uint8 [size]. For ``needed`` see ``decode.read_pixels``."""

    kind: str
    compute: Callable[[np.ndarray], np.ndarray]
    size: int
    needed: NeededSize | None = None


def _sign(pixels: np.ndarray) -> np.ndarray:
    """Return the signature of an image; zeros for one of a single color, in which nothing can be compared."""
    size, filter = (SIDE, SIDE), PillowImage.Resampling.HAMMING
    picture = np.asarray(PillowImage.fromarray(pixels).resize(size, filter, reducing_gap=4))
    small = picture.astype(np.float32)
    if small.std((0, 1)).max() < 1:
        return np.zeros(THUMBNAIL.stop, np.uint8)
    waves = dctn(small @ _LUMA, norm="ortho")[:8, :8].ravel()
    thumbnail = small.reshape(SIDE // 2, 2, SIDE // 2, 2, 3).mean((1, 3)).round().astype(np.uint8)
    return np.concatenate([_hash(picture), np.packbits(waves > np.median(waves)), thumbnail.ravel()])


def _hash(pixels: np.ndarray) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(hash_array(pixels)), np.uint8)


SIGNATURES = _Form("signatures", _sign, THUMBNAIL.stop, lambda *_: (DECODED_SIDE, DECODED_SIDE))
PIXELS = _Form("pixels", _hash, 32)


def _compute(
    form: _Form, images: Sequence[Image], cache: Cache | None, progress: Progress | None
) -> np.ndarray:
    """Return the form of each image, uint8 [N, size], cached by content; zeros for unreadable images."""
    results = np.zeros((len(images), form.size), np.uint8)
    keys = [np.frombuffer(bytes.fromhex(image.key), np.uint8) for image in images]
    missing = {key.tobytes(): row for row, key in enumerate(keys)}
    kind = f"{form.kind}-{VERSION}-{images[0].gray_bits if images else 16}"
    for entry in cache.read_all(kind) if cache else ():
        for line in np.load(entry / "results.npy"):
            row = missing.pop(line[:32].tobytes(), None)
            if row is not None:
                results[row] = line[32:]
    rows = list(missing.values())
    computed = decode_each([images[row] for row in rows], form.compute, progress, form.needed)
    for start in range(0, len(rows), BLOCK):
        lines = []
        for row, result in zip(rows[start : start + BLOCK], computed, strict=False):
            if not isinstance(result, str):
                results[row] = result
                lines.append(np.concatenate([keys[row], result]))
        if cache and lines:
            block = np.stack(lines)
            cache.put(kind, hash_array(block), partial(_save, block))
    return results


def _save(results: np.ndarray, folder: Path) -> None:
    np.save(folder / "results.npy", results)


def _find_pairs(signatures: np.ndarray) -> np.ndarray:
    """Return rows int64 [n, 2] of near copies."""
    import faiss

    count, found = len(signatures), []
    none = 65 * count
    # Hashes are compared if one of four parts of 16 bits is equal, as in all that differ by 3 bits.
    # IndexBinaryMultiHash does the same, but takes 25 times as long if most images are alike.
    for part in range(4):
        hashes = np.ascontiguousarray(np.roll(signatures[:, HASH], -2 * part, 1))
        index = faiss.IndexBinaryHash(64, 16)
        index.add(hashes)
        distances, rows = index.search(hashes, NEIGHBORS)
        found.append(np.where(rows < 0, none, distances.astype(np.int64) * count + rows))
    nearest = np.sort(np.concatenate(found, 1), 1)
    nearest[:, 1:][nearest[:, 1:] == nearest[:, :-1]] = none  # in several parts
    nearest = np.sort(nearest, 1)[:, :NEIGHBORS]
    pairs = np.stack([np.repeat(np.arange(count), NEIGHBORS), nearest.ravel() % count], 1)
    pairs = pairs[(nearest.ravel() < none) & (pairs[:, 0] != pairs[:, 1])]
    blocks = np.array_split(pairs, 1 + len(pairs) // 10_000)
    return np.concatenate([block[_are_near(signatures[block, THUMBNAIL])] for block in blocks])


def _are_near(thumbnails: np.ndarray) -> np.ndarray:
    """Return bool [n] for pairs of thumbnails, uint8 [n, 2, 192]."""
    colors = thumbnails.reshape(len(thumbnails), 2, (SIDE // 2) ** 2, 3).astype(np.float32)

    def compare(values: np.ndarray) -> np.ndarray:
        difference = np.sqrt(np.square(values[:, 0] - values[:, 1]).mean(1))
        relative: np.ndarray = difference / np.maximum(values.std(2).max(1), MIN_STD)
        return relative

    is_similar: np.ndarray = compare(colors @ _LUMA) <= MAX_DIFFERENCE
    return is_similar & (compare(colors.reshape(thumbnails.shape)) <= MAX_COLOR_DIFFERENCE)
