"""DKD: KD's divergence split in two, so that the teacher's ranking of the wrong classes can weigh more.

Zhao, Cui, Song, Qiu, Liang: "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, eq. 7:

    L = min(1, epoch/20) · τ² · (α · KL(b_T ‖ b_S) + β · KL(q_T ‖ q_S)) + CE

b = (p_y, 1 − p_y) is the binary probability of the label y against the rest, q the probabilities among the
rest; both at temperature τ. The authors' β on CIFAR-100 is 8 for most pairs, 2 for resnet56/110, 6 for WRN
and VGG. With ``standardize`` both logits are z-scored first (Sun et al., CVPR 2024), with that paper's τ = 2
and a weight of 9.

Our choice for an image without a label, which the paper does not have: y is the class that the teacher finds
most probable. For an image that the teacher classifies correctly, that is its label.
"""

from math import ceil
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from . import base
from .logits import LogitMethod, divergence, student_logits, teacher_logits

WARMUP_EPOCHS = 20
"""Warm-up of the authors, who train for 240 epochs."""


class Parameters(base.Parameters):
    tau: float | None = Field(None, gt=0, description="τ; none: 4, or 2 with standardize")
    alpha: float = Field(1.0, ge=0, description="α, the weight of the label against the rest")
    beta: float = Field(8.0, ge=0, description="β, the weight of the divergence among the rest")
    warmup: int | None = Field(
        None, ge=0, description="epochs over which the loss grows to its weight; none: 20 of every 240"
    )
    standardize: bool = Field(False, description="z-score both logits first")

    def for_epochs(self, epochs: int) -> "Parameters":
        if self.warmup is not None:
            return self
        return self.model_copy(update={"warmup": min(WARMUP_EPOCHS, ceil(epochs * WARMUP_EPOCHS / 240))})


class Dkd(LogitMethod):
    """Match label and non-label probabilities separately; the formula is in the module's docstring."""

    name = "dkd"
    paper = "Zhao et al., CVPR 2022, arXiv 2203.08679"
    parameters_class: ClassVar[type[base.Parameters]] = Parameters
    weights = frozenset({"alpha", "beta"})
    # A third to three times the ratio of the authors' weight (β = 2) for resnet56 → resnet20, 4.7.
    gradient_ratio = (1.5, 14.0)
    exclusive = "it separates the one label of an image from all other classes"

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.alpha, self.beta, self.standardize = parameters.alpha, parameters.beta, parameters.standardize
        self.warmup = WARMUP_EPOCHS if parameters.warmup is None else parameters.warmup
        self.tau = parameters.tau or (2.0 if self.standardize else 4.0)
        self.weight = 9.0 if self.standardize else 1.0

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        z_t = teacher_logits(batch.teachers, self.tau, self.standardize)
        z_s = student_logits(batch.student, self.standardize)
        loss = self.compare(z_s, z_t, batch.complete_labels(z_t)).mean()
        return {"dkd": self.warmup_factor(batch.epoch) * loss}

    def compare(self, z_s: Tensor, z_t: Tensor, labels: Tensor) -> Tensor:
        """Return the loss [B] of logits [B,N] without the warm-up."""
        (b_s, q_s), (b_t, q_t) = (decouple(z / self.tau, labels) for z in (z_s, z_t))
        kl = self.alpha * divergence(b_s, b_t) + self.beta * divergence(q_s, q_t)
        return self.weight * self.tau**2 * kl

    def warmup_factor(self, epoch: int) -> float:
        return min(1.0, (epoch + 1) / self.warmup) if self.warmup else 1.0


def decouple(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split logits [B,N] into log b [B,2], the label against the rest, and log q [B,N−1], among the rest."""
    log_p = F.log_softmax(z, dim=1)
    # Indices of the other classes [B,N−1]. Indexing with a mask would synchronize with the device.
    others = torch.arange(z.shape[1] - 1, device=z.device)
    others = others + (others >= labels[:, None])
    log_rest = log_p.gather(1, others).logsumexp(1, keepdim=True)
    log_b = torch.cat([log_p.gather(1, labels[:, None]), log_rest], dim=1)
    return log_b, F.log_softmax(z.gather(1, others), dim=1)
