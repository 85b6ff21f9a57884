"""SDD: DKD's loss for the logits of the whole map and of its cells, ambiguous cells weighted more.

Wei, Luo, Luo: "Scale Decoupled Distillation", CVPR 2024, arXiv 2403.13512. The classifier is applied to the
mean of the last map over all positions, over each of 2×2 cells and over each of 4×4 cells:

    L = min(1, epoch/20) · mean over images and cells of w · τ² · (α · KL(b_T ‖ b_S) + β · KL(q_T ‖ q_S)) + CE

with b and q of DKD (``dkd.py``). A cell is complementary if the teacher classifies either the cell or the
whole image correctly, but not both; then w = 2. Otherwise it is consistent, and w = 1. α, β, τ, the warm-up
and ``standardize`` are DKD's. The authors have cells down to 4×4 for networks of different kinds and down to
2×2 for similar ones (``finest``). They apply the same to KD, with lower figures for most of their pairs.

Our choices: the cells of the authors' code are means of the 4×4 ones, here they are means of the map, so that
the first is the network's logits also if 4 does not divide the map's size. As in DKD, the label of an image
without one is the teacher's prediction: a cell of it is complementary if its prediction is another one.
"""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from ...models.pooling import CELL_GRIDS
from . import base, dkd
from .logits import student_logits, teacher_logits


class Parameters(dkd.Parameters):
    finest: int = Field(4, multiple_of=2, ge=2, le=4, description="cells a side of the finest grid, 2 or 4")
    complementary: float = Field(2.0, ge=0, description="w of complementary cells")

    @property
    def cells(self) -> int:
        return sum(grid**2 for grid in CELL_GRIDS if grid <= self.finest)


class Sdd(dkd.Dkd):
    """Match the logits of cells; the formula is in the module's docstring."""

    name = "sdd"
    paper = "Wei, Luo, Luo, CVPR 2024, arXiv 2403.13512"
    parameters_class = Parameters
    # A third to three times the ratio of the authors' weight (β = 2, 2×2) for resnet56 → resnet20, 5.3.
    gradient_ratio = (1.8, 16.0)

    @classmethod
    def reads(cls, parameters: base.Parameters, network: base.Shapes) -> frozenset[str]:
        return frozenset({"cells"})

    @classmethod
    def cached_bytes(cls, parameters: Parameters, student: base.Shapes, teacher: base.Shapes) -> int:
        return super().cached_bytes(parameters, student, replace(teacher, cells=parameters.cells))

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.cells, self.complementary = parameters.cells, parameters.complementary
        self.teacher_shapes = [replace(teacher, cells=self.cells) for teacher in setup.teachers]

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        z_t = teacher_logits([self._flatten(f) for f in batch.teachers], self.tau, self.standardize)
        z_s = student_logits(self._flatten(batch.student), self.standardize)
        images = len(z_t) // self.cells
        labels = batch.complete_labels(z_t.view(images, self.cells, -1)[:, 0])[:, None].expand(-1, self.cells)
        correct = z_t.argmax(1).view(images, self.cells) == labels
        w = torch.where(correct != correct[:, :1], self.complementary, 1.0).flatten()
        loss = (w * self.compare(z_s, z_t, labels.flatten())).mean()
        return {"sdd": self.warmup_factor(batch.epoch) * loss}

    def _flatten(self, features: base.Features) -> dict[str, Tensor]:
        """Return logits [B·cells,N], the cells of an image one after the other."""
        return {"logits": features["cells"][:, : self.cells].flatten(0, 1)}
