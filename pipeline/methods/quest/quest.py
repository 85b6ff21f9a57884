"""QuEST: quantized embedding space transfer.

Jain, Gidaris, Komodakis, Pérez, Cord: "QuEST: Quantized Embedding Space for Transferring Knowledge",
ECCV 2020, arXiv 1912.01540. The teacher's last feature map is quantized into visual words; the student learns
to predict, at every position, the soft assignment of the teacher's feature to the words:

    p_T(k) = softmax_k(−‖f_T − v_k‖² / τ)                        soft assignment to the words v_1 … v_K
    p_S(k) = softmax_k(γ · ⟨W_k/‖W_k‖, f_S/‖f_S‖⟩)               the student's cosine head, γ learned
    L      = α · mean over batch and positions of KL(p_T ‖ p_S)

The paper's formula sums over positions, its code averages, and so do we. Without a τ, the temperature follows
the scale of the features, as in the same group's OBoW (Gidaris et al., CVPR 2021): τ = μ/δ with μ the mean
squared distance of a feature to its nearest word.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import Tensor, nn

from ...errors import JobError
from .. import base
from . import loss
from .patches import select_patches
from .vocabulary import ConstantMap, check_words, learn_vocabulary, perplexity

DELTA = 10.0
"""Default δ; OBoW uses 10 to 15."""

LIKELY_TOP = 32
"""Estimated m of a cached soft assignment without ``top``."""


def _to_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | float | int) else value


def _from_tuple(value: tuple[float, ...]) -> float | list[float]:
    return value[0] if len(value) == 1 else list(value)


Taus = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_to_tuple), PlainSerializer(_from_tuple)
]
Levels = Annotated[
    tuple[Annotated[str, Field(pattern=r"^map(_pre|@(0|-?[1-9]\d*))?$")], ...], BeforeValidator(_to_tuple)
]


class Parameters(base.Parameters):
    """Symbols as in the module's docstring."""

    words: int | None = Field(
        None,
        ge=2,
        description="K, the size of the vocabulary; none: one for each 50 images, from 256 to 4096",
    )
    tau: Taus | None = Field(
        None, description="τ of the teacher's soft assignment, or one for each level; none: μ/δ"
    )
    delta: float = Field(DELTA, gt=0, description="δ: the scale-free temperature is μ/δ")
    alpha: float = Field(1.0, gt=0, description="α, the weight of the loss")
    gamma: float = Field(3.0, gt=0, description="γ at the start of training")
    levels: Levels | None = Field(
        None,
        min_length=1,
        description="feature maps to use: map, map@1, map@-2 …; none: the last, of a detector all levels",
    )
    iterations: int = Field(20, ge=1, description="k-means iterations")
    features: int | None = Field(
        None, ge=2, description="maximum number of features for k-means; none: all of them"
    )
    top: int | None = Field(
        None,
        ge=1,
        description="m, the likeliest words that p_T keeps at each position; none: all of them, or in the "
        "teacher cache as many as keep 94 % of it",
    )
    positions: int | None = Field(
        None, ge=1, description="positions drawn for each image and epoch; none: all of them"
    )

    @model_validator(mode="after")
    def _check_combination(self) -> "Parameters":
        levels = self.levels or ("map",)
        if len(set(levels)) < len(levels):
            raise ValueError("levels must not be repeated")
        if self.tau is not None and self.delta != DELTA:
            raise ValueError("delta has no effect with tau; set one of them")
        if self.tau is not None and len(self.tau) not in (1, len(levels)):
            raise ValueError(
                f"{len(self.tau)} values of tau for {len(levels)} levels; set one, or one for each"
            )
        return self

    def levels_of(self, network: base.Shapes) -> Sequence[str]:
        """Return the names of the feature maps to use."""
        return self.levels or network.pyramid or ("map",)

    def temperature(self, level: str, mu: float) -> float:
        """Return τ of a level with mean squared distance μ to the nearest word."""
        if self.tau is None:
            return mu / self.delta
        return self.tau[self.levels.index(level) if self.levels and len(self.tau) > 1 else 0]


class Quest(base.Method):
    """Predict the teacher's visual words; the formulas are in the module's docstring."""

    name = "quest"
    paper = "Jain et al., ECCV 2020, arXiv 1912.01540"
    parameters_class = Parameters
    prepares = True
    weights = frozenset({"alpha"})
    # At least as strong as the labels; eight times as strong was worse on photos of garments, but better for
    # students from scratch in each measured case (docs/benchmarks.md).
    gradient_ratio = (1.0, 8.0)
    scratch_gradient_ratio = (8.0, 16.0)

    @classmethod
    def reads(cls, parameters: Parameters, network: base.Shapes) -> frozenset[str]:
        return frozenset(level_name(level, network) for level in parameters.levels_of(network))

    @classmethod
    def check(cls, parameters: Parameters, setup: base.Setup, images: int) -> None:
        for teacher in setup.teachers:
            for h, w in _grids(parameters, setup.student, teacher):
                check_words(parameters.words, min(images * h * w, parameters.features or images * h * w))

    @classmethod
    def cached_bytes(cls, parameters: Parameters, student: base.Shapes, teacher: base.Shapes) -> int:
        # Two bytes each for a word's index and its probability.
        positions = sum(h * w for h, w in _grids(parameters, student, teacher))
        return positions * 4 * (parameters.top or LIKELY_TOP)

    @classmethod
    def prepare(cls, parameters: Parameters, context: base.PrepareContext) -> base.PrepareResult:
        """Learn one vocabulary for each teacher and level by k-means over the teacher's features."""
        tensors: dict[str, Tensor] = {}
        facts: list[Mapping[str, Any]] = []
        for t, (name, teacher) in enumerate(zip(context.teacher_names, context.teachers, strict=True)):
            grids = _grids(parameters, context.student, teacher)
            for level, grid in zip(parameters.levels_of(context.student), grids, strict=True):
                read = level_name(level, teacher)
                try:
                    vocabulary = learn_vocabulary(
                        context, t, read, grid, parameters.words, parameters.iterations, parameters.features
                    )
                except ConstantMap as error:
                    if parameters.levels or not teacher.pyramid:
                        raise
                    # A coarse level of a pyramid is constant if no object is of its size.
                    context.note(f"level {level} of {name} is not used. {error}")
                    continue
                tau = parameters.temperature(level, vocabulary.mu)
                top, lost = loss.choose_top(parameters.top, vocabulary, tau, context.note)
                tensors[f"{t}.{level}.words"] = vocabulary.words
                tensors[f"{t}.{level}.mu"] = torch.tensor(vocabulary.mu)
                tensors[f"{t}.{level}.top"] = torch.tensor(top)
                fact = {"teacher": name, "level": level, **vocabulary.facts(), "top": top, "lost_mass": lost}
                if not facts:
                    fact |= select_patches(context, t, read, grid, vocabulary)
                facts.append(fact)
        if not facts:
            raise JobError("All levels of the teachers' pyramids are constant. Train the teacher longer.")
        summary = "; ".join(
            f"{f['words']} words from {f['features_used']:,} of {f['features']:,} features, perplexity "
            f"{f['perplexity']:.0f}"
            for f in facts
        )
        return base.PrepareResult(tensors, {"words": facts}, summary)

    def __init__(self, parameters: Parameters, setup: base.Setup) -> None:
        super().__init__(parameters, setup)
        self.alpha = parameters.alpha
        if setup.from_scratch:
            self.gradient_ratio = self.scratch_gradient_ratio
        terms = [
            WordPrediction(parameters, setup, t, level)
            for t in range(len(setup.teachers))
            for level in parameters.levels_of(setup.student)
            if parameters.levels or f"{t}.{level}.words" in setup.prepared
        ]
        self.terms = cast(Sequence[WordPrediction], nn.ModuleList(terms))

    def forward(self, batch: base.Batch) -> dict[str, Tensor]:
        return {"quest": self.alpha * torch.stack([term(batch) for term in self.terms]).sum()}

    def cached_outputs(self, t: int) -> Sequence[base.CachedOutput]:
        return [term.cached_output() for term in self.terms if term.teacher == t]

    def scales(self) -> list[nn.Parameter]:
        return [term.gamma for term in self.terms]

    def metrics(self) -> dict[str, Tensor]:
        return {
            key if len(self.terms) == 1 else f"{key} ({term.teacher} {term.teacher_level})": value
            for term in self.terms
            for key, value in term.metrics().items()
        }


class WordPrediction(nn.Module):
    """The loss for one teacher and level: mean over batch and positions of KL(p_T ‖ p_S)."""

    words: Tensor

    def __init__(self, parameters: Parameters, setup: base.Setup, t: int, level: str) -> None:
        super().__init__()
        student, teacher = setup.student, setup.teachers[t]
        self.teacher = t
        self.student_level, self.teacher_level = level_name(level, student), level_name(level, teacher)
        channels, *_ = student.maps[self.student_level]
        self.grid = base.shared_grid(student.maps[self.student_level], teacher.maps[self.teacher_level])
        words = setup.prepared[f"{t}.{level}.words"]
        self.tau = parameters.temperature(level, float(setup.prepared[f"{t}.{level}.mu"]))
        self.top = parameters.top
        self.cached_top = int(setup.prepared.get(f"{t}.{level}.top", len(words)))
        places = self.grid[0] * self.grid[1]
        self.drawn = parameters.positions if (parameters.positions or places) < places else None
        self.register_buffer("words", words.float(), persistent=False)
        self.weight = nn.Parameter(torch.randn(len(words), channels) * (2 / channels) ** 0.5)
        self.gamma = nn.Parameter(torch.tensor(parameters.gamma))
        self.sums = base.RunningSums()

    def forward(self, batch: base.Batch) -> Tensor:
        f_s = base.positions(batch.student[self.student_level], self.grid)
        teacher = batch.teachers[self.teacher]
        is_cached = f"{self.teacher_level}.ids" in teacher
        if is_cached:
            rows = [teacher[f"{self.teacher_level}.{part}"].flatten(0, 1) for part in ("ids", "p")]
        else:
            rows = [base.positions(teacher[self.teacher_level], self.grid)]
        if self.drawn is not None:
            places = self.grid[0] * self.grid[1]
            drawn = loss.draw_positions(batch.keys, batch.epoch, len(f_s) // places, places, self.drawn)
            f_s, *rows = (row[drawn.to(f_s.device)] for row in (f_s, *rows))
        p_t = loss.read_cached_words(*rows) if is_cached else self._soft_assignment(*rows)
        f_s, weight = loss.normalize(f_s), F.normalize(self.weight, dim=1)
        return loss.divergence(f_s, weight, self.gamma, p_t, self._record) / len(f_s)

    def _soft_assignment(self, f_t: Tensor) -> loss.TopWords | loss.AllWords:
        if self.top is not None and self.top < len(self.words):
            return loss.top_words(f_t, self.words, self.tau, self.top)[0]
        logits = loss.word_logits(self.words, self.tau)
        return loss.AllWords(lambda rows: logits(f_t[rows]), len(f_t))

    def cached_output(self) -> base.CachedOutput:
        return loss.cached_words(self.teacher_level, self.grid, self.words, self.tau, self.cached_top)

    @torch.no_grad()
    def _record(self, word: Tensor, p: Tensor, correct: Tensor) -> None:
        ones = torch.ones_like(p)
        usage = torch.zeros(len(self.words), dtype=p.dtype, device=p.device)
        self.sums.add(
            positions=ones.sum(),
            usage=usage.index_add_(0, word, ones),
            max_p_t=p.sum(),
            correct=correct.sum(),
        )

    def metrics(self) -> dict[str, Tensor]:
        sums = self.sums.take()
        if not sums:
            return {}
        return {
            "perplexity": perplexity(sums["usage"]),
            "max_p_t": sums["max_p_t"] / sums["positions"],
            "word_accuracy": sums["correct"] / sums["positions"],
            "gamma": self.gamma.detach(),
        }


def level_name(level: str, network: base.Shapes) -> str:
    """Return the feature for a level; for the last level of a VGG, the map before its ReLU."""
    return "map_pre" if level == "map" and "map_pre" in network.maps else level


def _grids(parameters: Parameters, student: base.Shapes, teacher: base.Shapes) -> Sequence[tuple[int, int]]:
    return [
        base.shared_grid(student.maps[level_name(level, student)], teacher.maps[level_name(level, teacher)])
        for level in parameters.levels_of(student)
    ]
