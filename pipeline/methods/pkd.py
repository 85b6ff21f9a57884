"""PKD: the student's feature maps correlate with the teacher's, channel by channel.

Cao et al.: "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
NeurIPS 2022, arXiv 2207.02039. With F̂ a map [B,C,H,W] whose channels are normalized to mean 0 and variance 1
over B·H·W:

    L = α · Σ over levels of mean over B·C·H·W of ½(F̂_S − F̂_T)²

½(F̂_S − F̂_T)² is on average 1 − r, with r the Pearson correlation of a channel in both maps. So neither scale
nor offset of a channel matters, and teacher and student may be detectors of different kinds. In a detector,
the levels are those of its feature pyramid; in a classifier, the last map.

α is 10, the authors' weight for one-stage detectors. A student's map of another size is resized to the
teacher's. Maps must have as many channels as the teacher's: PKD has no projection.

Our choices: all five levels of the pyramid, of which the authors' configurations in MMRazor have the four
finest; α = 10 for Faster R-CNN as well, where they have 6. With several teachers, the loss is the mean.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from . import base


class Parameters(base.Parameters):
    alpha: float = Field(10.0, gt=0, description="α, the weight of the loss")


class Pkd(base.Method):
    """Correlate the feature maps; the formula is in the module's docstring."""

    name = "pkd"
    paper = "Cao et al., NeurIPS 2022, arXiv 2207.02039"
    parameters_class = Parameters
    weights = frozenset({"alpha"})

    @classmethod
    def reads(cls, parameters: Parameters, network: base.Shapes) -> frozenset[str]:
        return frozenset(network.pyramid or ("map",))

    @classmethod
    def check(cls, parameters: Parameters, setup: base.Setup, images: int) -> None:
        for teacher in setup.teachers:
            for read in sorted(cls.reads(parameters, setup.student)):
                (ours, *_), theirs = setup.student.maps[read], teacher.maps.get(read)
                if theirs is None or theirs[0] != ours:
                    channels = "no such map" if theirs is None else f"{theirs[0]}"
                    raise UsageError(
                        f"--method pkd compares maps of equal width, and {read} has {ours} channels in the "
                        f"student and {channels} in the teacher. Use --method quest, which needs no equal "
                        "widths, or another student."
                    )

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.alpha = parameters.alpha
        self.sums = base.RunningSums()

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        losses = []
        for teacher in batch.teachers:
            levels = [
                correlation_loss(batch.student[read], teacher[read]) for read in sorted(self.reads_of_student)
            ]
            losses.append(torch.stack(levels).sum())
            mean = torch.stack(levels).mean().detach()
            self.sums.add(correlation=1 - mean, batches=torch.ones_like(mean))
        return {"pkd": self.alpha * torch.stack(losses).mean()}

    def metrics(self) -> dict[str, Tensor]:
        sums = self.sums.take()
        return {"correlation": sums["correlation"] / sums["batches"]} if sums else {}


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of ½(F̂_S − F̂_T)² of two maps [B,C,H,W], in fp32."""
    student, teacher = base.to_fp32(student), base.to_fp32(teacher)
    if student.shape[-2:] != teacher.shape[-2:]:
        student = F.interpolate(student, teacher.shape[-2:], mode="bilinear")
    return F.mse_loss(base.standardize(student, 0, 2, 3), base.standardize(teacher, 0, 2, 3)) / 2
