"""The teacher's soft assignment to words, and KL(p_T ‖ p_S) with its gradients, computed in blocks.

    KL = logsumexp(z) − Σ_k p_T(k)·z_k + Σ_k p_T(k)·log p_T(k)        z_k = γ·⟨W_k, f_S⟩
    ∂KL/∂z_k = p_S(k) − p_T(k)

The matrix of positions × words is far larger than inputs and outputs: 8,192 × 4,096 for a batch of 128 maps
of 8×8. In blocks it stays in the processor's cache, and only one block is held at a time, since a block's
gradients are computed with its value, as in fused losses over a language model's vocabulary (Hsu et al.:
"Liger Kernel", 2024, arXiv 2410.10989). Under autocast the three products with W use autocast's dtype, sums
and softmax fp32 (or the input's dtype, if that is wider).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.views import random_words
from .. import base
from .vocabulary import GPU_BLOCK, Vocabulary, hash_words

CPU_BLOCK = 1 << 19
"""Elements of a block's matrix on a CPU: 2 MB, which fits in the cache (half or twice as much is as fast)."""

RECORDED_POSITIONS = 1024
"""Approximate number of positions per batch that metrics are computed from."""

LOST_MASS = 0.06
"""Mean mass of p_T that the teacher cache may lose by keeping only the likeliest words."""

FIRST_POSITION = 1 << 16
"""First draw number used for positions; see ``random_words`` in ``data/views.py``."""


@dataclass(frozen=True)
class TopWords:
    """p_T over the m likeliest words, likeliest first: ids [n,m] and p [n,m] with rows that sum to 1."""

    ids: Tensor
    p: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "TopWords":
        return TopWords(self.ids[rows], self.p[rows])

    def likeliest(self) -> tuple[Tensor, Tensor]:
        """Return each position's likeliest word [n] and its probability [n]."""
        return self.ids[:, 0].long(), self.p[:, 0]

    def cross_term(self, z: Tensor) -> Tensor:
        """Return the sum over positions of Σ_k p_T(k)·(log p_T(k) − z_k)."""
        # xlogy: a probability that fp16 rounded to zero contributes zero.
        return (torch.special.xlogy(self.p, self.p) - self.p * z.gather(1, self.ids.long())).sum()

    def subtract_from(self, p_s: Tensor) -> Tensor:
        """Return p_S − p_T, computed in place in ``p_s``."""
        return p_s.scatter_add_(1, self.ids.long(), -self.p.to(p_s.dtype))


@dataclass(frozen=True)
class AllWords:
    """p_T over all words: softmax of logits [n,K] that are computed block by block."""

    logits: Callable[[slice], Tensor]
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: slice) -> "_AllWordsBlock":
        logits = self.logits(rows)
        return _AllWordsBlock(logits, logits.softmax(1))


@dataclass(frozen=True)
class _AllWordsBlock:
    logits: Tensor
    p: Tensor

    def likeliest(self) -> tuple[Tensor, Tensor]:
        p, word = self.p.max(1)
        return word, p

    def cross_term(self, z: Tensor) -> Tensor:
        # log p_T = logits − logsumexp(logits), and p_T sums to 1.
        return (
            torch.dot(self.p.flatten(), (self.logits - z).flatten()) - _logsumexp(self.logits, self.p).sum()
        )

    def subtract_from(self, p_s: Tensor) -> Tensor:
        return p_s.sub_(self.p)


def _logsumexp(logits: Tensor, p: Tensor) -> Tensor:
    """Return logsumexp of each row from its softmax p: max p = exp(max − logsumexp)."""
    return logits.amax(1) - p.amax(1).log()


Record = Callable[[Tensor, Tensor, Tensor], None]
"""Receives the teacher's likeliest words [n] of a block, their probabilities [n], and whether the student's
likeliest words are the same [n]."""


def divergence(
    f_s: Tensor, weight: Tensor, gamma: Tensor, target: TopWords | AllWords, record: Record
) -> Tensor:
    """Return the sum over n positions of KL(p_T ‖ p_S), p_S = softmax(γ·⟨W_k, f_S⟩), differentiable.

    The rows of ``f_s`` [n,C] and of W, ``weight`` [K,C], have length 1. ``target`` is p_T; ``record`` is
    called for each block.
    """
    total: Tensor = _Divergence.apply(f_s, weight, gamma, target, record)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f_s: Tensor, weight: Tensor, gamma: Tensor, target: TopWords | AllWords, record: Record
    ) -> Tensor:
        device = f_s.device.type
        sums = torch.promote_types(gamma.dtype, torch.float32)
        products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sums
        needs_grad = any(ctx.needs_input_grad)
        size = max(1, (CPU_BLOCK if device == "cpu" else GPU_BLOCK) // len(weight))
        recorded = max(size, RECORDED_POSITIONS)
        values = []
        grad_f = torch.empty_like(f_s, dtype=sums)
        grad_w = torch.zeros_like(weight, dtype=sums)
        with torch.autocast(device, enabled=False):
            f, w = (gamma * f_s).to(products), weight.to(products)
            for start in range(0, len(f), size):
                rows = slice(start, start + size)
                p_t = target[rows]
                z = _matmul(f[rows], w.T, sums)
                p_s = z.softmax(1)
                values.append(_logsumexp(z, p_s).sum() + p_t.cross_term(z))
                if start < recorded:
                    word, p = p_t.likeliest()
                    record(word, p, z.argmax(1) == word)
                if needs_grad:
                    grad_z = p_t.subtract_from(p_s).to(products)
                    grad_f[rows] = _matmul(grad_z, w, sums)
                    grad_w += _matmul(grad_z.T, f[rows], sums)
            # ∂z/∂γ = ⟨W_k,f_S⟩ and ∂z/∂f_S = γ·W_k: both follow from the gradient of γ·f_S.
            grad_gamma = torch.dot(grad_f.flatten(), f_s.flatten().to(sums))
            grad_f *= gamma
        ctx.save_for_backward(grad_f.to(f_s.dtype), grad_w.to(weight.dtype), grad_gamma.to(gamma.dtype))
        return torch.stack(values).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient.to(saved.dtype) * saved for saved in ctx.saved_tensors), None, None


def _matmul(a: Tensor, b: Tensor, sums: torch.dtype) -> Tensor:
    """Return a @ b in dtype ``sums``. A GPU returns the fp32 sums of a bf16 product; a CPU rounds them."""
    if a.dtype != sums and a.is_cuda:
        return torch.mm(a, b, out_dtype=sums)
    return (a @ b).to(sums)


def normalize(f: Tensor) -> Tensor:
    """Scale features [n,C] to length 1; one that is zero stays zero, and gets no gradient."""
    length = f.norm(dim=1, keepdim=True)
    return f / length.masked_fill(length == 0, math.inf)


def assign_words(f_t: Tensor, words: Tensor, tau: float) -> Tensor:
    """Return log p_T [n,K] of features [n,C] and words [K,C]: p_T = softmax(−‖f_T − v_k‖²/τ)."""
    return F.log_softmax(word_logits(words, tau)(f_t), dim=1)


def word_logits(words: Tensor, tau: float) -> Callable[[Tensor], Tensor]:
    """Return a function of f_T [n,C]: −‖f_T − v_k‖²/τ [n,K] without ‖f_T‖²/τ, which cancels in the softmax.

    In fp32 even under autocast: the terms of the distance cancel in half precision.
    """
    squares = words.square().sum(1) / -tau

    def compute(f_t: Tensor) -> Tensor:
        with torch.autocast(f_t.device.type, enabled=False):
            return torch.addmm(squares, f_t.to(words.dtype), words.T, alpha=2 / tau)

    return compute


def top_words(f_t: Tensor, words: Tensor, tau: float, m: int) -> tuple[TopWords, Tensor]:
    """Return p_T over the m ≤ K likeliest words, renormalized, and the mass [n] of the other words."""
    ids, p, lost = [], [], []
    size = max(1, (CPU_BLOCK if f_t.device.type == "cpu" else GPU_BLOCK) // len(words))
    logits = word_logits(words, tau)
    for start in range(0, len(f_t), size):
        log_p, word = F.log_softmax(logits(f_t[start : start + size]), dim=1).topk(m)
        kept = log_p.exp()
        mass = kept.sum(1, keepdim=True)
        ids.append(word)
        p.append(kept / mass)
        lost.append((1 - mass[:, 0]).clamp(min=0))
    return TopWords(torch.cat(ids), torch.cat(p)), torch.cat(lost)


def choose_top(
    top: int | None, vocabulary: Vocabulary, tau: float, note: Callable[[str], None]
) -> tuple[int, float]:
    """Return m, the number of words that the teacher cache keeps, and the mean mass of p_T that is lost.

    Without ``top``, m is the least power of two that loses at most ``LOST_MASS``.
    """
    k = len(vocabulary.words)
    p, _ = assign_words(vocabulary.sample, vocabulary.words, tau).exp().sort(1, descending=True)
    lost = [max(0.0, 1 - float(mass)) for mass in p.cumsum(1).mean(0)]
    if top is None:
        powers = (2**i for i in range(k.bit_length()))
        m = next((m for m in powers if lost[m - 1] <= LOST_MASS), k)
    else:
        m = min(top, k)
        if lost[m - 1] > LOST_MASS:
            sufficient = next(m for m in range(1, k + 1) if m == k or lost[m - 1] <= LOST_MASS)
            kept, would = 100 * (1 - lost[m - 1]), 100 * (1 - LOST_MASS)
            note(f"the {m} likeliest words hold {kept:.1f} % of p_T; {sufficient} would hold {would:.0f} %")
    return m, lost[m - 1]


def cached_words(read: str, grid: tuple[int, int], words: Tensor, tau: float, m: int) -> base.CachedOutput:
    """Return the cached form of a map: each position's m likeliest words, p_T over them, the lost mass.

    Word numbers take 16 bits (32 beyond 65,536 words), p_T and the lost mass fp16.
    """
    places = grid[0] * grid[1]
    number = "uint16" if len(words) <= 1 << 16 else "int32"

    def compact(features: base.Features) -> dict[str, Tensor]:
        f_t = base.positions(features[read], grid)
        kept, lost = top_words(f_t, words.to(f_t.device), tau, m)
        parts = {"ids": kept.ids, "p": kept.p, "lost": lost}
        return {f"{read}.{name}": part.unflatten(0, (-1, places)) for name, part in parts.items()}

    return base.CachedOutput(
        key={"readout": read, "words": hash_words(words), "tau": tau, "grid": list(grid), "top": m},
        reads=frozenset({read}),
        arrays={
            f"{read}.ids": ((places, m), number),
            f"{read}.p": ((places, m), "float16"),
            f"{read}.lost": ((places,), "float16"),
        },
        compact=compact,
    )


def read_cached_words(ids: Tensor, p: Tensor) -> TopWords:
    """Return a cached p_T, renormalized after its rounding to fp16."""
    p = p.float()
    # uint16 arrays arrive as int16, which torch supports better.
    words = ids.long() & 0xFFFF if ids.dtype == torch.int16 else ids.long()
    return TopWords(words, p / p.sum(1, keepdim=True))


def draw_positions(keys: Tensor | None, epoch: int, images: int, places: int, count: int) -> Tensor:
    """Return rows [images·count]: ``count`` positions of each image, drawn by key [images] and epoch.

    The mean over them is an unbiased estimate of the mean over all. Draws depend on the epoch rather than the
    view, because views are repeated.
    """
    if keys is None:
        raise ValueError("drawing positions requires the images' keys")
    draws, *_ = random_words(
        0, keys[:, None], epoch, FIRST_POSITION + torch.arange(places, device=keys.device)
    )
    chosen = draws.argsort(1)[:, :count]
    return (torch.arange(images, device=keys.device)[:, None] * places + chosen).flatten()
