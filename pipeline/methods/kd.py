"""KD: the student matches the teacher's softened probabilities.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.

    L = b · τ² · KL(softmax(z_T/τ) ‖ softmax(z_S/τ)) + a · CE

with a = 0.1, b = 0.9, τ = 4 as the CRD benchmark (Tian et al., ICLR 2020) has them on CIFAR. With
``standardise`` both logits are z-scored first (Sun et al., CVPR 2024), and the defaults are that paper's:
τ = 2, b = 9.

Where images have several labels, classes don't exclude each other: each has a probability of its own, σ(z/τ),
and the divergence is that of these binary ones, (σ, 1 − σ), summed over the classes as in Yang et al.,
"Multi-Label Knowledge Distillation", ICCV 2023 (MLD), but with τ; the cross-entropy is a sum there, too. The
weights of the two terms stay. Logits cannot be standardised: a zero would no longer mean even chances.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from . import base
from .logits import (
    LogitMethod,
    binary_divergence,
    binary_teacher_logits,
    divergence,
    exact,
    standardised,
    teacher_logits,
)


class Parameters(base.Parameters):
    tau: float | None = Field(None, gt=0, description="τ; none: 4, or 2 with standardise")
    weight: float | None = Field(None, gt=0, description="b; none: 0.9, or 9 with standardise")
    standardise: bool = Field(False, description="z-score both logits first")


class Kd(LogitMethod):
    """Match the teacher's softened probabilities; see the module's text for the formula."""

    name = "kd"
    paper = "Hinton et al., 2015, arXiv 1503.02531"
    takes = Parameters
    cross_entropy = 0.1
    weights = frozenset({"weight"})
    # About a third to three times of what the authors' weight gives for resnet56 → resnet20 on CIFAR-10: 2.9.
    pull = (1.0, 9.0)

    @classmethod
    def not_multi_label(cls, parameters: Parameters) -> str | None:
        return "with standardise=true it frees logits from their zero" if parameters.standardise else None

    def __init__(
        self,
        parameters: Parameters,
        student: base.Shapes,
        teachers: Sequence[base.Shapes],
        prepared: Mapping[str, Tensor],
    ) -> None:
        super().__init__(parameters, student, teachers, prepared)
        self.standardise = parameters.standardise
        self.tau = parameters.tau or (2.0 if self.standardise else 4.0)
        self.weight = parameters.weight or (9.0 if self.standardise else 0.9)

    def forward(
        self,
        student: base.Features,
        teachers: Sequence[base.Features],
        labels: Tensor,
        epoch: int,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if labels.ndim == 2:
            z_t = binary_teacher_logits(teachers, self.tau)
            divergences = binary_divergence(exact(student["logits"]) / self.tau, z_t / self.tau)
            return {"kd": self.weight * self.tau**2 * divergences}
        z_t = teacher_logits(teachers, self.tau, self.standardise)
        z_s = exact(student["logits"])
        z_s = standardised(z_s) if self.standardise else z_s
        log_p_t, log_p_s = F.log_softmax(z_t / self.tau, dim=1), F.log_softmax(z_s / self.tau, dim=1)
        return {"kd": self.weight * self.tau**2 * divergence(log_p_s, log_p_t)}
