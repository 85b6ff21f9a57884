"""DIST: the student matches correlations of the teacher's probabilities, not the probabilities themselves.

Huang, You, Wang, Qian, Xu: "Knowledge Distillation from a Stronger Teacher", NeurIPS 2022, arXiv 2205.10536,
eq. 9 to 11:

    L = w · τ² · [ mean_i (1 − ρ(p_T[i,:], p_S[i,:])) + mean_c (1 − ρ(p_T[:,c], p_S[:,c])) ] + CE

with p = softmax(z/τ) [B,N] and ρ Pearson's correlation: over the classes of an image, and over the batch of a
class. On CIFAR w = 2, τ = 4; on ImageNet τ = 1.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from . import base
from .logits import LogitMethod, student_logits, teacher_logits


class Parameters(base.Parameters):
    tau: float = Field(4.0, gt=0, description="τ")
    inter: float = Field(2.0, ge=0, description="weight of the correlation over the classes of an image")
    intra: float = Field(2.0, ge=0, description="weight of the correlation over the images of a class")


class Dist(LogitMethod):
    """Match correlations; the formula is in the module's docstring."""

    name = "dist"
    paper = "Huang et al., NeurIPS 2022, arXiv 2205.10536"
    parameters_class = Parameters
    weights = frozenset({"inter", "intra"})
    # A third to three times the ratio of the authors' weight for resnet56 → resnet20 on CIFAR-10, 13.
    gradient_ratio = (4.0, 40.0)
    exclusive = "it correlates probabilities of mutually exclusive classes"

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.tau, self.inter, self.intra = parameters.tau, parameters.inter, parameters.intra

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        p_t = F.softmax(teacher_logits(batch.teachers, self.tau) / self.tau, dim=1)
        p_s = F.softmax(student_logits(batch.student) / self.tau, dim=1)
        distances = self.inter * pearson_distance(p_s, p_t) + self.intra * pearson_distance(p_s.T, p_t.T)
        return {"dist": self.tau**2 * distances}


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 − ρ between corresponding rows of a and b [n,m], the mean over rows."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (1 - F.cosine_similarity(a, b, dim=1, eps=1e-8)).mean()
