"""Random numbers that are a pure function of (seed, image, view number, draw): Philox4x32-10.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
A counter-based generator: nothing is remembered between draws, so the numbers are the same whatever else is
drawn, in any order, on any device. Written in int64 with masks, whose products wrap alike everywhere.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Word = Tensor | int


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words; the four are broadcast together."""
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    a, b, c, d = torch.broadcast_tensors(*(torch.as_tensor(word, device=device) for word in counter))
    first, second = key
    for _ in range(_ROUNDS):
        # The high word of a product: the 64 bits are right even where their sign is not.
        ac, cc = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((cc >> 32) & _MASK) ^ b ^ first,
            cc & _MASK,
            ((ac >> 32) & _MASK) ^ d ^ second,
            ac & _MASK,
        )
        first, second = (first + _WEYL[0]) & _MASK, (second + _WEYL[1]) & _MASK
    return a, b, c, d


def words(seed: int, keys: Tensor, views: Word, draw: Word) -> tuple[Tensor, ...]:
    """Four independent words, int64 in [0, 2³²), for each image key and view; shapes are broadcast.

    ``keys`` are int64 in [0, 2⁶³), ``views`` and ``draw`` in [0, 2³²); of ``seed`` the lower 64 bits count.
    """
    return philox((keys & _MASK, keys >> 32, views, draw), (seed & _MASK, (seed >> 32) & _MASK))


def uniform(word: Tensor) -> Tensor:
    """float32 in [0, 1) from a word: its upper 24 bits, exact on every device."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def below(word: Tensor, limit: Word) -> Tensor:
    """int64 in [0, limit) from a word, for limits up to 2³¹: the upper half of their product.

    No value is likelier than another by more than limit / 2³².
    """
    return (word * limit) >> 32
