"""KL(p_T ‖ p_S) over the words of a vocabulary, and its gradients, block by block.

    KL = logsumexp(z) − Σ_k p_T(k)·z_k + Σ_k p_T(k)·log p_T(k)        z_k = γ·⟨W_k, f_S⟩
    ∂KL/∂z_k = p_S(k) − p_T(k)

Positions × words is a matrix far larger than what goes in and what comes out: 8,192 × 4,096 for a batch of
128 maps of 8×8. Taken in blocks it stays in the processor's cache, and no more than one block is ever held,
since a block's gradients are computed as soon as its value is: as fused losses over a language model's
vocabulary do (Hsu et al.: "Liger Kernel", 2024, arXiv 2410.10989). Under autocast the three products with W
take autocast's type, sums and softmax fp32 (or the type of what comes in, where that is wider).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.views import words as random_words
from .. import base
from .vocabulary import ON_DEVICE, Vocabulary, positions

CACHED = 1 << 19
"""Elements of a block's matrix on a CPU: 2 MB, which the caches hold (half or twice as many are as fast)."""

LOOKED_AT = 1024
"""About so many positions of a batch are looked at where that costs a search for the likeliest word."""


@dataclass(frozen=True)
class Nearest:
    """p_T over the m likeliest words alone, likeliest first: ids [n,m] and p [n,m], whose rows sum to 1."""

    ids: Tensor
    p: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Nearest":
        return Nearest(self.ids[rows], self.p[rows])

    def word(self) -> tuple[Tensor, Tensor]:
        """Each position's likeliest word [n] and its probability [n]."""
        return self.ids[:, 0].long(), self.p[:, 0]

    def against(self, z: Tensor) -> Tensor:
        """Σ over positions of Σ_k p_T(k)·(log p_T(k) − z_k)."""
        # A probability that fp16 rounded to nothing counts nothing.
        return (torch.special.xlogy(self.p, self.p) - self.p * z.gather(1, self.ids.long())).sum()

    def taken_from(self, p_s: Tensor) -> Tensor:
        """p_S − p_T, in the place of p_S."""
        return p_s.scatter_add_(1, self.ids.long(), -self.p.to(p_s.dtype))


@dataclass(frozen=True)
class Whole:
    """p_T over all words: softmax of the logits [n,K] that are computed when a block is asked for."""

    logits: Callable[[slice], Tensor]
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: slice) -> "_WholeBlock":
        logits = self.logits(rows)
        return _WholeBlock(logits, logits.softmax(1))


@dataclass(frozen=True)
class _WholeBlock:
    logits: Tensor
    p: Tensor

    def word(self) -> tuple[Tensor, Tensor]:
        top, word = self.p.max(1)
        return word, top

    def against(self, z: Tensor) -> Tensor:
        # log p_T = logits − logsumexp(logits), and p_T sums to 1.
        return torch.dot(self.p.flatten(), (self.logits - z).flatten()) - _log_sum(self.logits, self.p).sum()

    def taken_from(self, p_s: Tensor) -> Tensor:
        return p_s.sub_(self.p)


def _log_sum(logits: Tensor, p: Tensor) -> Tensor:
    """logsumexp of each row, by its softmax, which has the sum already: max p = exp(max − logsumexp)."""
    return logits.amax(1) - p.amax(1).log()


Look = Callable[[Tensor, Tensor, Tensor], None]
"""Called for each block with the teacher's likeliest words [n], their probabilities [n], and whether they are
the student's likeliest too [n]."""


def divergence(f_s: Tensor, weight: Tensor, gamma: Tensor, target: Nearest | Whole, look: Look) -> Tensor:
    """Σ over positions of KL(p_T ‖ p_S), p_S = softmax(γ·⟨W_k, f_S⟩), with gradients for f_S, W and γ.

    Args:
        f_s: [n,C] the student's features, each of length 1.
        weight: [K,C] W, each row of length 1.
        gamma: scalar γ.
        target: p_T of the n positions.
    """
    total: Tensor = _Divergence.apply(f_s, weight, gamma, target, look)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f_s: Tensor, weight: Tensor, gamma: Tensor, target: Nearest | Whole, look: Look
    ) -> Tensor:
        device = f_s.device.type
        sums = torch.promote_types(gamma.dtype, torch.float32)
        products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sums
        learns = any(ctx.needs_input_grad)
        size = max(1, (CACHED if device == "cpu" else ON_DEVICE) // len(weight))
        looked_at = max(size, LOOKED_AT) if isinstance(target, Whole) else len(target)
        values = []
        of_f = torch.empty_like(f_s, dtype=sums)
        of_w = torch.zeros_like(weight, dtype=sums)
        with torch.autocast(device, enabled=False):
            f, w = (gamma * f_s).to(products), weight.to(products)
            for start in range(0, len(f), size):
                rows = slice(start, start + size)
                block = target[rows]
                z = _product(f[rows], w.T, sums)
                p_s = z.softmax(1)
                values.append(_log_sum(z, p_s).sum() + block.against(z))
                if start < looked_at:
                    word, top = block.word()
                    look(word, top, z.gather(1, word[:, None])[:, 0] >= z.amax(1))
                if learns:
                    of_z = block.taken_from(p_s).to(products)
                    of_f[rows] = _product(of_z, w, sums)
                    of_w += _product(of_z.T, f[rows], sums)
            # ∂z/∂γ = ⟨W_k,f_S⟩ and ∂z/∂f_S = γ·W_k: what has come back to γ·f_S is enough for both.
            of_gamma = torch.dot(of_f.flatten(), f_s.flatten().to(sums))
            of_f *= gamma
        ctx.save_for_backward(of_f.to(f_s.dtype), of_w.to(weight.dtype), of_gamma.to(gamma.dtype))
        return torch.stack(values).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient.to(saved.dtype) * saved for saved in ctx.saved_tensors), None, None


def _product(a: Tensor, b: Tensor, sums: torch.dtype) -> Tensor:
    """a @ b in ``sums``; a GPU gives the fp32 sums of a bf16 product, a CPU rounds them first."""
    if a.dtype != sums and a.is_cuda:
        return torch.mm(a, b, out_dtype=sums)
    return (a @ b).to(sums)


ACCEPTED = 0.06
"""Share of p_T that a store may lose with the words it does not keep, on average over positions."""

FIRST_POSITION = 1 << 16
"""Positions take the draws from this one on; see ``data/random_bits.py``."""


def assign(f_t: Tensor, words: Tensor, tau: float) -> Tensor:
    """The teacher's soft assignment log p_T, p_T = softmax(−‖f_T − v_k‖²/τ), over the words.

    Args:
        f_t: [n,C] the teacher's features.
        words: [K,C] the vocabulary.
        tau: τ, in squared units of the features.

    Returns:
        [n,K] log-probabilities.
    """
    return F.log_softmax(closeness(f_t, words, tau), dim=1)


def closeness(f_t: Tensor, words: Tensor, tau: float) -> Tensor:
    """−‖f_T − v_k‖²/τ up to what is the same for every word, ‖f_T‖²/τ, and drops out of the softmax: [n,K].

    In fp32 even under autocast: the terms of the distance cancel in half precision.
    """
    with torch.autocast(f_t.device.type, enabled=False):
        squares = words.square().sum(1) / -tau
        return torch.addmm(squares, f_t.to(words.dtype), words.T, alpha=2 / tau)


def nearest(f_t: Tensor, words: Tensor, tau: float, m: int) -> tuple[Nearest, Tensor]:
    """p_T over the m likeliest words of each position, renormalised, and the mass [n] that the others had.

    Args:
        f_t: [n,C], words: [K,C], tau: as for ``assign``; m at most K.
    """
    ids, p, lost = [], [], []
    size = max(1, (CACHED if f_t.device.type == "cpu" else ON_DEVICE) // len(words))
    for start in range(0, len(f_t), size):
        top, word = assign(f_t[start : start + size], words, tau).topk(m)
        kept = top.exp()
        mass = kept.sum(1, keepdim=True)
        ids.append(word)
        p.append(kept / mass)
        lost.append((1 - mass[:, 0]).clamp(min=0))
    return Nearest(torch.cat(ids), torch.cat(p)), torch.cat(lost)


def enough(
    asked: int | None, learned: Vocabulary, tau: float, preparation: base.PrepareContext
) -> tuple[int, float]:
    """m, the words that a stored p_T keeps, and the share of p_T that the others have on average.

    Where it is not asked for, the least power of two with which no more than ``ACCEPTED`` is lost.
    """
    k = len(learned.words)
    p, _ = assign(learned.sample, learned.words, tau).exp().sort(1, descending=True)
    lost = [max(0.0, 1 - float(mass)) for mass in p.cumsum(1).mean(0)]
    if asked is None:
        powers = (2**i for i in range(k.bit_length()))
        top = next((m for m in powers if lost[m - 1] <= ACCEPTED), k)
        return top, lost[top - 1]
    top = min(asked, k)
    if lost[top - 1] > ACCEPTED:
        many = next(m for m in range(1, k + 1) if m == k or lost[m - 1] <= ACCEPTED)
        preparation.note(
            f"the {top} likeliest words hold {100 * (1 - lost[top - 1]):.1f} % of p_T; {many} would hold "
            f"{100 * (1 - ACCEPTED):.0f} %"
        )
    return top, lost[top - 1]


def answer(read: str, grid: tuple[int, int], words: Tensor, tau: float, m: int) -> base.CachedOutput:
    """What a store keeps of a map: each position's m likeliest words, as numbers of 16 bits, p_T over them in
    fp16, and the mass that the others had.
    """
    places = grid[0] * grid[1]
    number = "uint16" if len(words) <= 1 << 16 else "int32"

    def compact(readout: base.Features) -> dict[str, Tensor]:
        f_t = positions(readout[read], grid)
        kept, lost = nearest(f_t, words.to(f_t.device), tau, m)
        parts = {"ids": kept.ids, "p": kept.p, "lost": lost}
        return {f"{read}.{name}": part.unflatten(0, (-1, places)) for name, part in parts.items()}

    content = words.cpu().contiguous().numpy().tobytes()
    return base.CachedOutput(
        key={
            "readout": read,
            "words": hashlib.sha256(content).hexdigest(),
            "tau": tau,
            "grid": list(grid),
            "top": m,
        },
        reads=frozenset({read}),
        arrays={
            f"{read}.ids": ((places, m), number),
            f"{read}.p": ((places, m), "float16"),
            f"{read}.lost": ((places,), "float16"),
        },
        compact=compact,
    )


def stored(ids: Tensor, p: Tensor) -> Nearest:
    """A stored p_T, whose rounding to fp16 no longer sums to 1 quite."""
    p = p.float()
    # Arrays of 16 bits come as int16, with which torch can do more than with uint16.
    words = ids.long() & 0xFFFF if ids.dtype == torch.int16 else ids.long()
    return Nearest(words, p / p.sum(1, keepdim=True))


def draw(keys: Tensor | None, epoch: int, images: int, places: int, count: int) -> Tensor:
    """Rows [images·count] of ``count`` of each image's positions, drawn evenly by (key, epoch).

    The mean over them is an unbiased estimate of the mean over all. The draw follows the epoch and not the
    view, which may return.

    Args:
        keys: int64 [images], what the draws follow besides the epoch: image and seed.
    """
    if keys is None:
        raise ValueError("positions are drawn by the images' keys, and there are none")
    lots, *_ = random_words(
        0, keys[:, None], epoch, FIRST_POSITION + torch.arange(places, device=keys.device)
    )
    chosen = lots.argsort(1)[:, :count]
    return (torch.arange(images, device=keys.device)[:, None] * places + chosen).flatten()
