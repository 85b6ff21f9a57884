"""A teacher's features over a data set, in memory or streamed from a file, and faiss's k-means over them."""

import contextlib
import io
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .grid import positions

CHUNK = 1 << 25
"""Numbers that are looked at together where features are streamed: 128 MB."""

ON_DEVICE = 1 << 26
"""Elements of a block's matrix on a GPU: large enough to fill it, small beside its memory."""

HALF = float(np.finfo(np.float16).max)


class Features:
    """n features of C channels: float32 in memory, or float16 in a file that is read in chunks.

    What k-means finds hardly feels the rounding to half precision; values beyond its range are cut to it. The
    class answers as ``faiss.contrib.clustering.DatasetAssign`` does, so that faiss's k-means runs over
    features in a file, and with a GPU's distances where the teacher runs on one: ImageNet's 10 million
    features of 2,048 channels against 4,096 words are 160 TFLOP an iteration.
    """

    def __init__(self, n: int, channels: int, file: Path | None) -> None:
        """``file``: where to stream from; None keeps them in memory."""
        self.file = file
        self.data: np.ndarray
        if file is None:
            self.data = np.empty((n, channels), np.float32)
        else:
            # Written as a file: through a memory map a full disk would kill the process.
            with file.open("wb") as empty:
                empty.truncate(2 * n * channels)
            self.data = np.memmap(file, np.float16, "r", shape=(n, channels))
        self.device = torch.device("cpu")

    def fill(self, maps: Iterable[Tensor], grid: tuple[int, int], of: int) -> bool:
        """Take n of the ``of`` features in these maps [B,C,H,W], evenly; whether all are finite.

        Position i of the stream is taken when it crosses into the next of n equal parts. Maps are
        average-pooled to ``grid`` first.
        """
        n, seen, taken, finite = len(self.data), 0, 0, True
        for f in maps:
            self.device = f.device
            rows = positions(f.float(), grid)
            index = torch.arange(seen, seen + len(rows))
            chosen = rows[((index + 1) * n // of > index * n // of).to(rows.device)]
            finite = finite and bool(torch.isfinite(chosen).all())
            if self.file is None:
                self.data[taken : taken + len(chosen)] = chosen.cpu().numpy()
            else:
                halves = chosen.clamp(-HALF, HALF).cpu().numpy().astype(np.float16)
                with self.file.open("r+b") as file:
                    file.seek(2 * taken * self.dim())
                    file.write(halves.data)
            seen, taken = seen + len(rows), taken + len(chosen)
        return finite

    def chunks(self) -> Iterator[np.ndarray]:
        """All features in order, float32 [m,C] with at most CHUNK numbers each."""
        size = max(1, CHUNK // self.dim())
        for start in range(0, len(self.data), size):
            yield np.asarray(self.data[start : start + size], np.float32)

    def nearest(self, words: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Each chunk, with the squared distance to its features' nearest words and the words' numbers."""
        find = nearest if self.device.type == "cpu" else partial(nearest_on, self.device)
        for chunk in self.chunks():
            yield chunk, *find(chunk, words)

    def kmeans(self, k: int, iterations: int, seed: int) -> np.ndarray:
        """The words [k,C], float32: Lloyd's algorithm by faiss, L2 on raw features, from k random ones."""
        import faiss
        from faiss.contrib import clustering

        faiss.omp_set_num_threads(torch.get_num_threads())
        if self.file is not None or self.device.type != "cpu":
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
        for chunk, distance, word in self.nearest(centroids):
            of_chunk = torch.zeros(centroids.shape)
            sums += of_chunk.index_add_(0, torch.from_numpy(word), torch.from_numpy(chunk))
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


def nearest_on(
    device: torch.device, features: np.ndarray, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same by torch on a device."""
    f, v = torch.from_numpy(features).to(device), torch.from_numpy(words).to(device)
    # ‖f − v‖² = ‖f‖² + ‖v‖² − 2⟨f,v⟩, in fp32: half precision would cancel.
    parts = [
        torch.addmm(v.square().sum(1), part, v.T, alpha=-2).min(dim=1)
        for part in f.split(ON_DEVICE // len(v))
    ]
    distance = torch.cat([part.values for part in parts]) + f.square().sum(1)
    return distance.clamp(min=0).cpu().numpy(), torch.cat([part.indices for part in parts]).cpu().numpy()
