"""FEED: feature-level ensemble, the student's map translated into each teacher's.

Park, Kwak: "FEED: Feature-level Ensemble for Knowledge Distillation", ECAI 2020, arXiv 1909.10754. A
transform of its own for each teacher T_i turns the student's last map x_S into that teacher's x_Ti, used
raw; only the directions of the flattened maps are compared:

    L = β · Σ_i 1/√n_i · ‖ x_Ti/‖x_Ti‖₂ − NTL_i(x_S)/‖NTL_i(x_S)‖₂ ‖₁      n_i = C·H·W of x_Ti

The factor 1/√n_i is ours: between unit vectors the sum of absolute differences grows as √n, and with it one
β serves maps of every size. The values of the method it is built on, Factor Transfer (Kim et al., NeurIPS
2018), weigh the mean over n numbers: its 500 for n = 4,096 (CIFAR) and 1000 for n = 12,544 (ImageNet) are
β = 7.8 and 8.9 here. The default is midway.

NTL_i, dropped afterwards: three 3×3 convolutions C_S → C_S → C_Ti → C_Ti, each followed by LeakyReLU(0.1).
Ours, where the paper leaves it open: these channels; no BatchNorm, as in Factor Transfer's code, from which
the values of β are (``norm`` adds it); Kaiming's initialisation; the ``linear`` transform to compare with,
one 1×1 convolution; that the finer of two maps is average-pooled to the coarser's grid; and that the maps are
those after the last activation, of a VGG too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from . import base
from .quest.vocabulary import pooled, shared_grid

SLOPE = 0.1
"""Of LeakyReLU below zero."""

UNIT = "map.unit"
"""The name of a stored map."""


RECONSTRUCTION = "reconstruction_error"
"""Under which the error of a teacher is watched; with several its number follows in brackets."""


class Parameters(base.Parameters):
    beta: float = Field(8.4, gt=0, description="β")
    transform: Literal["nonlinear", "linear"] = Field(
        "nonlinear", description="three 3×3 convolutions with LeakyReLU, or one 1×1 convolution"
    )
    norm: bool = Field(False, description="BatchNorm after each convolution of the transform")


class Feed(base.Method):
    """Translate the student's map into each teacher's; see the module's text for the formula."""

    name = "feed"
    paper = "Park, Kwak, ECAI 2020, arXiv 1909.10754"
    takes = Parameters
    weights = frozenset({"beta"})
    # As strong as the labels: for resnet56 → resnet20 on CIFAR-10 the parent method's weight gives 0.13, and
    # ten times of it did better by 4 points (docs/benchmarks.md).
    pull = (1.0, 8.0)

    @classmethod
    def reads(cls, parameters: Parameters, network: base.Shapes) -> frozenset[str]:
        return frozenset({"map"})

    @classmethod
    def stored_bytes(cls, parameters: Parameters, student: base.Shapes, teacher: base.Shapes) -> int:
        return _answer(student, teacher).bytes_per_image

    def __init__(
        self,
        parameters: Parameters,
        student: base.Shapes,
        teachers: Sequence[base.Shapes],
        prepared: Mapping[str, Tensor],
    ) -> None:
        super().__init__(parameters, student, teachers, prepared)
        self.beta = parameters.beta
        self.student = student
        self.grids = [shared_grid(student.maps["map"], teacher.maps["map"]) for teacher in teachers]
        channels = student.maps["map"][0]
        self.transforms = nn.ModuleList(
            transform(parameters, channels, teacher.maps["map"][0]) for teacher in teachers
        )
        self.watch = base.RunningSums()

    def forward(
        self,
        student: base.Features,
        teachers: Sequence[base.Features],
        labels: Tensor,
        epoch: int,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        parts = zip(self.transforms, self.grids, teachers, strict=True)
        errors = [
            error(x_t[UNIT] if UNIT in x_t else pooled(x_t["map"], grid), ntl(pooled(student["map"], grid)))
            for ntl, grid, x_t in parts
        ]
        each = torch.stack([one.mean() for one in errors])
        self.watch.add(images=each.new_tensor(len(labels)), errors=each * len(labels))
        return {"feed": self.beta * each.sum()}

    def answers(self, t: int) -> Sequence[base.CachedOutput]:
        return [_answer(self.student, self.of_teachers[t][0])]

    def watched(self) -> dict[str, Tensor]:
        """The reconstruction error of each teacher: 0 is its very direction, about 1.1 a random one."""
        sums = self.watch.take()
        if not sums:
            return {}
        means = sums["errors"] / sums["images"]
        one = len(means) == 1
        return {RECONSTRUCTION if one else f"{RECONSTRUCTION} ({t})": mean for t, mean in enumerate(means)}


def transform(parameters: Parameters, channels: int, of_teacher: int) -> nn.Sequential:
    """NTL_i from the student's channels C_S to the teacher's C_T; maps [B,C_S,H,W] to [B,C_T,H,W]."""
    if parameters.transform == "linear":
        plan, size = [(channels, of_teacher)], 1
    else:
        plan, size = [(channels, channels), (channels, of_teacher), (of_teacher, of_teacher)], 3
    layers: list[nn.Module] = []
    for wide_in, wide_out in plan:
        convolution = nn.Conv2d(wide_in, wide_out, size, padding=size // 2, bias=not parameters.norm)
        nn.init.kaiming_normal_(convolution.weight, a=SLOPE if size == 3 else 1.0)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
        layers.append(convolution)
        if parameters.norm:
            layers.append(nn.BatchNorm2d(wide_out))
        if parameters.transform == "nonlinear":
            layers.append(nn.LeakyReLU(SLOPE))
    return nn.Sequential(*layers)


def error(x_t: Tensor, translated: Tensor) -> Tensor:
    """1/√n · ‖ x_T/‖x_T‖ − y/‖y‖ ‖₁ of each sample: [B], fp32 or better, from maps [B,C,H,W].

    A teacher's map of nothing but zeros has no direction and teaches nothing: 0.
    """
    target, answer = unit(x_t), unit(translated)
    differences = (target - answer).abs().sum(1) / math.sqrt(target.shape[1])
    return torch.where(target.any(1), differences, 0.0)


def unit(x: Tensor) -> Tensor:
    """Maps [B,C,H,W], flattened and of length 1: [B,C·H·W], fp32 or better; zeros stay zeros."""
    with torch.autocast(x.device.type, enabled=False):
        flat = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1)
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        return flat / torch.where(length > 0, length, 1.0)


def _answer(student: base.Shapes, teacher: base.Shapes) -> base.CachedOutput:
    """A teacher's map at the common grid, in half precision; scaled to a root mean square of 1, so that it
    cannot overflow: the loss looks at its direction alone.
    """
    channels = teacher.maps["map"][0]
    grid = shared_grid(student.maps["map"], teacher.maps["map"])
    shape = (channels, *grid)

    def compact(readout: base.Features) -> dict[str, Tensor]:
        scaled = unit(pooled(readout["map"], grid)) * math.sqrt(math.prod(shape))
        return {UNIT: scaled.unflatten(1, shape).half()}

    return base.CachedOutput(
        key={"readout": "map", "scaled": "unit root mean square", "grid": list(grid)},
        reads=frozenset({"map"}),
        arrays={UNIT: (shape, "float16")},
        compact=compact,
    )
