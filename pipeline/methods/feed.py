"""FEED: feature-level ensemble, the student's map translated into each teacher's.

Park, Kwak: "FEED: Feature-level Ensemble for Knowledge Distillation", ECAI 2020, arXiv 1909.10754. For each
teacher T_i, a nonlinear transform turns the student's last map x_S into that teacher's raw map x_Ti. Only the
directions of the flattened maps are compared:

    L = β · Σ_i 1/√n_i · ‖ x_Ti/‖x_Ti‖₂ − NTL_i(x_S)/‖NTL_i(x_S)‖₂ ‖₁      n_i = C·H·W of x_Ti

The factor 1/√n_i is ours: between unit vectors the sum of absolute differences grows as √n, so with the
factor one β fits maps of every size. The values of the method it is based on, Factor Transfer (Kim et al.,
NeurIPS 2018), weight the mean over n numbers: its 500 for n = 4,096 (CIFAR) and 1000 for n = 12,544
(ImageNet) are β = 7.8 and 8.9 here. The default is midway.

NTL_i, dropped afterwards: three 3×3 convolutions C_S → C_S → C_Ti → C_Ti, each followed by LeakyReLU(0.1).
The paper leaves open, and we chose: these channels; no BatchNorm, as in the Factor Transfer code that the
values of β come from (``norm`` adds it); Kaiming initialization; the ``linear`` transform for comparison, one
1×1 convolution; average pooling of the finer map to the coarser grid; and maps after the last activation,
also for a VGG.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import TaskName
from . import base

NEGATIVE_SLOPE = 0.1

CACHED_MAP = "map.unit"
"""Name of the teacher's map in the teacher cache."""

RECONSTRUCTION = "reconstruction_error"
"""Name of the metric; with several teachers their index follows in parentheses."""


class Parameters(base.Parameters):
    beta: float = Field(8.4, gt=0, description="β")
    transform: Literal["nonlinear", "linear"] = Field(
        "nonlinear", description="three 3×3 convolutions with LeakyReLU, or one 1×1 convolution"
    )
    norm: bool = Field(False, description="BatchNorm after each convolution of the transform")


class Feed(base.Method):
    """Translate the student's map into each teacher's; the formula is in the module's docstring."""

    name = "feed"
    paper = "Park, Kwak, ECAI 2020, arXiv 1909.10754"
    parameters_class = Parameters
    weights = frozenset({"beta"})
    # As strong as the labels: for resnet56 → resnet20 on CIFAR-10 the weight of Factor Transfer gives 0.13,
    # and ten times that weight was 4 points better (docs/benchmarks.md).
    gradient_ratio = (1.0, 8.0)

    @classmethod
    def unsupported(cls, parameters: Parameters, task: TaskName) -> str | None:
        return "it translates the last map of a classifier" if task == "detection" else None

    @classmethod
    def reads(cls, parameters: Parameters, network: base.Shapes) -> frozenset[str]:
        return frozenset({"map"})

    @classmethod
    def cached_bytes(cls, parameters: Parameters, student: base.Shapes, teacher: base.Shapes) -> int:
        return _cached_map(student, teacher).bytes_per_image

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.beta = parameters.beta
        maps, student = [teacher.maps["map"] for teacher in setup.teachers], setup.student.maps["map"]
        self.grids = [base.shared_grid(student, teacher) for teacher in maps]
        self.transforms = nn.ModuleList(build_transform(parameters, student[0], c_t) for c_t, *_ in maps)
        self.sums = base.RunningSums()

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        means = []
        for ntl, grid, teacher in zip(self.transforms, self.grids, batch.teachers, strict=True):
            x_t = teacher[CACHED_MAP] if CACHED_MAP in teacher else base.pool(teacher["map"], grid)
            means.append(direction_error(x_t, ntl(base.pool(batch.student["map"], grid))).mean())
        errors, images = torch.stack(means), len(batch.student["map"])
        self.sums.add(images=errors.new_full((), images), errors=errors * images)
        return {"feed": self.beta * errors.sum()}

    def cached_outputs(self, t: int) -> Sequence[base.CachedOutput]:
        return [_cached_map(self.student_shapes, self.teacher_shapes[t])]

    def metrics(self) -> dict[str, Tensor]:
        """Return the error per teacher: 0 for the same direction, about 1.1 for a random one."""
        sums = self.sums.take()
        if not sums:
            return {}
        means = sums["errors"] / sums["images"]
        names = [RECONSTRUCTION if len(means) == 1 else f"{RECONSTRUCTION} ({t})" for t in range(len(means))]
        return dict(zip(names, means, strict=True))


def build_transform(parameters: Parameters, c_s: int, c_t: int) -> nn.Sequential:
    """Build NTL_i, from maps [B,C_S,H,W] to [B,C_T,H,W]."""
    linear = parameters.transform == "linear"
    channels, size = ([(c_s, c_t)], 1) if linear else ([(c_s, c_s), (c_s, c_t), (c_t, c_t)], 3)
    layers: list[nn.Module] = []
    for c_in, c_out in channels:
        convolution = nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=not parameters.norm)
        nn.init.kaiming_normal_(convolution.weight, a=1.0 if linear else NEGATIVE_SLOPE)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
        layers += [convolution, *([nn.BatchNorm2d(c_out)] if parameters.norm else [])]
        layers += [] if linear else [nn.LeakyReLU(NEGATIVE_SLOPE)]
    return nn.Sequential(*layers)


def direction_error(x_t: Tensor, translated: Tensor) -> Tensor:
    """Return 1/√n · ‖ x_T/‖x_T‖ − y/‖y‖ ‖₁ of each sample [B], in fp32 or wider, from maps [B,C,H,W].

    A teacher's map of zeros has no direction; its error is 0.
    """
    target, output = to_unit(x_t), to_unit(translated)
    differences = (target - output).abs().sum(1) / math.sqrt(target.shape[1])
    return torch.where(target.any(1), differences, 0.0)


def to_unit(x: Tensor) -> Tensor:
    """Flatten maps [B,C,H,W] and scale them to length 1: [B,C·H·W], fp32 or wider. Zeros stay zeros."""
    with torch.autocast(x.device.type, enabled=False):
        flat = base.to_fp32(x).flatten(1)
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        return flat / torch.where(length > 0, length, 1.0)


def _cached_map(student: base.Shapes, teacher: base.Shapes) -> base.CachedOutput:
    """Return the teacher's map on the shared grid in fp16, scaled to a root mean square of 1.

    The scale prevents overflow and does not matter to the loss, which compares directions.
    """
    grid = base.shared_grid(student.maps["map"], teacher.maps["map"])
    shape = (teacher.maps["map"][0], *grid)

    def compact(features: base.Features) -> dict[str, Tensor]:
        scaled = to_unit(base.pool(features["map"], grid)) * math.sqrt(math.prod(shape))
        return {CACHED_MAP: scaled.unflatten(1, shape).half()}

    return base.CachedOutput(
        key={"readout": "map", "scaled": "unit root mean square", "grid": list(grid)},
        reads=frozenset({"map"}),
        arrays={CACHED_MAP: (shape, "float16")},
        compact=compact,
    )
