"""KD: the student matches the teacher's softened probabilities.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.

    L = b · τ² · KL(softmax(z_T/τ) ‖ softmax(z_S/τ)) + a · CE

with a = 0.1, b = 0.9, τ = 4 as in the CRD benchmark (Tian et al., ICLR 2020) on CIFAR. With ``standardize``
both logits are z-scored first (Sun et al., CVPR 2024), and the defaults are that paper's: τ = 2, b = 9.

For multi-label images, each class has its own probability σ(z/τ), and the divergence is that of the binary
probabilities (σ, 1 − σ), summed over the classes as in Yang et al., "Multi-Label Knowledge Distillation",
ICCV 2023 (MLD), but with τ. The cross-entropy is a sum as well, so the weights of the two terms stay.
Multi-label logits cannot be standardized: a zero would no longer mean a probability of one half.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..config import TaskName
from . import base, logits


class Parameters(base.Parameters):
    tau: float | None = Field(None, gt=0, description="τ; none: 4, or 2 with standardize")
    weight: float | None = Field(None, gt=0, description="b; none: 0.9, or 9 with standardize")
    standardize: bool = Field(False, description="z-score both logits first")


class Kd(logits.LogitMethod):
    """Match the teacher's softened probabilities; the formula is in the module's docstring."""

    name = "kd"
    paper = "Hinton et al., 2015, arXiv 1503.02531"
    parameters_class = Parameters
    cross_entropy = 0.1
    weights = frozenset({"weight"})
    # A third to three times the ratio of the authors' weight for resnet56 → resnet20 on CIFAR-10, 2.9.
    gradient_ratio = (1.0, 9.0)

    @classmethod
    def unsupported(cls, parameters: Parameters, task: TaskName) -> str | None:
        if task == "detection":
            return "it compares the logits of whole images"
        reason = "standardize=true removes the zero of the logits"
        return reason if parameters.standardize and task != "classification" else None

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.standardize = parameters.standardize
        self.tau = parameters.tau or (2.0 if self.standardize else 4.0)
        self.weight = parameters.weight or (9.0 if self.standardize else 0.9)

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        z_s = logits.student_logits(batch.student, self.standardize)
        if batch.labels.ndim == 2:
            z_t = logits.binary_teacher_logits(batch.teachers, self.tau)
            kl = logits.binary_divergence(z_s / self.tau, z_t / self.tau)
        else:
            z_t = logits.teacher_logits(batch.teachers, self.tau, self.standardize)
            kl = logits.divergence(F.log_softmax(z_s / self.tau, dim=1), F.log_softmax(z_t / self.tau, dim=1))
        return {"kd": self.weight * self.tau**2 * kl.mean()}
