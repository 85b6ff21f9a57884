"""ITRD: the student's vector correlates with the teacher's, and images are as similar in both.

Miles, Lopez-Rodriguez, Mikolajczyk: "Information Theoretic Representation Distillation", BMVC 2022, arXiv
2112.00459. With f_T [B,D_T] the teacher's penultimate vectors and f_S [B,D_T] a linear projection of the
student's, both losses come from Rényi's α-entropy of matrices:

    L_corr = log₂ Σ over the D_T dimensions of |1 − c|^(2α)
    L_mi   = mean over pairs of images of k_S²·(1 − k_T²)
    L      = λ_corr·L_corr + λ_mi·L_mi + CE

c is the correlation of a dimension in both, over the batch. k is the cosine of two images' vectors: images
that are similar for the student should be similar for the teacher. L_corr may be negative.

α = 1.01, λ_corr = 2 and λ_mi = 1 are those of the authors' example for wrn_40_2 → wrn_16_2; the defaults of
their code are α = 1.5 and λ_mi = 0.05. As in their code:

- c = (B − 1)/B · ρ with ρ Pearson's correlation, so the logarithm is finite even if ρ = 1;
- the projection is always part of L_corr, and of L_mi if D_S ≠ D_T.

Our choices: a dimension that is constant in the batch, such as one after a dead ReLU, has c = 0. With several
teachers, each has its own projection, and the loss is the mean over them.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import TaskName
from . import base


class Parameters(base.Parameters):
    correlation: float = Field(2.0, ge=0, description="λ_corr, the weight of the correlation")
    mutual: float = Field(1.0, ge=0, description="λ_mi, the weight of the mutual information")
    alpha: float = Field(1.01, gt=0.5, description="α, the order of the entropy of L_corr")


class Itrd(base.Method):
    """Match correlations and similarities of vectors; the formulas are in the module's docstring."""

    name = "itrd"
    paper = "Miles et al., BMVC 2022, arXiv 2112.00459"
    parameters_class = Parameters
    weights = frozenset({"correlation", "mutual"})
    # A third to three times the ratio of the default weights for resnet56 → resnet20 on CIFAR-10, 2.5.
    gradient_ratio = (0.8, 7.5)

    @classmethod
    def unsupported(cls, parameters: Parameters, task: TaskName) -> str | None:
        return "it compares the vectors of whole images" if task == "detection" else None

    @classmethod
    def reads(cls, parameters: Parameters, network: base.Shapes) -> frozenset[str]:
        return frozenset({"vector"})

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.correlation, self.mutual = parameters.correlation, parameters.mutual
        self.alpha = parameters.alpha
        d_s, widths = setup.student.vector or 0, [teacher.vector or 0 for teacher in setup.teachers]
        self.projects_all = [d_t != d_s for d_t in widths]
        self.projections = nn.ModuleList(nn.Linear(d_s, d_t) for d_t in widths)
        self.sums = base.RunningSums()

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        raw, losses = batch.student["vector"], []
        for projection, always, teacher in zip(
            self.projections, self.projects_all, batch.teachers, strict=True
        ):
            projected = projection(raw)
            c = correlate(projected, teacher["vector"])
            mutual = mutual_loss(projected if always else raw, teacher["vector"])
            l_corr = (1 - c).abs().pow(2 * self.alpha).sum().log2()
            losses.append(self.correlation * l_corr + self.mutual * mutual)
            self.sums.add(vector_correlation=c.mean(), batches=c.new_ones(()))
        return {"itrd": torch.stack(losses).mean()}

    def metrics(self) -> dict[str, Tensor]:
        sums = self.sums.take()
        return {"vector_correlation": sums["vector_correlation"] / sums["batches"]} if sums else {}


def correlate(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the correlation c [D] of each dimension of vectors [B,D] over the batch, in fp32 or wider."""
    return (base.standardize(student, 0) * base.standardize(teacher, 0)).mean(0)


def mutual_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of k_S²·(1 − k_T²) over pairs of images, from vectors [B,D_S] and [B,D_T]."""
    k_s, k_t = (cosines(f) for f in (student, teacher))
    return (k_s.square() * (1 - k_t.square())).mean()


def cosines(f: Tensor) -> Tensor:
    """Return the cosines [B,B] of vectors [B,D], in fp32 or wider even under autocast."""
    with torch.autocast(f.device.type, enabled=False):
        unit = F.normalize(base.to_fp32(f), dim=1)
        return unit @ unit.T
