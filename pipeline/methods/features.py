"""A teacher's features over a data set, in memory or streamed from a file, and faiss's k-means over them."""

import contextlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .grid import positions

CHUNK = 1 << 18
"""Features that are looked at together where they are streamed."""

HALF = float(np.finfo(np.float16).max)


class Features:
    """n features of C channels: float32 in memory, or float16 in a file that is read in chunks.

    What k-means finds hardly feels the rounding to half precision; values beyond its range are cut to it. The
    class answers as ``faiss.contrib.clustering.DatasetAssign`` does, so that faiss's k-means runs over it.
    """

    def __init__(self, n: int, channels: int, file: Path | None) -> None:
        """``file``: where to stream from; None keeps them in memory."""
        self.data: np.ndarray = (
            np.empty((n, channels), np.float32)
            if file is None
            else np.memmap(file, np.float16, "w+", shape=(n, channels))
        )
        self.streamed = file is not None

    def fill(self, maps: Iterable[Tensor], grid: tuple[int, int], of: int) -> bool:
        """Take n of the ``of`` features in these maps [B,C,H,W], evenly; whether all are finite.

        Position i of the stream is taken when it crosses into the next of n equal parts. Maps are
        average-pooled to ``grid`` first.
        """
        n, seen, taken, finite = len(self.data), 0, 0, True
        for f in maps:
            rows = positions(f.float(), grid)
            index = torch.arange(seen, seen + len(rows))
            chosen = rows[((index + 1) * n // of > index * n // of).to(rows.device)]
            finite = finite and bool(torch.isfinite(chosen).all())
            if self.streamed:
                chosen = chosen.clamp(-HALF, HALF)
            self.data[taken : taken + len(chosen)] = chosen.cpu().numpy()
            seen, taken = seen + len(rows), taken + len(chosen)
        return finite

    def chunks(self) -> Iterator[np.ndarray]:
        """All features in order, float32 [≤ CHUNK, C]."""
        for start in range(0, len(self.data), CHUNK):
            yield np.asarray(self.data[start : start + CHUNK], np.float32)

    def kmeans(self, k: int, iterations: int, seed: int) -> np.ndarray:
        """The words [k,C], float32: Lloyd's algorithm by faiss, L2 on raw features, from k random ones."""
        import faiss
        from faiss.contrib import clustering

        faiss.omp_set_num_threads(torch.get_num_threads())
        if self.streamed:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints whatever verbose says
                words: np.ndarray = clustering.kmeans(
                    k, self, niter=iterations, seed=seed % 2**31, verbose=False
                )
            return np.ascontiguousarray(words, np.float32)
        in_memory = faiss.Kmeans(
            self.data.shape[1],
            k,
            niter=iterations,
            seed=seed % 2**31,
            # faiss samples 256 features a word unless told otherwise.
            max_points_per_centroid=len(self.data),
            min_points_per_centroid=1,
        )
        in_memory.train(self.data)
        found = in_memory.centroids
        assert found is not None
        return found.copy()

    # What faiss.contrib.clustering.kmeans asks for.

    def count(self) -> int:
        return len(self.data)

    def dim(self) -> int:
        return int(self.data.shape[1])

    def get_subset(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self.data[np.sort(indices)], np.float32)

    def assign_to(
        self, centroids: np.ndarray, weights: Any = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nearest centroid and squared distance to it [n], and the sum of each centroid's features."""
        words, distances = [], []
        sums = torch.zeros(centroids.shape, dtype=torch.float64)
        for chunk in self.chunks():
            distance, word = nearest(chunk, centroids)
            sums.index_add_(0, torch.from_numpy(word), torch.from_numpy(chunk).double())
            words.append(word)
            distances.append(distance)
        return np.concatenate(words), np.concatenate(distances), sums.float().numpy()


def nearest(features: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance to the nearest word, and its number, for each of the features [n,C]."""
    import faiss

    index = faiss.IndexFlatL2(words.shape[1])
    index.add(words)
    distance, word = index.search(features, 1)
    return distance[:, 0], word[:, 0]
