"""Probabilities of logits and their calibration: likelihoods, expected calibration error, temperature.

Logits are [n,classes] as a network returns them; labels are as the :class:`Likelihood` takes them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq  # type: ignore[import-untyped]
from torch import Tensor

from ..errors import JobError
from ..runs.scores import Calibration, ReliabilityBin, Temperature

CHUNK = 1 << 22
"""Logits whose probabilities are computed at once, in float64."""
BINS = 15
RESAMPLES = 1000
Z = 1.959963984540054
"""Half-width of a 95 % interval in standard deviations."""
LOWEST, HIGHEST = 0.05, 20.0
"""Bounds of a fitted temperature."""


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
        parts: list[tuple[Tensor, ...]] = []
        for z, target in _chunks(torch.from_numpy(logits), torch.from_numpy(labels)):
            log_p = z.log_softmax(1)
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


def measure(
    logits: np.ndarray, labels: np.ndarray, likelihood: Likelihood, temperature: float | None = None
) -> Calibration | None:
    """Measure the calibration of logits [n,classes], n > 0; None if one of them is not finite.

    Args:
        temperature: the divisor already applied to these logits; ``before`` is measured without it.

    The interval of the ECE is a bootstrap over images: 1.96 standard deviations of the resamples to either
    side, and their bias added to the lower one, since the ECE of few images is too large on average, and
    a resample's again. It ends at 0 if the ECE is within what 95 of 100 calibrated networks of these
    confidences would show on as many images. docs/calibration.md has its coverage.
    """
    if not np.isfinite(logits).all():
        return None
    predictions = likelihood.predict(logits, labels)
    index = bin_of(predictions.confidence)
    ece = _ece(predictions)
    low, high = _interval(ece, _gaps(predictions, index), predictions, index)
    confidence, accuracy = float(predictions.confidence.mean()), float(predictions.correct.mean())
    gap_by_image = (predictions.confidence - predictions.correct).mean(1)
    half = Z * float(gap_by_image.std()) / np.sqrt(len(gap_by_image))
    return Calibration(
        ece=100 * ece,
        ece_low=100 * low,
        ece_high=100 * high,
        confidence=100 * confidence,
        accuracy=100 * accuracy,
        gap_low=100 * (confidence - accuracy - half),
        gap_high=100 * (confidence - accuracy + half),
        entropy=predictions.entropy,
        nll=predictions.nll,
        n=len(logits),
        bins=_bins(predictions, index),
        temperature=temperature,
        before=None if temperature is None else measure(logits * np.float64(temperature), labels, likelihood),
    )


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Return the bin of each confidence: number i holds (i/15, (i+1)/15], the first one 0 as well."""
    # torchmetrics' own edges, to the bit: a confidence on an edge lies on the same side of both.
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64).numpy()
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)


def _ece(predictions: Predictions) -> float:
    """Compute torchmetrics' binary error of (confidence, correct); its multiclass one is the same in fp32.

    Its bins are [lo,hi), with one more for 1. The next smaller number puts a confidence on an edge into the
    bin below, so that they are (lo,hi] as in the papers.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    below = np.nextafter(predictions.confidence, 0.0)
    correct = torch.from_numpy(predictions.correct).long()
    return float(binary_calibration_error(torch.from_numpy(below), correct, n_bins=BINS, norm="l1"))


def _gaps(predictions: Predictions, index: np.ndarray) -> np.ndarray:
    """Return each image's term of the bins' gaps, [n,15]; the ECE is the sum of their means' magnitudes."""
    n, per_image = predictions.confidence.shape
    place = np.arange(n)[:, None] * BINS + index
    gaps = (predictions.correct - predictions.confidence) / per_image
    return np.bincount(place.ravel(), gaps.ravel(), n * BINS).reshape(n, BINS)


def _interval(
    ece: float, gaps: np.ndarray, predictions: Predictions, index: np.ndarray
) -> tuple[float, float]:
    n, per_image = predictions.confidence.shape
    rng = np.random.default_rng(0)
    resampled = [
        np.abs(np.bincount(rng.integers(0, n, n), minlength=n) @ gaps).sum() / n for _ in range(RESAMPLES)
    ]
    half = Z * np.std(resampled)
    low, high = ece - (np.mean(resampled) - ece) - half, ece + half
    # A calibrated network is correct with the probability it reports, so the bins' gaps are nearly normal.
    # The predictions of one image are dependent, which the squares of its gaps account for.
    chance = predictions.confidence * (1 - predictions.confidence)
    variance = np.bincount(index.ravel(), chance.ravel(), BINS) / per_image**2
    deviation = np.sqrt(np.maximum(variance, (gaps**2).sum(0)))
    calibrated = np.abs(rng.standard_normal((RESAMPLES, BINS)) * deviation).sum(1) / n
    if ece <= np.quantile(calibrated, 0.95):
        low = 0.0
    return min(max(float(low), 0.0), ece), max(float(high), ece)


def _bins(predictions: Predictions, index: np.ndarray) -> list[ReliabilityBin]:
    weights = (None, predictions.confidence.ravel(), predictions.correct.ravel())
    sums = [np.bincount(index.ravel(), weight, BINS).tolist() for weight in weights]
    return [
        ReliabilityBin(
            low=100 * i / BINS,
            high=100 * (i + 1) / BINS,
            n=n,
            confidence=100 * confidence / n if n else None,
            accuracy=100 * correct / n if n else None,
        )
        for i, (n, confidence, correct) in enumerate(zip(*sums, strict=True))
    ]


def fit_temperature(logits: np.ndarray, labels: np.ndarray, likelihood: Likelihood) -> Temperature:
    """Fit the T that minimizes the NLL of logits/T.

    The NLL is convex in 1/T, so that its slope has at most one root. The result has a note if T is at a bound
    (without a wrong prediction, T = 0 is best) or if no T changes anything.

    Raises:
        JobError: there is no image, or a logit is not finite.
    """
    if not len(logits):
        raise JobError("--calibrate: there are no val images to fit on. Set --val-fraction 0.1.")
    if not np.isfinite(logits).all():
        raise JobError("--calibrate: some logits are not finite. Omit it to find out which stage made them.")
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    z = likelihood.center(z)

    def mean_nll(beta: float) -> float:
        return float(torch.cat([likelihood.nll(beta, *part) for part in _chunks(z, y)]).mean())

    def slopes(beta: float) -> tuple[Tensor, Tensor]:
        first, second = zip(*(likelihood.slopes(beta, *part) for part in _chunks(z, y)), strict=True)
        return torch.cat(first), torch.cat(second)

    n, nll_before = len(z), mean_nll(1.0)
    if not z.any():
        note = "the logits of each image are all equal, so no temperature changes anything"
        return Temperature(value=1.0, n=n, nll_before=nll_before, nll_after=nll_before, note=note)
    beta, bound = _minimize(lambda beta: float(slopes(beta)[0].mean()))
    low = high = None
    if bound is None:
        slope, curvature = slopes(beta)
        # The standard error of log T from the images' slopes, by the delta method.
        half = Z * float(slope.std(correction=0)) / np.sqrt(n) / float(curvature.mean()) / beta
        low, high = float(np.exp(-half)) / beta, float(np.exp(half)) / beta
    return Temperature(
        value=1 / beta, low=low, high=high, n=n, nll_before=nll_before, nll_after=mean_nll(beta), note=bound
    )


def _minimize(slope: Callable[[float], float]) -> tuple[float, str | None]:
    """Return 1/T at the root of the slope, or at a bound with a note."""
    if slope(1 / LOWEST) <= 0:
        return 1 / LOWEST, f"the best temperature would be below {LOWEST:g}, the lowest allowed"
    if slope(1 / HIGHEST) >= 0:
        return 1 / HIGHEST, f"the best temperature would be above {HIGHEST:g}, the highest allowed"
    return float(brentq(slope, 1 / HIGHEST, 1 / LOWEST, xtol=1e-12)), None


def _chunks(z: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, CHUNK // z.shape[1])
    for logits, labels in zip(z.split(rows), y.split(rows), strict=True):
        yield logits.double(), labels
