"""QuEST's vocabulary: k-means over a teacher's features by faiss, shared through the cache."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import JobError
from .base import Preparation

FILE = "vocabulary.safetensors"

FEATURES_PER_WORD = 39
"""The least number of features a word is learned from; faiss warns below it."""

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of features held at once; what is beyond is sampled, evenly over images and positions."""


@dataclass(frozen=True)
class Vocabulary:
    """K words [K,C], fp32, with the facts of their making; μ is the mean squared distance to the nearest."""

    words: Tensor
    mu: float
    asked: int
    features: int
    features_used: int
    perplexity: float
    note: str | None

    def facts(self) -> dict[str, Any]:
        facts = {key: value for key, value in asdict(self).items() if key != "words"}
        return {"words": len(self.words), **facts}


def learn_vocabulary(
    preparation: Preparation,
    *,
    teacher: int,
    level: str,
    grid: tuple[int, int],
    words: int,
    iterations: int,
    limit: int | None,
) -> Vocabulary:
    """Words of one teacher's map at one level, from the cache where an earlier run has learned them.

    Args:
        grid: (H, W) to which the teacher's map is average-pooled first.
        words: K as asked for; lowered, with a note, so that each word has 39 features or more.
        limit: the largest number of features k-means may use; None is all that fit in 2 GiB.

    Raises:
        JobError: the features are not finite, or all the same.
    """
    channels, *_ = preparation.teachers[teacher].maps[level]
    features = preparation.images * grid[0] * grid[1]
    used = min(features, limit or features, MEMORY_LIMIT // (4 * channels))
    k = max(2, min(words, used // FEATURES_PER_WORD))
    note = None
    if k < words:
        note = (
            f"{k} words instead of {words}: {used:,} features are enough for {k} "
            f"({FEATURES_PER_WORD} or more each)"
        )
        preparation.note(note)
    if used < features:
        preparation.note(
            f"k-means uses {used:,} of {features:,} features, drawn evenly (2 GiB, or quest.features)"
        )
    key = {
        "level": level,
        "grid": list(grid),
        "k": k,
        "iterations": iterations,
        "used": used,
        "seed": preparation.seed,
    }

    def write(path: Path) -> None:
        sample = gather(preparation, teacher, level, grid, channels, features, used)
        _write(path / FILE, kmeans(sample, k, iterations, preparation.seed))

    learned = _read(preparation.shared(teacher, "vocabulary", key, write) / FILE)
    return Vocabulary(asked=words, features=features, features_used=used, note=note, **learned)


def gather(
    preparation: Preparation,
    teacher: int,
    level: str,
    grid: tuple[int, int],
    channels: int,
    features: int,
    used: int,
) -> np.ndarray:
    """The teacher's features [used, C], fp32: every position of every image, or an even sample of them."""
    sample = np.empty((used, channels), np.float32)
    # Position i of the stream is taken when it crosses into the next of ``used`` equal parts.
    seen = taken = 0
    for readout in preparation.readouts(teacher, frozenset([level])):
        f = readout[level].float()
        if f.shape[-2:] != grid:
            f = F.adaptive_avg_pool2d(f, grid)
        rows = f.permute(0, 2, 3, 1).reshape(-1, channels)
        index = torch.arange(seen, seen + len(rows))
        chosen = rows[((index + 1) * used // features > index * used // features).to(rows.device)]
        sample[taken : taken + len(chosen)] = chosen.cpu().numpy()
        seen, taken = seen + len(rows), taken + len(chosen)
    if not np.isfinite(sample).all():
        raise JobError(
            f"The features of {preparation.teacher_names[teacher]} are not finite numbers: its weights are "
            "broken; try other weights or train the teacher anew."
        )
    return sample


def kmeans(sample: np.ndarray, k: int, iterations: int, seed: int) -> dict[str, Any]:
    """faiss k-means with L2 on raw features: words [k,C], μ, and the perplexity of the assignment."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    clustering = faiss.Kmeans(
        sample.shape[1],
        k,
        niter=iterations,
        seed=seed % 2**31,
        # faiss samples 256 features a word unless told otherwise.
        max_points_per_centroid=len(sample),
        min_points_per_centroid=1,
    )
    clustering.train(sample)
    centroids = clustering.centroids
    assert centroids is not None
    words = torch.from_numpy(centroids.copy())
    distance, word = nearest(sample, words.numpy())
    mu = float(distance.astype(np.float64).mean())
    square = float(np.einsum("nc,nc->", sample, sample, dtype=np.float64)) / len(sample)
    # Below fp32's resolution of ‖f‖² a distance is rounding alone.
    if not mu > 1e-6 * square:
        raise JobError(
            "All features of the teacher are the same: it sees no difference between the images; check its "
            "weights and the data."
        )
    usage = np.bincount(word, minlength=k) / len(word)
    entropy = -(usage[usage > 0] * np.log(usage[usage > 0])).sum()
    return {"words": words, "mu": mu, "perplexity": float(np.exp(entropy))}


def nearest(features: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance to the nearest word, and its number, for each of the features [n,C]."""
    import faiss

    index = faiss.IndexFlatL2(words.shape[1])
    index.add(words)
    distance, word = index.search(features, 1)
    return distance[:, 0], word[:, 0]


def _write(path: Path, learned: dict[str, Any]) -> None:
    metadata = {"mu": repr(learned["mu"]), "perplexity": repr(learned["perplexity"])}
    # The cache answers a full disk, which safetensors' own writer would not tell as an OSError.
    path.write_bytes(save({"words": learned["words"].contiguous()}, metadata))


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        words = file.get_tensor("words").clone()  # not a map of a file that others may write
    return {"words": words, "mu": float(metadata["mu"]), "perplexity": float(metadata["perplexity"])}
