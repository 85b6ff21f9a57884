"""What the logit methods share: softened probabilities, their divergence, and standardised logits."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Method, Parameters, Features, Shapes


class LogitMethod(Method):
    """A method that looks at logits alone, of student and teachers."""

    @classmethod
    def reads(cls, parameters: Parameters, network: Shapes) -> frozenset[str]:
        return frozenset({"logits"})


def exact(z: Tensor) -> Tensor:
    """Logits in fp32 or better: softmax and divergence are not for half precision."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def standardised(z: Tensor) -> Tensor:
    """Logits [B,N] with mean 0 and deviation 1 in each row.

    Sun, Ren, Li, Wang, Cao: "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427:
    the student is freed from matching the teacher's range, and learns the relations alone.
    """
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


def teacher_logits(teachers: Sequence[Features], tau: float, standardise: bool = False) -> Tensor:
    """One teacher's logits [B,N]; of several, those whose softmax at τ is the mean of theirs at τ."""
    each = [exact(t["logits"]) for t in teachers]
    each = [standardised(z) for z in each] if standardise else each
    if len(each) == 1:
        return each[0]
    soft = torch.stack([F.log_softmax(z / tau, dim=1) for z in each])
    return tau * (soft.logsumexp(0) - math.log(len(each)))


def divergence(log_p_s: Tensor, log_p_t: Tensor) -> Tensor:
    """KL(p_T ‖ p_S), the mean over the batch, from log-probabilities [B,N]."""
    return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


def binary_teacher_logits(teachers: Sequence[Features], tau: float) -> Tensor:
    """One teacher's logits [B,N]; of several, those whose sigmoid at τ is the mean of theirs at τ."""
    each = [exact(t["logits"]) for t in teachers]
    if len(each) == 1:
        return each[0]
    log_p = torch.stack([F.logsigmoid(z / tau) for z in each]).logsumexp(0)
    log_q = torch.stack([F.logsigmoid(-z / tau) for z in each]).logsumexp(0)
    return tau * (log_p - log_q)


def binary_divergence(z_s: Tensor, z_t: Tensor) -> Tensor:
    """KL of the binary probabilities (σ(z), 1 − σ(z)), the sum over classes and the mean over the batch."""
    p_t = z_t.sigmoid()
    there, absent = (F.logsigmoid(sign * z_t) - F.logsigmoid(sign * z_s) for sign in (1, -1))
    return (p_t * there + (1 - p_t) * absent).sum(1).mean()
