"""DKD: the divergence of KD taken apart, so that what the teacher knows of the wrong classes weighs more.

Zhao, Cui, Song, Qiu, Liang: "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, eq. 7:

    L = min(1, epoch/20) · τ² · (α · KL(b_T ‖ b_S) + β · KL(q_T ‖ q_S)) + CE

b = (p_y, 1 − p_y) is the binary probability of the label y against the rest, q the probabilities among the
rest; both at temperature τ. The authors' β on CIFAR-100 is 8 for most pairs, 2 for resnet56/110, 6 for WRN
and VGG. With ``standardise`` both logits are z-scored first (Sun et al., CVPR 2024), with that paper's τ = 2
and a weight of 9.
"""

from collections.abc import Mapping, Sequence
from math import ceil

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from . import base
from .logits import LogitMethod, divergence, exact, standardised, teacher_logits

PAPERS_WARMUP = 20
"""Epochs of the authors' 240."""


class Parameters(base.Parameters):
    tau: float | None = Field(None, gt=0, description="τ; none: 4, or 2 with standardise")
    alpha: float = Field(1.0, ge=0, description="α, the weight of the label against the rest")
    beta: float = Field(8.0, ge=0, description="β, the weight of the rest among themselves")
    warmup: int | None = Field(
        None, ge=0, description="epochs over which the loss grows to its weight; none: 20 of every 240"
    )
    standardise: bool = Field(False, description="z-score both logits first")

    def for_epochs(self, epochs: int) -> "Parameters":
        if self.warmup is not None:
            return self
        return self.model_copy(update={"warmup": min(PAPERS_WARMUP, ceil(epochs * PAPERS_WARMUP / 240))})


class Dkd(LogitMethod):
    """Match the label's probability and the others' separately; see the module's text for the formula."""

    name = "dkd"
    paper = "Zhao et al., CVPR 2022, arXiv 2203.08679"
    takes = Parameters
    weights = frozenset({"alpha", "beta"})
    # About a third to three times of what the authors' weight (β = 2) gives for resnet56 → resnet20: 4.7.
    pull = (1.5, 14.0)

    @classmethod
    def not_multi_label(cls, parameters: Parameters) -> str | None:
        return "it takes the one label of an image apart from all other classes"

    def __init__(
        self,
        parameters: Parameters,
        student: base.Shapes,
        teachers: Sequence[base.Shapes],
        prepared: Mapping[str, Tensor],
    ) -> None:
        super().__init__(parameters, student, teachers, prepared)
        self.parameters_ = parameters
        self.tau = parameters.tau or (2.0 if parameters.standardise else 4.0)
        self.weight = 9.0 if parameters.standardise else 1.0

    def forward(
        self,
        student: base.Features,
        teachers: Sequence[base.Features],
        labels: Tensor,
        epoch: int,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        p = self.parameters_
        z_t = teacher_logits(teachers, self.tau, p.standardise) / self.tau
        z_s = exact(student["logits"])
        z_s = (standardised(z_s) if p.standardise else z_s) / self.tau
        b_t, q_t = decoupled(z_t, labels)
        b_s, q_s = decoupled(z_s, labels)
        parts = p.alpha * divergence(b_s, b_t) + p.beta * divergence(q_s, q_t)
        return {"dkd": self.strength(epoch) * self.weight * self.tau**2 * parts}

    def strength(self, epoch: int) -> float:
        warmup = PAPERS_WARMUP if self.parameters_.warmup is None else self.parameters_.warmup
        return min(1.0, (epoch + 1) / warmup) if warmup else 1.0


def decoupled(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B,N] as log b [B,2], the label against the rest, and log q [B,N−1], among the rest."""
    log_p = F.log_softmax(z, dim=1)
    # Numbers of the other classes [B,N−1]; gathered, since a mask would make the host wait for the device.
    others = torch.arange(z.shape[1] - 1, device=z.device)
    others = others + (others >= labels[:, None])
    log_rest = log_p.gather(1, others).logsumexp(1, keepdim=True)
    log_b = torch.cat([log_p.gather(1, labels[:, None]), log_rest], dim=1)
    return log_b, F.log_softmax(z.gather(1, others), dim=1)
