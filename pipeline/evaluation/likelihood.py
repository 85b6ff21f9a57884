"""How logits become probabilities: a softmax over classes, or one sigmoid per class."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 22
"""Logits whose probabilities are computed at once, in float64."""


@dataclass(frozen=True)
class Predictions:
    """Confidence and correctness (0 or 1) of each prediction, [n,a]; mean entropy and NLL in nats."""

    confidence: np.ndarray
    correct: np.ndarray
    entropy: float
    nll: float


class Likelihood(ABC):
    """The probability model of labels given logits [n,classes]."""

    @abstractmethod
    def predict(self, logits: np.ndarray, labels: np.ndarray) -> Predictions:
        """Return the predictions whose confidence is to be calibrated."""

    @abstractmethod
    def average(self, logits: Tensor) -> Tensor:
        """Return the logits [n,classes] of the mean probabilities of networks with logits [m,n,classes]."""

    def center(self, z: Tensor) -> Tensor:
        """Return logits of the same probabilities that are all 0 if the probabilities are equal."""
        return z

    @abstractmethod
    def nll(self, beta: float, z: Tensor, y: Tensor) -> Tensor:
        """Return the NLL of each image at logits ``beta * z``, [n]."""

    @abstractmethod
    def slopes(self, beta: float, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and second derivative of each image's NLL with respect to ``beta``, [n]."""

    def ensemble(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """Return logits whose probabilities are the mean of several networks' probabilities."""
        if len(logits) == 1:
            return logits[0]
        return self.average(torch.from_numpy(np.stack(logits)).double()).numpy()


class Softmax(Likelihood):
    """Labels are class numbers [n]; one prediction per image."""

    def predict(self, logits: np.ndarray, labels: np.ndarray) -> Predictions:
        rows = max(1, CHUNK // logits.shape[1])
        parts: list[tuple[Tensor, ...]] = []
        chunks = [torch.from_numpy(array).split(rows) for array in (logits, labels)]
        for z, target in zip(*chunks, strict=True):
            log_p = z.double().log_softmax(1)
            p = log_p.exp()
            confidence, predicted = p.max(1)
            entropy, nll = -(p * log_p).sum(1), -log_p.gather(1, target.long()[:, None])[:, 0]
            parts.append((confidence, (predicted == target).double(), entropy, nll))
        confidence, correct, entropy, nll = (torch.cat(part) for part in zip(*parts, strict=True))
        return Predictions(
            confidence.numpy()[:, None], correct.numpy()[:, None], float(entropy.mean()), float(nll.mean())
        )

    def average(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(2).logsumexp(0) - float(np.log(len(logits)))

    def center(self, z: Tensor) -> Tensor:
        return z - z.amax(1, keepdim=True)

    def nll(self, beta: float, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(beta * z, y.long(), reduction="none")

    def slopes(self, beta: float, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1)
        return mean - z.gather(1, y.long()[:, None])[:, 0], (p * (z - mean[:, None]) ** 2).sum(1)


class Sigmoid(Likelihood):
    """Labels are 0 or 1 [n,classes]; each class of each image is a prediction with its probability."""

    def predict(self, logits: np.ndarray, labels: np.ndarray) -> Predictions:
        z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels).double()
        p, log_p, log_q = z.sigmoid(), F.logsigmoid(z), F.logsigmoid(-z)
        entropy = -(p * log_p + (1 - p) * log_q).mean()
        return Predictions(
            p.numpy(), y.numpy(), float(entropy), float(F.binary_cross_entropy_with_logits(z, y))
        )

    def average(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)

    def nll(self, beta: float, z: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(beta * z, y.double(), reduction="none").mean(1)

    def slopes(self, beta: float, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        p = (beta * z).sigmoid()
        return (z * (p - y)).mean(1), (z**2 * p * (1 - p)).mean(1)
