"""Shared by the logit methods: softened probabilities, their divergence, and logit standardization."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TaskName
from ..errors import UsageError
from .base import Features, Method, Parameters, Setup, Shapes, to_fp32


class LogitMethod(Method):
    """A method that reads the logits of student and teachers only."""

    exclusive: ClassVar[str | None] = None
    """Why the method requires classes that exclude each other."""

    @classmethod
    def unsupported(cls, parameters: Any, task: TaskName) -> str | None:
        return None if task == "classification" else cls.exclusive

    @classmethod
    def reads(cls, parameters: Parameters, network: Shapes) -> frozenset[str]:
        return frozenset({"logits"})

    @classmethod
    def check(cls, parameters: Parameters, setup: Setup, images: int) -> None:
        if getattr(parameters, "standardize", False) and setup.student.logits == 2:
            raise UsageError(
                f"--set {cls.name}.standardize=true requires three classes or more, got 2: the z-scores of "
                "two logits are always ±0.71, so the loss has no gradient. Remove it."
            )


def standardize(z: Tensor) -> Tensor:
    """Scale each row of logits [B,N] to mean 0 and std 1.

    Sun, Ren, Li, Wang, Cao: "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427:
    the student need not match the teacher's range, only its relations.
    """
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


def student_logits(student: Features, standardized: bool = False) -> Tensor:
    """Return the student's logits [B,N] in fp32."""
    z = to_fp32(student["logits"])
    return standardize(z) if standardized else z


def teacher_logits(teachers: Sequence[Features], tau: float, standardized: bool = False) -> Tensor:
    """Return the teacher's logits [B,N]; for several, logits whose softmax at τ is the mean of theirs."""
    logits = [student_logits(teacher, standardized) for teacher in teachers]
    if len(logits) == 1:
        return logits[0]
    log_p = torch.stack([F.log_softmax(z / tau, dim=1) for z in logits])
    return tau * (log_p.logsumexp(0) - math.log(len(logits)))


def divergence(log_p_s: Tensor, log_p_t: Tensor) -> Tensor:
    """Return KL(p_T ‖ p_S) [B] from log-probabilities [B,N]."""
    return F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(1)


def binary_teacher_logits(teachers: Sequence[Features], tau: float) -> Tensor:
    """Return the teacher's logits [B,N]; for several, logits whose sigmoid at τ is the mean of theirs."""
    logits = [to_fp32(teacher["logits"]) for teacher in teachers]
    if len(logits) == 1:
        return logits[0]
    log_p = torch.stack([F.logsigmoid(z / tau) for z in logits]).logsumexp(0)
    log_q = torch.stack([F.logsigmoid(-z / tau) for z in logits]).logsumexp(0)
    return tau * (log_p - log_q)


def binary_divergence(z_s: Tensor, z_t: Tensor) -> Tensor:
    """Return KL of (σ(z), 1 − σ(z)) [B] from logits [B,N], the sum over classes."""
    p_t = z_t.sigmoid()
    present, absent = (F.logsigmoid(sign * z_t) - F.logsigmoid(sign * z_s) for sign in (1, -1))
    return (p_t * present + (1 - p_t) * absent).sum(1)
