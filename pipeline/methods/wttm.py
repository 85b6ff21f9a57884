"""WTTM: the student at temperature 1 matches the teacher's distribution after a power transform.

Zheng, Yang: "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024, arXiv 2402.11148. With
p = softmax(z):

    L = β · mean over images of U · KL(p_T^γ/U ‖ p_S) + CE      U = Σ over classes of p_T^γ

p_T^γ/U is the teacher softened at τ = 1/γ, as in KD. The student is not softened, which adds to KD a penalty
on the Rényi entropy of its distribution. U is 1 for a teacher that is certain and grows with its uncertainty,
so uncertain targets weigh more.

γ = 0.2 and β = 4 are those of the authors' repository for vgg13 → vgg8 in a sum; the paper has others for
each pair. U is at most N^(1−γ), 40 for 100 classes and 6 for ten, so β depends on the number of classes:
``--balance auto`` scales it.

Several teachers: their softened probabilities are averaged as in KD, and p_T is the distribution whose power
transform is this average.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from . import base
from .logits import LogitMethod, divergence, student_logits, teacher_logits


class Parameters(base.Parameters):
    gamma: float = Field(0.2, gt=0, le=1, description="γ, the exponent of the teacher's probabilities")
    beta: float = Field(4.0, gt=0, description="β, the weight of the loss")


class Wttm(LogitMethod):
    """Match the power transform of the teacher; the formula is in the module's docstring."""

    name = "wttm"
    paper = "Zheng & Yang, ICLR 2024, arXiv 2402.11148"
    parameters_class = Parameters
    weights = frozenset({"beta"})
    # A third to three times the ratio of β = 4 for resnet56 → resnet20 on CIFAR-10, 4.3.
    gradient_ratio = (1.5, 13.0)
    exclusive = "it transforms probabilities of mutually exclusive classes"

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.gamma, self.beta = parameters.gamma, parameters.beta

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        log_p_s = F.log_softmax(student_logits(batch.student), dim=1)
        powers = self.gamma * F.log_softmax(teacher_logits(batch.teachers, 1 / self.gamma), dim=1)
        u = powers.logsumexp(1).exp()
        return {"wttm": self.beta * (u * divergence(log_p_s, powers.log_softmax(1))).mean()}
