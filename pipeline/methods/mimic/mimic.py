"""Feature mimicking: the student's penultimate vector matches the teacher's, in value and in direction.

Wang, Ge, Wu: "Distilling Knowledge by Mimicking Features", TPAMI 2021, arXiv 2011.01424. With f_T [B,D_T] and
f_S [B,D_T] the raw vectors that the last linear layers read:

    L_l2  = mean over the vector of (f_S − f_T)²
    L_lsh = mean over M hashes of BCE(σ(f_S·Wᵀ + b), 1[f_T·Wᵀ + b > 0])      W ~ N(0, s²), frozen
    L     = CE + β · mean over samples of L_l2, L_lsh, or both

``l2``, ``lsh`` and ``lshl2`` (the sum) take the mean over all samples, ``lshl2_s`` over those that the
teacher classifies correctly; if there are none, the loss is 0. s is the std of the teacher's classifier
weight, b = −median of f_T·Wᵀ over the training images, or −mean, or 0.

A student whose vector has another width learns with Linear(D_S→D_T) before its last linear; both are merged
into one before export (``models/readout.py``). In the authors' multi-label training the new layer is first
trained alone, by L without the cross-entropy: ``alone`` epochs, here within one training and one schedule.

Our choices that the paper leaves open or makes differently:

- Medians and means are taken over the images under the test transform; the authors' over a pass of augmented
  views.
- If ``hashes`` is not set, M = 32·D_T up to D_T = 256 (the paper's rule for CIFAR) and 2048 beyond (its M for
  ImageNet).
- A teacher without a head has s = 1/√D_T and ``lshl2``, since there are no predictions to be correct.
- Multi-label samples (float labels [B,N]) are neither correct nor wrong: ``lshl2_s`` is then ``lshl2``. The
  paper's β for these (VOC07: 1 with l2, 0.5 with lsh and lshl2; COCO: 3) belong to a binary cross-entropy
  that is a mean over the N classes. Here it is their sum, so ``--weight ce=`` must be 1/N for the paper's
  proportion. Its two stages are ``alone``.
- Images without labels are neither correct nor wrong either: ``lshl2_s`` takes its mean over them and the
  samples that the teacher classifies correctly.
- Several teachers: the student's vector is as wide as all of theirs concatenated, each teacher is matched by
  its part of it, and the loss is the mean over teachers.

Detectors have patches of classification towers in place of the vector, see ``dense.py``, or the vectors
of regions, see ``regions.py``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor, nn

from ....models.detection.regions import BOX_HEAD, BoxHead
from ...config import TaskName
from ...errors import JobError, UsageError
from .. import base
from ..quest.vocabulary import FeatureMatrix
from . import dense, regions

Variant = Literal["l2", "lsh", "lshl2", "lshl2_s"]

BETA, DETECTOR_BETA = 6.0, 7.0
"""β of the authors on ImageNet and CIFAR, and for detectors."""

CIFAR_WIDTH, IMAGENET_HASHES = 256, 2048
"""The width up to which a vector has 32 hashes for each number, and M for wider vectors."""

MAX_NUMBERS = 1 << 28
"""Numbers of features that medians are computed from, 1 GiB; of more features an even sample is used."""

BLOCK = 1 << 25
"""Numbers in a block of projections, 128 MB."""

FILE, VERSION = "hashes.safetensors", 1


class Parameters(base.Parameters):
    variant: Variant | None = Field(
        None, description="l2, lsh, lshl2 or lshl2_s; none: lshl2_s, or lshl2 for a teacher without a head"
    )
    beta: float | None = Field(
        None, gt=0, description="β, the weight of the loss; none: 6, or 7 for detectors"
    )
    hashes: int | None = Field(
        None,
        ge=1,
        description="M; none: 32 for each number of the vector up to 256, else 2048; for detectors the "
        "numbers of a patch, at most 4096",
    )
    std: float | None = Field(
        None, gt=0, description="s of the hashes; none: that of the teacher's classifier weight"
    )
    bias: Literal["median", "mean", "zero"] = Field(
        "median", description="the hashes' bias: minus the median or mean of the projections, or zero"
    )
    alone: int = Field(
        0, ge=0, description="first epochs in which only the projection to the teacher's width is trained"
    )

    def for_epochs(self, epochs: int) -> "Parameters":
        if self.alone >= epochs:
            raise UsageError(
                f"--set mimic.alone={self.alone} must be less than --epochs, which is {epochs}. "
                "Lower it or train for more epochs."
            )
        return self

    def variant_for(self, teacher: base.Shapes) -> Variant:
        return self.variant or ("lshl2_s" if teacher.logits and not teacher.levels else "lshl2")

    def hashes_for(self, teacher: base.Shapes) -> int:
        width = _width(teacher)
        if teacher.towers:
            return self.hashes or min(width, dense.MAX_HASHES)
        if teacher.region_vector:
            return self.hashes or regions.HASHES_PER_NUMBER * width
        return self.hashes or (32 * width if width <= CIFAR_WIDTH else IMAGENET_HASHES)


class Mimic(base.Method):
    """Match the teacher's penultimate vector; the formulas are in the module's docstring."""

    name = "mimic"
    paper = "Wang, Ge, Wu, TPAMI 2021, arXiv 2011.01424"
    parameters_class = Parameters
    prepares = True
    weights = frozenset({"beta"})
    # A third to three times the ratio of the authors' weight for resnet56 → resnet20 on CIFAR-10, 2.9.
    gradient_ratio = (1.0, 9.0)

    @classmethod
    def needs_labels(cls, parameters: Parameters, task: TaskName) -> str | None:
        return "it compares two detectors around labeled objects" if task == "detection" else None

    @classmethod
    def reads(cls, parameters: Parameters, network: base.Shapes) -> frozenset[str]:
        if network.region_vector:
            return regions.READS
        return frozenset({*network.towers, "anchors"} if network.towers else {"vector"})

    @classmethod
    def teacher_reads(cls, parameters: Parameters, teacher: base.Shapes) -> frozenset[str]:
        if teacher.towers:
            return frozenset(teacher.towers)
        if teacher.region_vector:
            return frozenset(regions.teacher_maps(teacher))
        masked = parameters.variant_for(teacher) == "lshl2_s"
        return frozenset({"vector", "logits"} if masked else {"vector"})

    @classmethod
    def check(cls, parameters: Parameters, setup: base.Setup, images: int) -> None:
        if parameters.variant == "l2":
            for key in ("hashes", "std", "bias"):
                if (value := getattr(parameters, key)) != type(parameters).model_fields[key].default:
                    raise UsageError(
                        f"--set mimic.{key}={value} has no effect with mimic.variant=l2, which uses no "
                        "hashes. Remove one of them."
                    )
        if setup.student.levels:
            _check_detectors(parameters, setup)
        if parameters.alone and cls.student_width(parameters, setup) is None:
            raise UsageError(
                f"--set mimic.alone={parameters.alone} requires a projection, but the student's vector is "
                "as wide as the teacher's. Remove it."
            )

    @classmethod
    def student_width(cls, parameters: Parameters, setup: base.Setup) -> int | None:
        if setup.student.levels:
            return None
        width = sum(_width(teacher) for teacher in setup.teachers)
        return None if width == setup.student.vector else width

    @classmethod
    def prepare(cls, parameters: Parameters, context: base.PrepareContext) -> base.PrepareResult:
        """Draw each teacher's hashes, and compute their bias in one pass over the training images."""
        tensors: dict[str, Tensor] = {}
        facts: list[Mapping[str, Any]] = []
        for t, (name, teacher) in enumerate(zip(context.teacher_names, context.teachers, strict=True)):
            if teacher.region_vector:
                assert context.weights is not None
                head = base.select(context.weights(t), BOX_HEAD)
                tensors |= {f"{t}.head.{key}": value for key, value in head.items()}
            if parameters.variant_for(teacher) == "l2":
                continue
            m, std = parameters.hashes_for(teacher), _std(parameters, context, t)
            hashes = _prepare_hashes(parameters, context, t, m, std)
            tensors |= {f"{t}.weight": hashes["weight"], f"{t}.bias": hashes["bias"]}
            bias = "zero" if teacher.levels else parameters.bias
            facts.append({"teacher": name, "hashes": m, "std": std, "bias": bias})
        lines = [f"{f['hashes']} hashes of {f['teacher']}, s = {f['std']:.3g}" for f in facts]
        return base.PrepareResult(tensors, {"hashes": facts}, "; ".join(lines) or "no hashes needed")

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.beta = parameters.beta or (DETECTOR_BETA if setup.student.levels else BETA)
        self.alone = parameters.alone
        self.widths = [_width(teacher) for teacher in setup.teachers]
        get = setup.prepared.get
        self.towers = setup.student.towers
        self.region_maps = [regions.teacher_maps(teacher) for teacher in setup.teachers]
        heads = [f"{t}.head" for t, teacher in enumerate(setup.teachers) if teacher.region_vector]
        self.heads = nn.ModuleList(BoxHead(base.select(setup.prepared, head)) for head in heads)
        terms = [
            MimicTerm(parameters.variant_for(teacher), get(f"{t}.weight"), get(f"{t}.bias"))
            for t, teacher in enumerate(setup.teachers)
        ]
        self.terms = cast(Sequence[MimicTerm], nn.ModuleList(terms))

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        student = batch.student
        if self.towers:
            losses = [
                term.compare_towers(self.towers, student, teacher, batch.labels)
                for term, teacher in zip(self.terms, batch.teachers, strict=True)
            ]
        elif self.heads:
            pairs = [
                regions.pair_vectors(student, [teacher[name] for name in maps], cast(BoxHead, head))
                for head, maps, teacher in zip(self.heads, self.region_maps, batch.teachers, strict=True)
            ]
        else:
            pairs = list(zip(student["vector"].split(self.widths, dim=1), batch.teachers, strict=True))
        if not self.towers:
            losses = [term(f_s, f_t, batch) for term, (f_s, f_t) in zip(self.terms, pairs, strict=True)]
        return {"mimic": self.beta * torch.stack(losses).mean()}

    def trains_projection_only(self, epoch: int) -> bool:
        return epoch < self.alone

    def metrics(self) -> dict[str, Tensor]:
        return {
            key if len(self.terms) == 1 else f"{key} ({t})": value
            for t, term in enumerate(self.terms)
            for key, value in term.metrics().items()
        }


class MimicTerm(nn.Module):
    """The loss of one teacher: L_l2, L_lsh or both, the mean over all or the correctly classified samples."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, variant: Variant, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.variant = variant
        self.register_buffer("weight", None if weight is None else weight.float(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)
        self.sums = base.RunningSums()

    def forward(self, f_s: Tensor, teacher: base.Features, batch: base.Batch) -> Tensor:
        """Return the scalar loss; ``f_s`` [B,D_T] is the part of the student's vector for this teacher."""
        f_s = base.to_fp32(f_s)
        f_t = teacher["vector"].to(f_s.dtype)
        losses = f_s.new_zeros(len(f_s))
        if self.variant != "lsh":
            square = (f_s - f_t).square().mean(1)
            self.sums.add(samples=square.new_full((), len(square)), l2=square.sum())
            losses = losses + square
        if self.variant != "l2":
            assert self.weight is not None and self.bias is not None
            a_s, a_t = (project(f, self.weight, self.bias) for f in (f_s, f_t))
            h = (a_t > 0).to(a_s.dtype)
            equal = ((a_s > 0) == (a_t > 0)).to(h.dtype).mean(1)
            self.sums.add(hashed=equal.new_full((), len(equal)), equal=equal.sum())
            losses = losses + F.binary_cross_entropy_with_logits(a_s, h, reduction="none").mean(1)
        if self.variant != "lshl2_s" or batch.labels.ndim > 1:
            return losses.mean()
        labeled = len(batch.labels)
        matched = teacher["logits"].argmax(1) == batch.complete_labels(teacher["logits"])
        self.sums.add(classified=losses.new_full((), labeled), correct=matched[:labeled].sum())
        return torch.where(matched, losses, 0.0).sum() / matched.sum().clamp(min=1)

    def compare_towers(
        self, towers: Sequence[str], student: base.Features, teacher: base.Features, labels: Tensor
    ) -> Tensor:
        """Return the scalar loss of two detectors' patches; see ``dense.py``."""
        maps = [(student[name], teacher[name]) for name in towers]
        return dense.compute_loss(self.variant, self.weight, maps, student["anchors"], labels, self.sums)

    def metrics(self) -> dict[str, Tensor]:
        sums = self.sums.take()
        means = {
            "feature_distance": ("l2", "samples"),
            "equal_bits": ("equal", "hashed"),
            "teacher_right": ("correct", "classified"),
        }
        return {key: sums[total] / sums[count] for key, (total, count) in means.items() if total in sums}


def draw_hashes(hashes: int, width: int, std: float, seed: int) -> Tensor:
    """Draw W [hashes,width] ~ N(0, std²), fp32, from the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(hashes, width, generator=generator)


def project(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return f·Wᵀ + b [B,M] of features f [B,D], in fp32 or wider even under autocast: signs matter."""
    with torch.autocast(f.device.type, enabled=False):
        dtype = torch.promote_types(f.dtype, weight.dtype)
        return F.linear(f.to(dtype), weight.to(dtype), bias.to(dtype))


def compute_medians(features: np.ndarray, weight: Tensor, device: torch.device) -> Tensor:
    """Return the median of each hash's projection over n features [n,D], fp32 [M], computed on ``device``.

    At most twice ``BLOCK`` numbers are held besides the features, or twice n if that is more.
    """
    rows = torch.from_numpy(features).to(device)
    size = max(1, BLOCK // len(rows))
    blocks = [np.median((rows @ block.to(device).T).cpu().numpy(), axis=0) for block in weight.split(size)]
    return torch.from_numpy(np.concatenate(blocks)).to(weight.dtype)


def _width(network: base.Shapes) -> int:
    if network.towers:
        channels, *_ = network.maps[network.towers[0]]
        return channels * dense.PATCH**2
    if network.region_vector:
        return network.region_vector
    assert network.vector is not None  # ``reads`` contains it
    return network.vector


def _compared_maps(network: base.Shapes) -> list[tuple[int, int, int]]:
    names = regions.teacher_maps(network) if network.region_vector else network.towers
    return [network.maps[name] for name in names]


def _check_detectors(parameters: Parameters, setup: base.Setup) -> None:
    """Raise UsageError unless the patches or regions of both detectors can be compared."""
    ours = _compared_maps(setup.student)
    for teacher in setup.teachers:
        if bool(teacher.region_vector) != bool(setup.student.region_vector):
            raise UsageError(
                "--method mimic compares detectors of one kind, and one of teacher and student classifies "
                "regions (fasterrcnn), the other one anchors. Use --method pkd."
            )
        theirs = _compared_maps(teacher)
        if ours != theirs:
            part = "regions" if teacher.region_vector else "classification towers"
            raise UsageError(
                f"--method mimic compares the {part} of two detectors, which must have equal "
                f"levels and widths: the student has {ours or 'none'}, the teacher {theirs or 'none'} (C, H, "
                "W). Use --method pkd."
            )
    if parameters.variant == "lshl2_s":
        raise UsageError(
            "mimic.variant=lshl2_s does not apply to detectors, whose locations the teacher neither "
            "classifies correctly nor wrongly. Use --set mimic.variant=lshl2."
        )
    if parameters.bias == "mean":  # detectors use zero
        raise UsageError("mimic.bias=mean has no effect with detectors. Use --set mimic.bias=zero.")
    if parameters.alone:
        raise UsageError(f"mimic.alone={parameters.alone} has no effect with detectors. Remove it.")


def _std(parameters: Parameters, context: base.PrepareContext, t: int) -> float:
    if parameters.std is not None:
        return parameters.std
    classifier = context.classifier(t)
    std = 0.0 if classifier is None else float(classifier.float().std())
    return std or _width(context.teachers[t]) ** -0.5


def _prepare_hashes(
    parameters: Parameters, context: base.PrepareContext, t: int, m: int, std: float
) -> dict[str, Tensor]:
    """Return W [M,D_T] and b [M], from the cache if a run has computed them before."""
    teacher = context.teachers[t]
    width, n, bias = _width(teacher), context.images, "zero" if teacher.levels else parameters.bias
    used = min(n, MAX_NUMBERS // width)
    weight = draw_hashes(m, width, std, context.seed)
    if bias == "zero":
        return {"weight": weight, "bias": torch.zeros(m)}
    if used < n:
        context.note(f"the {bias} of the hashes is computed from {used:,} of {n:,} images")
    key = {"version": VERSION, "hashes": m, "std": std, "bias": bias, "used": used, "seed": context.seed}

    def write(path: Path) -> None:
        matrix = FeatureMatrix(used, width, None)
        vectors = (features["vector"] for features in context.features(t, frozenset({"vector"})))
        if not matrix.fill((f[:, :, None, None] for f in vectors), (1, 1), n):
            raise JobError(
                f"{context.teacher_names[t]}: its vectors are not finite, so its weights are broken. "
                "Use other weights or train the teacher again."
            )
        center = (
            compute_medians(matrix.data, weight, matrix.device)
            if bias == "median"
            else weight @ torch.from_numpy(matrix.data.mean(0, dtype="float64")).float()
        )
        (path / FILE).write_bytes(save({"weight": weight, "bias": -center}))

    return load((context.cached(t, "hashes", key, write) / FILE).read_bytes())
