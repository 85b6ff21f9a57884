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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import base
from .blocks import sum_over_blocks
from .grid import positions, shared_grid
from .quest_parameters import Parameters
from .vocabulary import check_words, learn_vocabulary, perplexity


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
    def prepare(cls, parameters: Parameters, preparation: base.Preparation) -> base.Prepared:
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
                tensors[f"{t}.{level}.words"] = learned.words
                tensors[f"{t}.{level}.mu"] = torch.tensor(learned.mu)
                facts.append({"teacher": name, "level": level, **learned.facts()})
        summary = "; ".join(
            f"{f['words']} words from {f['features_used']:,} of {f['features']:,} features, perplexity "
            f"{f['perplexity']:.0f}"
            for f in facts
        )
        return base.Prepared(tensors, {"words": facts}, summary)

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
            )
            for t, teacher in enumerate(teachers)
            for level in parameters.levels
        )

    def forward(
        self,
        student: base.Readout,
        teachers: Sequence[base.Readout],
        labels: Tensor,
        epoch: int,
    ) -> dict[str, Tensor]:
        divergence = torch.stack([term(student, teachers) for term in self.terms]).sum()
        return {"quest": self.alpha * divergence}

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
    ) -> None:
        super().__init__()
        self.reads, self.teacher, self.teacher_reads = reads, teacher, teacher_reads
        self.tau, self.grid = tau, grid
        self.register_buffer("words", words.float(), persistent=False)
        self.weight = nn.Parameter(torch.randn(len(words), channels) * (2 / channels) ** 0.5)
        self.gamma = nn.Parameter(torch.tensor(gamma))
        self.watch = base.Watch()

    def forward(self, student: base.Readout, teachers: Sequence[base.Readout]) -> Tensor:
        f_t = positions(teachers[self.teacher][self.teacher_reads], self.grid)
        f_s = F.normalize(positions(student[self.reads], self.grid), dim=1)
        weight = F.normalize(self.weight, dim=1)
        total = sum_over_blocks(self._divergence, len(self.words), f_t, f_s, weight, self.gamma)
        return total / len(f_t)

    def _divergence(self, f_t: Tensor, f_s: Tensor, weight: Tensor, gamma: Tensor) -> Tensor:
        """KL(p_T ‖ p_S), summed over the positions of a block; f_S [n,C_S] and W [K,C_S] of length 1."""
        log_p_t = assign(f_t, self.words, self.tau)
        log_p_s = predict(f_s, weight, gamma)
        self._look(log_p_t, log_p_s)
        return (log_p_t.exp() * (log_p_t - log_p_s)).sum()

    @torch.no_grad()
    def _look(self, log_p_t: Tensor, log_p_s: Tensor) -> None:
        top, word = log_p_t.max(dim=1)
        ones = torch.ones_like(top)
        self.watch.add(
            positions=ones.sum(),
            usage=torch.zeros_like(log_p_t[0]).index_add_(0, word, ones),
            max_p_t=top.exp().sum(),
            right=(log_p_s.argmax(dim=1) == word).sum(),
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


def assign(f_t: Tensor, words: Tensor, tau: float) -> Tensor:
    """The teacher's soft assignment log p_T, p_T = softmax(−‖f_T − v_k‖²/τ), over the words.

    The distance is computed in fp32 even under autocast: its terms cancel in half precision.

    Args:
        f_t: [n,C] the teacher's features.
        words: [K,C] the vocabulary.
        tau: τ, in squared units of the features.

    Returns:
        [n,K] log-probabilities.
    """
    with torch.autocast(f_t.device.type, enabled=False):
        # ‖f‖² is the same for every word and drops out of the softmax.
        closeness = torch.addmm(-words.square().sum(1), f_t.to(words.dtype), words.T, alpha=2)
        return F.log_softmax(closeness / tau, dim=1)


def predict(f_s: Tensor, weight: Tensor, gamma: Tensor) -> Tensor:
    """The student's log p_S, p_S = softmax(γ·⟨W_k, f_S⟩), over the words.

    Args:
        f_s: [n,C] the student's features, each of length 1.
        weight: [K,C] W, each row of length 1.
        gamma: scalar γ.

    Returns:
        [n,K] log-probabilities; the softmax in γ's precision, the product under autocast in that.
    """
    cosine = f_s @ weight.T
    return F.log_softmax(gamma * cosine.to(gamma.dtype), dim=1)
