"""QuEST: quantized embedding space transfer.

Jain, Gidaris, Komodakis, Pérez, Cord: "QuEST: Quantized Embedding Space for Transferring Knowledge",
ECCV 2020, arXiv 1912.01540. The teacher's last feature map is quantized into visual words; the student learns
to predict, at every position, how the teacher's feature is spread over the words:

    p_T(k) = softmax_k(−‖f_T − v_k‖² / τ)                        soft assignment to the words v_1 … v_K
    p_S(k) = softmax_k(γ · ⟨W_k/‖W_k‖, f_S/‖f_S‖⟩)               the student's cosine head, γ learned
    L      = α · mean over batch and positions of KL(p_T ‖ p_S)

The paper's formula sums over positions, its code averages; so does this. Without a τ, the temperature
follows the features' own scale, as in the same group's OBoW (Gidaris et al., CVPR 2021): τ = μ/δ with μ the
mean squared distance of a feature to its nearest word.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import Tensor, nn

from .. import base
from .loss import Nearest, Whole, answer, closeness, divergence, draw, enough, nearest, stored
from .patches import shown_words
from .vocabulary import check_words, learn_vocabulary, perplexity, positions, shared_grid

DELTA = 10.0
"""δ where none is asked for; OBoW has 10 to 15."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | float | int) else value


def _alone(value: tuple[float, ...]) -> float | list[float]:
    return value[0] if len(value) == 1 else list(value)


Taus = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed), PlainSerializer(_alone)]

Levels = Annotated[
    tuple[Annotated[str, Field(pattern=r"^map(_pre|@(0|-?[1-9]\d*))?$")], ...], BeforeValidator(_listed)
]


class Parameters(base.Parameters):
    """Symbols as in ``quest.py``."""

    words: int | None = Field(
        None, ge=2, description="K, the size of the vocabulary; none: 4096, or fewer with little data"
    )
    tau: Taus | None = Field(
        None, description="τ of the teacher's soft assignment, or one for each level; none: μ/δ"
    )
    delta: float = Field(DELTA, gt=0, description="δ: the scale-free temperature is μ/δ")
    alpha: float = Field(1.0, gt=0, description="α, the weight of the loss")
    gamma: float = Field(3.0, gt=0, description="γ at the start of training")
    levels: Levels = Field(("map",), min_length=1, description="feature maps to use: map, map@1, map@-2 …")
    iterations: int = Field(20, ge=1, description="k-means iterations")
    features: int | None = Field(
        None, ge=2, description="how many features k-means may use; none: all of them"
    )
    top: int | None = Field(
        None,
        ge=1,
        description="m, the likeliest words that p_T keeps at each position; none: all of them, "
        "or in a store so many that no more than 6 % of it is lost",
    )
    positions: int | None = Field(
        None, ge=1, description="positions drawn for each image and epoch; none: all of them"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "Parameters":
        if len(set(self.levels)) < len(self.levels):
            raise ValueError("a level is named twice in levels; name each once")
        if self.tau is not None and self.delta != DELTA:
            raise ValueError("delta has no effect beside tau; give one of them")
        if self.tau is not None and len(self.tau) not in (1, len(self.levels)):
            raise ValueError(
                f"{len(self.tau)} values of tau for {len(self.levels)} levels; give one, or one each"
            )
        return self

    def temperature(self, level: str, mu: float) -> float:
        """τ of a level, where the mean squared distance to the nearest word is μ."""
        if self.tau is None:
            return mu / self.delta
        return self.tau[self.levels.index(level)] if len(self.tau) > 1 else self.tau[0]


LIKELY_TOP = 32
"""About as many words as a store keeps of a position at most, where it is not asked for."""


class Quest(base.Method):
    """Predict the teacher's visual words; see the module's text for the formulas."""

    name = "quest"
    paper = "Jain et al., ECCV 2020, arXiv 1912.01540"
    takes = Parameters
    prepares = True
    weights = frozenset({"alpha"})
    # At least as strong as the labels. For resnet56 → resnet20 on CIFAR-10 α = 1 gives 0.25 and α = 30, which
    # did better there, 7.4; on photos of garments it did better too (docs/benchmarks.md).
    pull = (1.0, 8.0)

    @classmethod
    def reads(cls, parameters: Parameters, network: base.Shapes) -> frozenset[str]:
        return frozenset(readout(level, network) for level in parameters.levels)

    @classmethod
    def check(
        cls, parameters: Parameters, student: base.Shapes, teachers: Sequence[base.Shapes], images: int
    ) -> None:
        for teacher in teachers:
            for level in parameters.levels:
                h, w = shared_grid(_map(level, student), _map(level, teacher))
                check_words(parameters.words, min(images * h * w, parameters.features or images * h * w))

    @classmethod
    def stored_bytes(cls, parameters: Parameters, student: base.Shapes, teacher: base.Shapes) -> int:
        grids = [shared_grid(_map(level, student), _map(level, teacher)) for level in parameters.levels]
        # A word's number and its probability, 2 bytes each.
        return sum(h * w * 4 * (parameters.top or LIKELY_TOP) for h, w in grids)

    @classmethod
    def prepare(cls, parameters: Parameters, preparation: base.PrepareContext) -> base.PrepareResult:
        """Learn one vocabulary for each teacher and level by k-means over the teacher's features."""
        tensors: dict[str, Tensor] = {}
        facts: list[Mapping[str, Any]] = []
        for t, name in enumerate(preparation.teacher_names):
            for level in parameters.levels:
                student, teacher = preparation.student, preparation.teachers[t]
                grid = shared_grid(_map(level, student), _map(level, teacher))
                learned = learn_vocabulary(
                    preparation,
                    teacher=t,
                    level=readout(level, teacher),
                    grid=grid,
                    words=parameters.words,
                    iterations=parameters.iterations,
                    limit=parameters.features,
                )
                tau = parameters.temperature(level, learned.mu)
                top, lost = enough(parameters.top, learned, tau, preparation)
                tensors[f"{t}.{level}.words"] = learned.words
                tensors[f"{t}.{level}.mu"] = torch.tensor(learned.mu)
                tensors[f"{t}.{level}.top"] = torch.tensor(top)
                fact = {"teacher": name, "level": level, **learned.facts(), "top": top, "lost_mass": lost}
                if not facts:
                    read = readout(level, teacher)
                    fact |= shown_words(preparation, t, read, grid, learned.words, learned.usage)
                facts.append(fact)
        summary = "; ".join(
            f"{f['words']} words from {f['features_used']:,} of {f['features']:,} features, perplexity "
            f"{f['perplexity']:.0f}"
            for f in facts
        )
        return base.PrepareResult(tensors, {"words": facts}, summary)

    def __init__(
        self,
        parameters: Parameters,
        student: base.Shapes,
        teachers: Sequence[base.Shapes],
        prepared: Mapping[str, Tensor],
    ) -> None:
        super().__init__(parameters, student, teachers, prepared)
        self.alpha = parameters.alpha
        self.terms = nn.ModuleList(
            WordPrediction(
                readout(level, student),
                t,
                readout(level, teacher),
                words=prepared[f"{t}.{level}.words"],
                tau=parameters.temperature(level, float(prepared[f"{t}.{level}.mu"])),
                grid=shared_grid(_map(level, student), _map(level, teacher)),
                channels=_map(level, student)[0],
                gamma=parameters.gamma,
                top=parameters.top,
                stored=int(prepared.get(f"{t}.{level}.top", len(prepared[f"{t}.{level}.words"]))),
                positions=parameters.positions,
            )
            for t, teacher in enumerate(teachers)
            for level in parameters.levels
        )

    def forward(
        self,
        student: base.Features,
        teachers: Sequence[base.Features],
        labels: Tensor,
        epoch: int,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        terms = [term(student, teachers, epoch, keys) for term in self._predictions()]
        return {"quest": self.alpha * torch.stack(terms).sum()}

    def answers(self, t: int) -> Sequence[base.CachedOutput]:
        return [term.answer() for term in self._predictions() if term.teacher == t]

    def scales(self) -> list[nn.Parameter]:
        return [term.gamma for term in self._predictions()]

    def watched(self) -> dict[str, Tensor]:
        one = len(self.terms) == 1
        return {
            key if one else f"{key} ({term.teacher} {term.teacher_reads})": value
            for term in self._predictions()
            for key, value in term.watched().items()
        }

    def _predictions(self) -> Iterator["WordPrediction"]:
        for term in self.terms:
            assert isinstance(term, WordPrediction)
            yield term


class WordPrediction(nn.Module):
    """The loss of one teacher's vocabulary at one level: mean over batch and positions of KL(p_T ‖ p_S)."""

    words: Tensor

    def __init__(
        self,
        reads: str,
        teacher: int,
        teacher_reads: str,
        *,
        words: Tensor,
        tau: float,
        grid: tuple[int, int],
        channels: int,
        gamma: float,
        top: int | None,
        stored: int,
        positions: int | None,
    ) -> None:
        """
        Args:
            top: m, the words that p_T keeps at each position; None: all.
            stored: m of a stored answer.
            positions: how many positions are drawn for each image and epoch; None: all.
        """
        super().__init__()
        self.reads, self.teacher, self.teacher_reads = reads, teacher, teacher_reads
        self.tau, self.grid, self.top, self.stored = tau, grid, top, stored
        places = grid[0] * grid[1]
        self.drawn = positions if positions is not None and positions < places else None
        self.register_buffer("words", words.float(), persistent=False)
        self.weight = nn.Parameter(torch.randn(len(words), channels) * (2 / channels) ** 0.5)
        self.gamma = nn.Parameter(torch.tensor(gamma))
        self.watch = base.RunningSums()

    def forward(
        self, student: base.Features, teachers: Sequence[base.Features], epoch: int, keys: Tensor | None
    ) -> Tensor:
        f_s = positions(student[self.reads], self.grid)
        teacher = teachers[self.teacher]
        answered = f"{self.teacher_reads}.ids" in teacher
        if answered:
            of_teacher = [teacher[f"{self.teacher_reads}.{part}"].flatten(0, 1) for part in ("ids", "p")]
        else:
            of_teacher = [positions(teacher[self.teacher_reads], self.grid)]
        if self.drawn is not None:
            places = self.grid[0] * self.grid[1]
            chosen = draw(keys, epoch, len(f_s) // places, places, self.drawn).to(f_s.device)
            f_s, *of_teacher = (rows[chosen] for rows in (f_s, *of_teacher))
        target = stored(*of_teacher) if answered else self._target(*of_teacher)
        f_s, weight = F.normalize(f_s, dim=1), F.normalize(self.weight, dim=1)
        return divergence(f_s, weight, self.gamma, target, self._look) / len(f_s)

    def _target(self, f_t: Tensor) -> Nearest | Whole:
        if self.top is not None and self.top < len(self.words):
            return nearest(f_t, self.words, self.tau, self.top)[0]
        return Whole(lambda rows: closeness(f_t[rows], self.words, self.tau), len(f_t))

    def answer(self) -> base.CachedOutput:
        return answer(self.teacher_reads, self.grid, self.words, self.tau, self.stored)

    @torch.no_grad()
    def _look(self, word: Tensor, top: Tensor, right: Tensor) -> None:
        ones = torch.ones_like(top)
        usage = torch.zeros(len(self.words), dtype=top.dtype, device=top.device)
        self.watch.add(
            positions=ones.sum(),
            usage=usage.index_add_(0, word, ones),
            max_p_t=top.sum(),
            right=right.sum(),
        )

    def watched(self) -> dict[str, Tensor]:
        sums = self.watch.take()
        if not sums:
            return {}
        n = sums["positions"]
        return {
            "perplexity": perplexity(sums["usage"]),
            "max_p_t": sums["max_p_t"] / n,
            "word_accuracy": sums["right"] / n,
            "gamma": self.gamma.detach(),
        }


def readout(level: str, network: base.Shapes) -> str:
    """The readout that holds a level's map: for the last level of a VGG, the map before its ReLU."""
    return "map_pre" if level == "map" and "map_pre" in network.maps else level


def _map(level: str, network: base.Shapes) -> tuple[int, int, int]:
    return network.maps[readout(level, network)]
