"""p_T, what the teacher says of a position in words: whole, or its likeliest words; and which positions.

p_T(k) = softmax_k(−‖f_T − v_k‖² / τ)
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.random_bits import words as random_words
from . import base
from .features import ON_DEVICE
from .grid import positions
from .quest.loss import CACHED, Nearest
from .quest.vocabulary import Vocabulary

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
    asked: int | None, learned: Vocabulary, tau: float, preparation: base.Preparation
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


def answer(read: str, grid: tuple[int, int], words: Tensor, tau: float, m: int) -> base.Answer:
    """What a store keeps of a map: each position's m likeliest words, as numbers of 16 bits, p_T over them in
    fp16, and the mass that the others had.
    """
    places = grid[0] * grid[1]
    number = "uint16" if len(words) <= 1 << 16 else "int32"

    def compact(readout: base.Readout) -> dict[str, Tensor]:
        f_t = positions(readout[read], grid)
        kept, lost = nearest(f_t, words.to(f_t.device), tau, m)
        parts = {"ids": kept.ids, "p": kept.p, "lost": lost}
        return {f"{read}.{name}": part.unflatten(0, (-1, places)) for name, part in parts.items()}

    content = words.cpu().contiguous().numpy().tobytes()
    return base.Answer(
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
