"""Find copies of images: files with equal pixels, and the same picture in another format, size or quality.

Every image is decoded once for a hash of its pixels, its pHash (64 signs of a discrete cosine transform;
Zauner 2010) and a thumbnail, which are cached. Images with similar hashes are compared by their thumbnails.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from scipy.fft import dctn  # type: ignore[import-untyped]
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from ..runs.cache import Cache
from ..runs.hashes import digest
from .dataset import Copies, Image, Progress, hash_array
from .decode import decode_each

VERSION = 1
"""Version of the signatures. Independent of the decoder's, which must not change a split."""

SIDE = 16
"""Side in pixels of the image from which the pHash is computed; a thumbnail has half of it."""

PIXELS, HASH, THUMBNAIL = slice(0, 32), slice(32, 40), slice(40, 40 + 3 * (SIDE // 2) ** 2)
"""Parts of a signature, uint8 [232]."""

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
    if len(keys) < 2:
        return Copies()

    def write(folder: Path) -> None:
        np.save(folder / "signatures.npy", _compute([by_key[key] for key in keys], progress))

    if cache is None:
        signatures = _compute([by_key[key] for key in keys], progress)
    else:
        bits = sorted({image.gray_bits for image in by_key.values()})
        name = digest({"images": keys, "gray_bits": bits, "version": VERSION})
        folder = cache.get("copies", name) or cache.put("copies", name, write)
        signatures = np.load(folder / "signatures.npy")
    compared = np.flatnonzero(signatures.any(1))
    if len(compared) < 2:
        return Copies()
    pixels = signatures[compared, PIXELS]
    _, first, inverse = np.unique(pixels, axis=0, return_index=True, return_inverse=True)
    equal = {int(row): int(compared[first[n]]) for row, n in zip(compared, inverse.ravel(), strict=True)}
    distinct = np.sort(compared[first])
    pairs = distinct[_find_pairs(signatures[distinct])]
    pairs = pairs[[labels[keys[a]] == labels[keys[b]] for a, b in pairs.tolist()]]
    links = np.concatenate([np.array(list(equal.items())).reshape(-1, 2), pairs])
    graph = coo_array((np.ones(len(links)), links.T), shape=(len(keys), len(keys)))
    _, component = connected_components(graph, directed=False)
    _, smallest = np.unique(component, return_index=True)
    near = {row: int(smallest[component[row]]) for row in equal}
    return Copies(_name_groups(equal, keys), _name_groups(near, keys))


def _name_groups(first: Mapping[int, int], keys: list[str]) -> dict[str, str]:
    """Return the key of the first member of each group by key, without groups of one."""
    several = {group for row, group in first.items() if row != group}
    return {keys[row]: keys[group] for row, group in first.items() if group in several}


def _compute(images: list[Image], progress: Progress | None) -> np.ndarray:
    """Return signatures uint8 [N, 232]; zeros for images that cannot be compared."""
    signatures = np.zeros((len(images), THUMBNAIL.stop), np.uint8)
    for row, signature in enumerate(decode_each(images, _sign, progress)):
        if not isinstance(signature, str):
            signatures[row] = signature
    return signatures


def _sign(pixels: np.ndarray) -> np.ndarray:
    """Return the signature of an image; zeros for one of a single color, in which nothing can be compared."""
    picture = PillowImage.fromarray(pixels).resize((SIDE, SIDE), PillowImage.Resampling.BOX)
    small = np.asarray(picture, np.float32)
    if small.std((0, 1)).max() < 1:
        return np.zeros(THUMBNAIL.stop, np.uint8)
    waves = dctn(small @ _LUMA, norm="ortho")[:8, :8].ravel()
    thumbnail = small.reshape(SIDE // 2, 2, SIDE // 2, 2, 3).mean((1, 3)).round().astype(np.uint8)
    parts = bytes.fromhex(hash_array(pixels)), np.packbits(waves > np.median(waves)), thumbnail
    return np.concatenate([np.frombuffer(part, np.uint8) for part in parts])


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
    blocks = np.array_split(pairs, 1 + len(pairs) // 100_000)
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
