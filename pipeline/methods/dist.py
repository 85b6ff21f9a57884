"""DIST: the student matches how classes and images relate, not the probabilities themselves.

Huang, You, Wang, Qian, Xu: "Knowledge Distillation from a Stronger Teacher", NeurIPS 2022, arXiv 2205.10536,
eq. 9 to 11:

    L = w · τ² · [ mean_i (1 − ρ(p_T[i,:], p_S[i,:])) + mean_c (1 − ρ(p_T[:,c], p_S[:,c])) ] + CE

with p = softmax(z/τ) [B,N] and ρ Pearson's correlation: over the classes of an image, and over the batch of a
class. On CIFAR w = 2, τ = 4; on ImageNet τ = 1.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from . import base
from .logits import LogitMethod, exact, teacher_logits


class Parameters(base.Parameters):
    tau: float = Field(4.0, gt=0, description="τ")
    inter: float = Field(2.0, ge=0, description="weight of the relations among an image's classes")
    intra: float = Field(2.0, ge=0, description="weight of the relations among a class's images")


class Dist(LogitMethod):
    """Match correlations; see the module's text for the formula."""

    name = "dist"
    paper = "Huang et al., NeurIPS 2022, arXiv 2205.10536"
    takes = Parameters
    weights = frozenset({"inter", "intra"})
    # About a third to three times of what the authors' weight gives for resnet56 → resnet20 on CIFAR-10: 13.
    pull = (4.0, 40.0)

    @classmethod
    def not_multi_label(cls, parameters: Parameters) -> str | None:
        return "it relates probabilities of classes that exclude each other"

    def __init__(
        self,
        parameters: Parameters,
        student: base.Shapes,
        teachers: Sequence[base.Shapes],
        prepared: Mapping[str, Tensor],
    ) -> None:
        super().__init__(parameters, student, teachers, prepared)
        self.tau, self.inter, self.intra = parameters.tau, parameters.inter, parameters.intra

    def forward(
        self,
        student: base.Features,
        teachers: Sequence[base.Features],
        labels: Tensor,
        epoch: int,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        p_t = F.softmax(teacher_logits(teachers, self.tau) / self.tau, dim=1)
        p_s = F.softmax(exact(student["logits"]) / self.tau, dim=1)
        relations = self.inter * uncorrelated(p_s, p_t) + self.intra * uncorrelated(p_s.T, p_t.T)
        return {"dist": self.tau**2 * relations}


def uncorrelated(a: Tensor, b: Tensor) -> Tensor:
    """1 − ρ of each row of a with that of b, the mean over rows; [n,m] both."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (1 - F.cosine_similarity(a, b, dim=1, eps=1e-8)).mean()
