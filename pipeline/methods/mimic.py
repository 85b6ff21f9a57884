"""Feature mimicking: the student's penultimate vector follows the teacher's, in value and in direction.

Wang, Ge, Wu: "Distilling Knowledge by Mimicking Features", TPAMI 2021, arXiv 2011.01424. With f_T [B,D_T] and
f_S [B,D_T] the raw vectors that the last linear layers read:

    L_l2  = mean over the vector of (f_S − f_T)²
    L_lsh = mean over M hashes of BCE(σ(f_S·Wᵀ + b), 1[f_T·Wᵀ + b > 0])      W ~ N(0, s²), frozen
    L     = CE + β · mean over samples of L_l2, L_lsh, or both

``l2``, ``lsh`` and ``lshl2`` (the sum) take the mean over all samples, ``lshl2_s`` over those that the
teacher classifies correctly; where it is right on none, the loss is 0. s is the deviation of the teacher's
classifier weight, b = −median of f_T·Wᵀ over the training images, or −mean, or 0.

A student whose vector has another width learns with Linear(D_S→D_T) before its last linear; both are merged
into one before anything ships (``models/projection.py``).
In the authors' training on several classes an image
the new layer at first learns alone, by L without the cross-entropy: ``alone`` epochs, here of one training
whose schedule goes on.

Ours, where the paper is silent or has something else:

- Medians and means are taken over the images under the test transform; the authors' over a pass of augmented
  views.
- Where ``hashes`` is not set, M = 32·D_T up to D_T = 256 (the paper's rule for CIFAR) and 2048 beyond (its M
  for ImageNet).
- A teacher without a head has s = 1/√D_T and ``lshl2``, since nothing tells where it is right.
- Labels with several classes an image (float, [B,N]) know no right or wrong sample: ``lshl2_s`` is then
  ``lshl2``. The paper's β for these (VOC07: 1 with l2, 0.5 with lsh and lshl2; COCO: 3) belong to a binary
  cross-entropy that is a mean over the N classes; here it is their sum, so that its weight, ``--weight ce=``,
  is 1/N for the paper's proportion. Its two stages are ``alone``.
- Several teachers: the student's vector is as wide as theirs together, each teacher has its part of it, and
  the loss is the mean of theirs.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor, nn

from ..errors import JobError, UsageError
from . import base
from .quest.vocabulary import FeatureMatrix

BLOCK = 1 << 25
"""Numbers of a block of projections: 128 MB, whatever the number of features and hashes."""


def draw(hashes: int, width: int, std: float, seed: int) -> Tensor:
    """W [hashes,width] ~ N(0, std²), fp32, by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(hashes, width, generator=generator)


def project(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """a = f·Wᵀ + b [B,M] of features f [B,D], for the sake of signs in fp32 or better even under autocast."""
    with torch.autocast(f.device.type, enabled=False):
        kind = torch.promote_types(f.dtype, weight.dtype)
        return F.linear(f.to(kind), weight.to(kind), bias.to(kind))


def bits(a: Tensor) -> Tensor:
    """h = 1[a > 0], as numbers."""
    return (a > 0).to(a.dtype)


def hash_loss(a_s: Tensor, h: Tensor) -> Tensor:
    """Each sample's mean over the hashes of BCE(σ(a_s), h), [B]: a_s [B,M] the student's, h [B,M] bits."""
    return F.binary_cross_entropy_with_logits(a_s, h, reduction="none").mean(1)


def medians(features: np.ndarray, weight: Tensor, device: torch.device) -> Tensor:
    """The median of each hash's projection over n features [n,D], fp32 [M]; ``device`` computes the products.

    Block by block of hashes: besides the features no more than twice ``BLOCK`` numbers are held (a block's
    projections and numpy's copy of them), or twice n where that is more.
    """
    rows = torch.from_numpy(features).to(device)
    size = max(1, BLOCK // len(rows))
    each = [np.median((rows @ part.to(device).T).cpu().numpy(), axis=0) for part in weight.split(size)]
    return torch.from_numpy(np.concatenate(each)).to(weight.dtype)


Variant = Literal["l2", "lsh", "lshl2", "lshl2_s"]

WIDE = 256
"""The widest vector with 32 hashes a number; see ``hashes_of``."""

HASHES = 2048
"""M for wider ones."""

FEATURES = 1 << 28
"""Numbers of the features that the medians are taken over: 1 GiB; of more an even sample is used."""

FILE = "hashes.safetensors"
VERSION = 1


class Parameters(base.Parameters):
    variant: Variant | None = Field(
        None, description="l2, lsh, lshl2 or lshl2_s; none: lshl2_s, or lshl2 for a teacher without a head"
    )
    beta: float = Field(6.0, gt=0, description="β, the weight of the loss")
    hashes: int | None = Field(
        None, ge=1, description="M; none: 32 for each number of the vector up to 256, else 2048"
    )
    std: float | None = Field(
        None, gt=0, description="s of the hashes; none: that of the teacher's classifier weight"
    )
    bias: Literal["median", "mean", "zero"] = Field(
        "median", description="what the hashes' bias takes off: the projections' median or mean, or nothing"
    )
    alone: int = Field(
        0,
        ge=0,
        description="epochs at first in which the new layer of a student of another width learns alone",
    )

    def for_epochs(self, epochs: int) -> "Parameters":
        if self.alone >= epochs:
            raise UsageError(
                f"--set mimic.alone={self.alone} leaves none of --epochs {epochs} for the student itself; "
                "take fewer, or more epochs."
            )
        return self


def variant_of(parameters: Parameters, teacher: base.Shapes) -> Variant:
    """What a teacher is mimicked by."""
    return parameters.variant or ("lshl2_s" if teacher.logits else "lshl2")


def hashes_of(parameters: Parameters, width: int) -> int:
    """M for a teacher's vector of this width."""
    return parameters.hashes or (32 * width if width <= WIDE else HASHES)


class Mimic(base.Method):
    """Follow the teacher's penultimate vector; see the module's text for the formulas."""

    name = "mimic"
    paper = "Wang, Ge, Wu, TPAMI 2021, arXiv 2011.01424"
    takes = Parameters
    prepares = True
    weights = frozenset({"beta"})
    # About a third to three times of what the authors' weight gives for resnet56 → resnet20 on CIFAR-10: 2.9.
    pull = (1.0, 9.0)

    @classmethod
    def reads(cls, parameters: Parameters, network: base.Shapes) -> frozenset[str]:
        return frozenset({"vector"})

    @classmethod
    def teacher_reads(cls, parameters: Parameters, teacher: base.Shapes) -> frozenset[str]:
        masked = variant_of(parameters, teacher) == "lshl2_s"
        return frozenset({"vector", "logits"} if masked else {"vector"})

    @classmethod
    def check(
        cls, parameters: Parameters, student: base.Shapes, teachers: Sequence[base.Shapes], images: int
    ) -> None:
        if parameters.variant == "l2":
            for key in ("hashes", "std", "bias"):
                if (value := getattr(parameters, key)) != type(parameters).model_fields[key].default:
                    raise UsageError(
                        f"--set mimic.{key}={value} is about hashes, and mimic.variant=l2 has none; take one."
                    )

        if parameters.alone and cls.widens(parameters, student, teachers) is None:
            raise UsageError(
                f"--set mimic.alone={parameters.alone}: the student's vector is as wide as the teacher's, so "
                "there is no new layer to learn alone; leave it out."
            )

    @classmethod
    def widens(
        cls, parameters: Parameters, student: base.Shapes, teachers: Sequence[base.Shapes]
    ) -> int | None:
        width = sum(_width(teacher) for teacher in teachers)
        return None if width == student.vector else width

    @classmethod
    def prepare(cls, parameters: Parameters, preparation: base.PrepareContext) -> base.PrepareResult:
        """Draw each teacher's hashes, and find their bias in one pass over the training images."""
        tensors: dict[str, Tensor] = {}
        facts: list[Mapping[str, Any]] = []
        for t, (name, teacher) in enumerate(
            zip(preparation.teacher_names, preparation.teachers, strict=True)
        ):
            if variant_of(parameters, teacher) == "l2":
                continue
            m, std = hashes_of(parameters, _width(teacher)), _std(parameters, preparation, t)
            made = _hashes(parameters, preparation, t, m, std)
            tensors |= {f"{t}.weight": made["weight"], f"{t}.bias": made["bias"]}
            facts.append({"teacher": name, "hashes": m, "std": std, "bias": parameters.bias})
        lines = [f"{f['hashes']} hashes of {f['teacher']}, s = {f['std']:.3g}" for f in facts]
        return base.PrepareResult(tensors, {"hashes": facts}, "; ".join(lines) or "no hashes to draw")

    def __init__(
        self,
        parameters: Parameters,
        student: base.Shapes,
        teachers: Sequence[base.Shapes],
        prepared: Mapping[str, Tensor],
    ) -> None:
        super().__init__(parameters, student, teachers, prepared)
        self.beta, self.alone = parameters.beta, parameters.alone
        self.widths = [_width(teacher) for teacher in teachers]
        self.terms = nn.ModuleList(
            Mimicked(variant_of(parameters, teacher), prepared.get(f"{t}.weight"), prepared.get(f"{t}.bias"))
            for t, teacher in enumerate(teachers)
        )

    def forward(
        self,
        student: base.Features,
        teachers: Sequence[base.Features],
        labels: Tensor,
        epoch: int,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        parts = student["vector"].split(self.widths, dim=1)
        losses = [
            term(part, teacher, labels)
            for term, part, teacher in zip(self._terms(), parts, teachers, strict=True)
        ]
        return {"mimic": self.beta * torch.stack(losses).mean()}

    def embeds_alone(self, epoch: int) -> bool:
        return epoch < self.alone

    def watched(self) -> dict[str, Tensor]:
        one = len(self.terms) == 1
        return {
            key if one else f"{key} ({t})": value
            for t, term in enumerate(self._terms())
            for key, value in term.watched().items()
        }

    def _terms(self) -> Iterator["Mimicked"]:
        for term in self.terms:
            assert isinstance(term, Mimicked)
            yield term


class Mimicked(nn.Module):
    """The loss of one teacher: L_l2, L_lsh or both, the mean over all samples or those it is right on."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, variant: Variant, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.variant = variant
        self.register_buffer("weight", None if weight is None else weight.float(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)
        self.watch = base.RunningSums()

    def forward(self, f_s: Tensor, teacher: base.Features, labels: Tensor) -> Tensor:
        """
        Args:
            f_s: [B,D_T], the student's part of it.
            teacher: its ``vector`` [B,D_T] and, for ``lshl2_s``, its ``logits`` [B,N].
            labels: [B] class numbers, or float [B,N].
        """
        f_s = f_s.to(torch.promote_types(f_s.dtype, torch.float32))
        f_t = teacher["vector"].to(f_s.dtype)
        each = f_s.new_zeros(len(f_s))
        if self.variant != "lsh":
            square = (f_s - f_t).square().mean(1)
            self.watch.add(samples=square.new_full((), len(square)), l2=square.sum())
            each = each + square
        if self.variant != "l2":
            assert self.weight is not None and self.bias is not None
            a_s = project(f_s, self.weight, self.bias)
            h = bits(project(f_t, self.weight, self.bias))
            equal = (bits(a_s) == h).to(h.dtype).mean(1)
            self.watch.add(hashed=equal.new_full((), len(equal)), equal=equal.sum())
            each = each + hash_loss(a_s, h)
        if self.variant != "lshl2_s" or labels.ndim > 1:
            return each.mean()
        right = teacher["logits"].argmax(1) == labels
        self.watch.add(judged=each.new_full((), len(each)), right=right.sum())
        return torch.where(right, each, 0.0).sum() / right.sum().clamp(min=1)

    def watched(self) -> dict[str, Tensor]:
        sums = self.watch.take()
        found = {"feature_distance": ("l2", "samples"), "equal_bits": ("equal", "hashed")}
        found["teacher_right"] = ("right", "judged")
        return {key: sums[part] / sums[of] for key, (part, of) in found.items() if part in sums}


def _width(network: base.Shapes) -> int:
    assert network.vector is not None  # it is read, so it is there
    return network.vector


def _std(parameters: Parameters, preparation: base.PrepareContext, t: int) -> float:
    if parameters.std is not None:
        return parameters.std
    classifier = preparation.classifier(t)
    found = 0.0 if classifier is None else float(classifier.float().std())
    return found or _width(preparation.teachers[t]) ** -0.5


def _hashes(
    parameters: Parameters, preparation: base.PrepareContext, t: int, m: int, std: float
) -> dict[str, Tensor]:
    """W [M,D_T] and b [M], from the cache where an earlier run has made them."""
    width, n = _width(preparation.teachers[t]), preparation.images
    used = min(n, FEATURES // width)
    weight = draw(m, width, std, preparation.seed)
    if parameters.bias == "zero":
        return {"weight": weight, "bias": torch.zeros(m)}
    if used < n:
        preparation.note(f"the hashes' {parameters.bias} is that of {used:,} of {n:,} images, drawn evenly")
    key = {
        "version": VERSION,
        "hashes": m,
        "std": std,
        "bias": parameters.bias,
        "used": used,
        "seed": preparation.seed,
    }

    def write(path: Path) -> None:
        held = FeatureMatrix(used, width, None)
        vectors = (readout["vector"] for readout in preparation.readouts(t, frozenset({"vector"})))
        if not held.fill((f[:, :, None, None] for f in vectors), (1, 1), n):
            raise JobError(
                f"The vectors of {preparation.teacher_names[t]} are not finite numbers: its weights are "
                "broken; try other weights or train the teacher anew."
            )
        centre = (
            medians(held.data, weight, held.device)
            if parameters.bias == "median"
            else weight @ torch.from_numpy(held.data.mean(0, dtype="float64")).float()
        )
        (path / FILE).write_bytes(save({"weight": weight, "bias": -centre}))

    return load((preparation.shared(t, "hashes", key, write) / FILE).read_bytes())
