"""QuEST's vocabulary: k-means over a teacher's features by faiss, shared through the cache."""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...errors import JobError, UsageError
from ..base import PrepareContext


def shared_grid(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> tuple[int, int]:
    """The grid (H, W) at which two maps [C,H,W] meet: the finer one is average-pooled to the coarser."""
    return min(student[1], teacher[1]), min(student[2], teacher[2])


def pooled(f: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map [B,C,H,W], average-pooled to the grid (h, w) where that is another: [B,C,h,w]."""
    return f if f.shape[-2:] == grid else F.adaptive_avg_pool2d(f, grid)


def positions(f: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map [B,C,H,W], average-pooled to the grid (h, w), as the features [B·h·w,C] of its positions."""
    f = pooled(f, grid)
    return f.permute(0, 2, 3, 1).reshape(-1, f.shape[1])


CHUNK = 1 << 25
"""Numbers that are looked at together where features are streamed: 128 MB."""

ON_DEVICE = 1 << 26
"""Elements of a block's matrix on a GPU: large enough to fill it, small beside its memory."""

HALF = float(np.finfo(np.float16).max)


class FeatureMatrix:
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


FILE = "vocabulary.safetensors"
VERSION = 2

WORDS = 4096
"""K where none is asked for: the paper's."""

FEATURES_PER_WORD = 39
"""Features that a word should at least be learned from; faiss warns below it."""

SAMPLE = 1024
"""Features that are kept beside the words."""

MEMORY_LIMIT = 4 * 1024**3
"""Bytes of features held in memory; more are streamed from a file."""

CURVE = 64
"""Ranks at which the words' usage is told."""


def usage_facts(usage: Tensor | None) -> dict[str, Any]:
    """How unevenly words are used, for the report; nothing where an older vocabulary does not tell."""
    if usage is None:
        return {}
    counts = np.sort(usage.numpy())[::-1]
    ranks = np.unique(np.linspace(0, len(counts) - 1, CURVE).astype(np.int64))
    return {
        "usage": [(int(rank) + 1, int(counts[rank])) for rank in ranks],
        "dead": int((counts == 0).sum()),
    }


@dataclass(frozen=True)
class Vocabulary:
    """K words [K,C], fp32, with the facts of their making; μ is the mean squared distance to the nearest.

    ``sample`` [n,C] are some of the features, drawn evenly: what a temperature does is tried on them.
    """

    words: Tensor
    sample: Tensor
    mu: float
    asked: int
    features: int
    features_used: int
    perplexity: float
    note: str | None
    usage: Tensor | None = None
    """Of how many features each word is the nearest, int64 [K]; None in vocabularies of older versions."""

    def facts(self) -> dict[str, Any]:
        apart = ("words", "sample", "usage")
        facts = {key: value for key, value in asdict(self).items() if key not in apart}
        return {"words": len(self.words), **facts, **usage_facts(self.usage)}


def learn_vocabulary(
    preparation: PrepareContext,
    *,
    teacher: int,
    level: str,
    grid: tuple[int, int],
    words: int | None,
    iterations: int,
    limit: int | None,
) -> Vocabulary:
    """Words of one teacher's map at one level, from the cache where an earlier run has learned them.

    Args:
        grid: (H, W) to which the teacher's map is average-pooled first.
        words: K as asked for; None: 4,096, or with a note fewer, so that each has 39 features or more.
        limit: the largest number of features k-means may use; None is all.

    Raises:
        UsageError: there are fewer features than words.
        JobError: there is no room for them, or the features are not finite, or all the same.
    """
    channels, *_ = preparation.teachers[teacher].maps[level]
    features = preparation.images * grid[0] * grid[1]
    used, streamed = _place(
        min(features, limit or features), channels, preparation, asked_for=limit is not None
    )
    check_words(words, used)
    k = words or max(2, min(WORDS, used // FEATURES_PER_WORD))
    note = None
    if k < (words or WORDS):
        note = (
            f"{k} words instead of {WORDS}: {used:,} features are enough for {k} "
            f"({FEATURES_PER_WORD} or more each)"
        )
    elif k * FEATURES_PER_WORD > used:
        note = (
            f"{used:,} features are few for {k} words; {used // FEATURES_PER_WORD} would have "
            f"{FEATURES_PER_WORD} or more each"
        )
    if note:
        preparation.note(note)
    if used < features:
        preparation.note(f"k-means uses {used:,} of {features:,} features, drawn evenly")
    key = {
        "version": VERSION,
        "level": level,
        "grid": list(grid),
        "k": k,
        "iterations": iterations,
        "used": used,
        "streamed": streamed,
        "seed": preparation.seed,
    }

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=preparation.scratch) as scratch:
            held = FeatureMatrix(used, channels, Path(scratch) / "features.f16" if streamed else None)
            maps = (readout[level] for readout in preparation.readouts(teacher, frozenset([level])))
            if not held.fill(maps, grid, features):
                raise JobError(
                    f"The features of {preparation.teacher_names[teacher]} are not finite numbers: its "
                    "weights are broken; try other weights or train the teacher anew."
                )
            _write(path / FILE, describe(held, held.kmeans(k, iterations, preparation.seed)))

    learned = _read(preparation.shared(teacher, "vocabulary", key, write) / FILE)
    return Vocabulary(asked=words or WORDS, features=features, features_used=used, note=note, **learned)


def check_words(words: int | None, features: int) -> None:
    """
    Raises:
        UsageError: more words are asked for than there are features to learn them from.
    """
    if words is not None and words > features:
        raise UsageError(
            f"quest.words={words}: k-means has {features:,} features (one for each position of the map "
            "in each training image, or quest.features of them), and a word needs one; ask for fewer words, "
            f"as in --set quest.words={max(2, features // 8)}."
        )


def _place(wanted: int, channels: int, preparation: PrepareContext, *, asked_for: bool) -> tuple[int, bool]:
    """How many features are used, and whether they are streamed from the disk instead of held in memory.

    All of them in memory where they fit in 4 GiB; else in a file, where half of the free disk holds it; else
    as many as fit in memory, unless so many were asked for.

    Raises:
        JobError: there is no room for the features that were asked for.
    """
    if 4 * channels * wanted <= MEMORY_LIMIT:
        return wanted, False
    free = shutil.disk_usage(preparation.scratch).free
    if 2 * channels * wanted <= free // 2:
        return wanted, True
    if asked_for:
        raise JobError(
            f"{wanted:,} features of {channels} channels need {4 * channels * wanted / 1e9:.0f} GB free at "
            f"{preparation.scratch}, half of them for the features; there are {free / 1e9:.0f} GB. Make "
            "room, or ask for fewer with --set quest.features."
        )
    return MEMORY_LIMIT // (4 * channels), False


def describe(features: FeatureMatrix, words: np.ndarray) -> dict[str, Any]:
    """The words with μ, the mean squared distance to the nearest, and the perplexity of the assignment.

    Raises:
        JobError: all features are the same, or each is a word.
    """
    usage = np.zeros(len(words), np.int64)
    distance = square = 0.0
    total = np.zeros(features.dim())
    for chunk, distances, word in features.nearest(words):
        distance += float(distances.sum(dtype=np.float64))
        square += float(np.einsum("nc,nc->", chunk, chunk, dtype=np.float64))
        total += chunk.sum(0, dtype=np.float64)
        usage += np.bincount(word, minlength=len(words))
    # Below fp32's resolution of ‖f‖² a distance is rounding alone.
    rounding = 1e-6 * square
    if not square - float(total @ total) / features.count() > rounding:
        raise JobError(
            "All features of the teacher are the same: it sees no difference between the images; check its "
            "weights and the data."
        )
    if not distance > rounding:
        raise JobError(
            f"Each of the teacher's features is one of the {len(words)} words: nothing is left to tell how "
            "near a word is; ask for fewer with --set quest.words."
        )
    sampled = np.unique(np.linspace(0, features.count() - 1, SAMPLE).astype(np.int64))
    return {
        "words": torch.from_numpy(words),
        "sample": torch.from_numpy(features.get_subset(sampled)),
        "mu": distance / features.count(),
        "perplexity": float(perplexity(torch.from_numpy(usage).double())),
        "usage": torch.from_numpy(usage),
    }


def perplexity(usage: Tensor) -> Tensor:
    """exp(H) of the words' usage [K], counts or frequencies: how many words are in even use."""
    p = usage / usage.sum()
    return torch.special.entr(p).sum().exp()


def _write(path: Path, learned: dict[str, Any]) -> None:
    metadata = {"mu": repr(learned["mu"]), "perplexity": repr(learned["perplexity"])}
    # The cache answers a full disk, which safetensors' own writer would not tell as an OSError.
    tensors = {name: learned[name].contiguous() for name in ("words", "sample", "usage")}
    path.write_bytes(save(tensors, metadata))


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        # Not a map of a file that others may write.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return {**tensors, "mu": float(metadata["mu"]), "perplexity": float(metadata["perplexity"])}
