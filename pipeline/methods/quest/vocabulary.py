"""QuEST's vocabulary: k-means by faiss over a teacher's features, shared by all runs through the cache."""

import contextlib
import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...errors import JobError, UsageError
from ..base import PrepareContext, positions

FILE, VERSION = "vocabulary.safetensors", 2

MIN_WORDS, MAX_WORDS, IMAGES_PER_WORD = 256, 4096, 50
"""Default K: one word for each 50 images, within these limits. The upper one is the paper's K.

On 10,000 images of CIFAR-10, more than 256 words cost time and gained nothing (docs/methods.md).
"""

FEATURES_PER_WORD = 39
"""Minimum number of features per word for the default K; faiss warns below it."""

SAMPLE = 1024
"""Number of features that are stored with the words."""

USAGE_RANKS = 64
"""Number of ranks at which the report shows the usage of words."""

MEMORY_LIMIT = 4 * 1024**3
"""Bytes of features held in memory; more are streamed from a file."""

CHUNK = 1 << 25
"""Numbers read at a time from streamed features: 128 MB."""

GPU_BLOCK = 1 << 26
"""Elements of a block's matrix on a GPU: large enough to fill it, small compared to its memory."""

FP16_MAX = float(np.finfo(np.float16).max)


class FeatureMatrix:
    """n features of C channels: float32 in memory, or float16 in a file that is read in chunks.

    Rounding to half precision hardly changes the result of k-means; values beyond its range are clipped. The
    class implements the interface of ``faiss.contrib.clustering.DatasetAssign``, so that faiss's k-means runs
    over features in a file, and computes distances on a GPU if the teacher runs on one: ImageNet's 10 million
    features of 2,048 channels against 4,096 words take 160 TFLOP per iteration.
    """

    def __init__(self, n: int, channels: int, file: Path | None) -> None:
        """Allocate the matrix in ``file``, or in memory if it is None."""
        self.file = file
        self.data: np.ndarray
        if file is None:
            self.data = np.empty((n, channels), np.float32)
        else:
            # Write through a file handle: a full disk kills a process that writes through a memory map.
            with file.open("wb") as empty:
                empty.truncate(2 * n * channels)
            self.data = np.memmap(file, np.float16, "r", shape=(n, channels))
        self.device = torch.device("cpu")

    def fill(self, maps: Iterable[Tensor], grid: tuple[int, int], total: int) -> bool:
        """Store n of the ``total`` features in maps [B,C,H,W], and return True if all of them are finite.

        Maps are average-pooled to ``grid`` first. The stored features are evenly spaced: feature i of the
        stream is stored if it crosses into the next of n equal parts.
        """
        n, seen, stored, finite = len(self.data), 0, 0, True
        for f in maps:
            self.device = f.device
            rows = positions(f.float(), grid)
            index = torch.arange(seen, seen + len(rows))
            chosen = rows[((index + 1) * n // total > index * n // total).to(rows.device)]
            finite = finite and bool(torch.isfinite(chosen).all())
            if self.file is None:
                self.data[stored : stored + len(chosen)] = chosen.cpu().numpy()
            else:
                halves = chosen.clamp(-FP16_MAX, FP16_MAX).cpu().numpy().astype(np.float16)
                with self.file.open("r+b") as file:
                    file.seek(2 * stored * self.dim())
                    file.write(halves.data)
            seen, stored = seen + len(rows), stored + len(chosen)
        return finite

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all features in order, float32 [m,C] with at most ``CHUNK`` numbers at a time."""
        size = max(1, CHUNK // self.dim())
        for start in range(0, len(self.data), size):
            yield np.asarray(self.data[start : start + size], np.float32)

    def nearest(self, words: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each chunk with the squared distances to the nearest words, and these words' indices.

        All are on the teacher's device.
        """
        v = torch.from_numpy(words).to(self.device)
        for chunk in self.chunks():
            f = torch.from_numpy(chunk).to(self.device)
            if self.device.type == "cpu":
                distance, word = map(torch.from_numpy, nearest_words(chunk, words))
            else:
                distance, word = nearest_words_by_torch(f, v)
            yield f, distance, word

    def kmeans(self, k: int, iterations: int, seed: int) -> np.ndarray:
        """Compute words [k,C], float32: Lloyd's algorithm by faiss, L2 on raw features, random start."""
        import faiss
        from faiss.contrib import clustering

        faiss.omp_set_num_threads(torch.get_num_threads())
        if self.file is not None or self.device.type != "cpu":
            with contextlib.redirect_stdout(io.StringIO()):  # it prints even with verbose=False
                words = clustering.kmeans(k, self, niter=iterations, seed=seed % 2**31, verbose=False)
            return np.ascontiguousarray(words, np.float32)
        # By default faiss samples 256 features per word.
        limits = {"max_points_per_centroid": len(self.data), "min_points_per_centroid": 1}
        in_memory = faiss.Kmeans(self.dim(), k, niter=iterations, seed=seed % 2**31, **limits)
        in_memory.train(self.data)
        return np.array(in_memory.centroids)

    # The interface of faiss.contrib.clustering.DatasetAssign.

    def count(self) -> int:
        return len(self.data)

    def dim(self) -> int:
        return int(self.data.shape[1])

    def get_subset(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self.data[np.sort(indices)], np.float32)

    def assign_to(
        self, centroids: np.ndarray, weights: Any = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the nearest centroid, the squared distance to it [n], and the feature sum per centroid."""
        words, distances = [], []
        # Metal has no float64.
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=device)
        for chunk, distance, word in self.nearest(centroids):
            chunk_sums = torch.zeros(centroids.shape, device=chunk.device)
            sums += chunk_sums.index_add_(0, word, chunk).to(device)
            words.append(word)
            distances.append(distance)
        return torch.cat(words).cpu().numpy(), torch.cat(distances).cpu().numpy(), sums.float().cpu().numpy()


def nearest_words(features: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared distance to the nearest word and its index for features [n,C], by faiss."""
    import faiss

    index = faiss.IndexFlatL2(words.shape[1])
    index.add(words)
    distance, word = index.search(features, 1)
    return distance[:, 0], word[:, 0]


def nearest_words_by_torch(f: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as ``nearest_words`` for features [n,C] and words [K,C] on a device."""
    # ‖f − v‖² = ‖f‖² + ‖v‖² − 2⟨f,v⟩, in fp32: half precision would cancel.
    squares, size = v.square().sum(1), GPU_BLOCK // len(v)
    blocks = [torch.addmm(squares, block, v.T, alpha=-2).min(dim=1) for block in f.split(size)]
    distance = torch.cat([block.values for block in blocks]) + f.square().sum(1)
    return distance.clamp(min=0), torch.cat([block.indices for block in blocks])


@dataclass(frozen=True)
class Vocabulary:
    """K words [K,C], fp32, with statistics of the features they were learned from."""

    words: Tensor
    sample: Tensor
    """Some of the features [n,C], evenly spaced, on which temperatures are evaluated."""
    usage: Tensor
    """Number of features nearest to each word, int64 [K]."""
    mu: float
    """Mean squared distance to the nearest word."""
    requested: int
    """K as requested, or the default."""
    features: int
    features_used: int
    perplexity: float
    note: str | None

    def facts(self) -> dict[str, Any]:
        tensors = ("words", "sample", "usage")
        facts = {key: value for key, value in asdict(self).items() if key not in tensors}
        return {"words": len(self.words), **facts, **summarize_usage(self.usage)}


def summarize_usage(usage: Tensor) -> dict[str, Any]:
    """Return for the report how unevenly words are used: counts at some ranks, and unused words."""
    counts = np.sort(usage.numpy())[::-1]
    ranks = np.unique(np.linspace(0, len(counts) - 1, USAGE_RANKS).astype(np.int64))
    shown = [(int(rank) + 1, int(counts[rank])) for rank in ranks]
    return {"usage": shown, "dead": int((counts == 0).sum())}


def learn_vocabulary(
    context: PrepareContext,
    teacher: int,
    level: str,
    grid: tuple[int, int],
    words: int | None = None,
    iterations: int = 20,
    limit: int | None = None,
) -> Vocabulary:
    """Learn words of a teacher's map ``level``, or read them from the cache if a run has learned them.

    The map is average-pooled to ``grid`` (H, W) first. K is ``words``, by default ``choose_words``, or fewer
    with a note, so that each has at least 39 features. k-means uses at most ``limit`` features.

    Raises:
        UsageError: there are fewer features than words.
        JobError: they do not fit on the disk, are not finite, or are all the same.
    """
    channels, *_ = context.teachers[teacher].maps[level]
    features = context.images * grid[0] * grid[1]
    wanted = min(features, limit or features)
    used, streamed = _choose_storage(wanted, channels, context, required=limit is not None)
    check_words(words, used)
    requested = words or choose_words(context.images)
    k = words or max(2, min(requested, used // FEATURES_PER_WORD))
    note = None
    if k < requested:
        note = f"{k} words instead of {requested}, so that each has {FEATURES_PER_WORD} of {used:,} features"
    elif k * FEATURES_PER_WORD > used:
        sufficient = used // FEATURES_PER_WORD
        note = f"{used:,} features are few for {k} words; {sufficient} would have {FEATURES_PER_WORD} each"
    if note:
        context.note(note)
    if used < features:
        context.note(f"k-means uses {used:,} of {features:,} features, evenly spaced")
    key = {"version": VERSION, "level": level, "grid": list(grid), "k": k, "iterations": iterations}
    key |= {"used": used, "streamed": streamed, "seed": context.seed}

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=context.scratch) as scratch:
            matrix = FeatureMatrix(used, channels, Path(scratch) / "features.f16" if streamed else None)
            maps = (batch[level] for batch in context.features(teacher, frozenset([level])))
            if not matrix.fill(maps, grid, features):
                raise JobError(
                    f"{context.teacher_names[teacher]}: its features are not finite, so its weights are "
                    "broken. Use other weights or train the teacher again."
                )
            learned = measure_words(matrix, matrix.kmeans(k, iterations, context.seed))
        metadata = {name: repr(learned[name]) for name in ("mu", "perplexity")}
        # Not safetensors' own writer: on a full disk it does not raise an OSError, which the cache handles.
        tensors = {name: learned[name].contiguous() for name in ("words", "sample", "usage")}
        (path / FILE).write_bytes(save(tensors, metadata))

    learned = _read(context.cached(teacher, "vocabulary", key, write) / FILE)
    return Vocabulary(requested=requested, features=features, features_used=used, note=note, **learned)


def choose_words(images: int) -> int:
    """Return the default K for a number of training images."""
    return min(MAX_WORDS, max(MIN_WORDS, images // IMAGES_PER_WORD))


def check_words(words: int | None, features: int) -> None:
    """Raise UsageError if there are fewer features than words."""
    if words is not None and words > features:
        raise UsageError(
            f"--set quest.words={words} exceeds the number of features for k-means, {features:,} (one for "
            "each position of the map in each training image, limited by quest.features). Use fewer "
            f"words, such as --set quest.words={max(2, features // 8)}."
        )


def _choose_storage(
    wanted: int, channels: int, context: PrepareContext, *, required: bool
) -> tuple[int, bool]:
    """Return the number of features to use, and True if they are streamed from a file.

    All are held in memory if they take at most 4 GiB, or in a file if it takes at most half of the free disk.
    Otherwise as many are used as fit in memory, unless all are ``required``.
    """
    if 4 * channels * wanted <= MEMORY_LIMIT:
        return wanted, False
    free = shutil.disk_usage(context.scratch).free
    if 2 * channels * wanted <= free // 2:
        return wanted, True
    if required:
        raise JobError(
            f"{context.scratch}: {wanted:,} features of {channels} channels require "
            f"{4 * channels * wanted / 1e9:.0f} GB of free disk space, got {free / 1e9:.0f} GB. Free some, "
            "or lower --set quest.features."
        )
    return MEMORY_LIMIT // (4 * channels), False


class ConstantMap(JobError):
    """A feature map that is the same everywhere, or takes few values, so that its words have no scale."""


def measure_words(features: FeatureMatrix, words: np.ndarray) -> dict[str, Any]:
    """Return the words with μ, perplexity, usage and a sample of the features.

    Raises:
        ConstantMap: all features are the same, or each is a word.
    """
    usage = np.zeros(len(words), np.int64)
    distance = square = 0.0
    total = np.zeros(features.dim())
    for tensors in features.nearest(words):
        chunk, distances, word = (x.cpu().numpy() for x in tensors)
        distance += float(distances.sum(dtype=np.float64))
        square += float(np.einsum("nc,nc->", chunk, chunk, dtype=np.float64))
        total += chunk.sum(0, dtype=np.float64)
        usage += np.bincount(word, minlength=len(words))
    rounding = 1e-6 * square  # below fp32's resolution of ‖f‖²
    if not square - float(total @ total) / features.count() > rounding:
        raise ConstantMap("All features of the teacher are the same. Check its weights and the data.")
    if not distance > rounding:
        raise ConstantMap(
            f"Each of the teacher's features equals one of the {len(words)} words, so the distances have no "
            "scale. Lower --set quest.words."
        )
    sampled = np.unique(np.linspace(0, features.count() - 1, SAMPLE).astype(np.int64))
    return {
        "words": torch.from_numpy(words),
        "sample": torch.from_numpy(features.get_subset(sampled)),
        "mu": distance / features.count(),
        "perplexity": float(perplexity(torch.from_numpy(usage).double())),
        "usage": torch.from_numpy(usage),
    }


def hash_words(words: Tensor) -> str:
    """Return the SHA-256 of words [K,C]."""
    return hashlib.sha256(words.cpu().contiguous().numpy().tobytes()).hexdigest()


def perplexity(usage: Tensor) -> Tensor:
    """Return exp(entropy) of the usage [K], as counts or frequencies: the effective number of words."""
    p = usage / usage.sum()
    return torch.special.entr(p).sum().exp()


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        # Copies: the tensors are views of a memory-mapped file that others may change.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return {**tensors, "mu": float(metadata["mu"]), "perplexity": float(metadata["perplexity"])}
