"""How honest probabilities are: expected calibration error with its interval, entropy, NLL, reliability bins.

Logits come as a network gives them, [n,classes]. Labels are class numbers [n], answered through a softmax, or
one number for each class [n,classes], 0 or 1 (several labels an image), answered through sigmoids: then every
class of every image is an answer of its own, and its confidence is the probability that the class is there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..errors import JobError
from ..runs.scores import Calibration, ReliabilityBin, Temperature

BINS = 15
RESAMPLES = 1000
CHUNK = 1 << 22
"""Logits whose probabilities are computed at once, in float64."""
Z = 1.959963984540054
"""Of a 95 % interval, in standard deviations."""


@dataclass(frozen=True)
class Answers:
    """``confidence`` and ``right`` (0 or 1) of every answer, [n,a]; ``entropy``, ``nll``: means, in nats."""

    confidence: np.ndarray
    right: np.ndarray
    entropy: float
    nll: float


def measure(logits: np.ndarray, labels: np.ndarray, temperature: float | None = None) -> Calibration | None:
    """Calibration of logits [n,classes], n > 0; None where one of them is not finite.

    Args:
        temperature: what these logits were already divided by; ``before`` then measures them without.

    The ECE's interval is a bootstrap over images: 1.96 of the resamples' standard deviations to either side,
    and their bias more to the lower one, since an ECE of few images is too large on average, and a resample's
    again. It ends at 0 where the ECE is within what 95 of 100 honest networks of these confidences would show
    on as many images. How often it holds the true value is in docs/calibration.md.
    """
    if not np.isfinite(logits).all():
        return None
    multilabel = labels.ndim == 2
    answers = _of_classes(logits, labels) if multilabel else _of_images(logits, labels)
    index = bin_of(answers.confidence)
    gaps = _gaps(answers, index)
    ece = _ece(answers)
    low, high = _interval(ece, gaps, answers, index)
    confidence, accuracy = float(answers.confidence.mean()), float(answers.right.mean())
    # The gap is a mean over images.
    by_image = (answers.confidence - answers.right).mean(1)
    half = Z * float(by_image.std()) / np.sqrt(len(by_image))
    return Calibration(
        ece=100 * ece,
        ece_low=100 * low,
        ece_high=100 * high,
        confidence=100 * confidence,
        accuracy=100 * accuracy,
        gap_low=100 * (confidence - accuracy - half),
        gap_high=100 * (confidence - accuracy + half),
        entropy=answers.entropy,
        nll=answers.nll,
        n=len(logits),
        multilabel=multilabel,
        bins=_bins(answers, index),
        temperature=temperature,
        before=None if temperature is None else measure(logits * np.float64(temperature), labels),
    )


def together(logits: Sequence[np.ndarray], *, multilabel: bool = False) -> np.ndarray:
    """Logits [n,classes] whose probabilities are the mean of several networks' probabilities."""
    if len(logits) == 1:
        return logits[0]
    each = torch.from_numpy(np.stack(logits)).double()
    count = float(np.log(len(logits)))
    if not multilabel:
        return (each.log_softmax(2).logsumexp(0) - count).numpy()
    there = torch.nn.functional.logsigmoid(each).logsumexp(0)
    absent = torch.nn.functional.logsigmoid(-each).logsumexp(0)
    return (there - absent).numpy()


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence: number i holds (i/15, (i+1)/15], the first one 0 as well."""
    return np.clip(np.searchsorted(_edges(), confidence, side="left") - 1, 0, BINS - 1)


def _edges() -> np.ndarray:
    # torchmetrics' own, to the bit: a confidence on an edge lies on the same side of both.
    edges: np.ndarray = torch.linspace(0, 1, BINS + 1, dtype=torch.float64).numpy()
    return edges


def _of_images(logits: np.ndarray, labels: np.ndarray) -> Answers:
    rows = max(1, CHUNK // logits.shape[1])
    parts: list[tuple[Tensor, ...]] = []
    for z, target in zip(*(torch.from_numpy(one).split(rows) for one in (logits, labels)), strict=True):
        log_p = z.double().log_softmax(1)
        p = log_p.exp()
        confidence, answer = p.max(1)
        entropy, nll = -(p * log_p).sum(1), -log_p.gather(1, target.long()[:, None])[:, 0]
        parts.append((confidence, (answer == target).double(), entropy, nll))
    confidence, right, entropy, nll = (torch.cat(part) for part in zip(*parts, strict=True))
    return Answers(
        confidence.numpy()[:, None], right.numpy()[:, None], float(entropy.mean()), float(nll.mean())
    )


def _of_classes(logits: np.ndarray, labels: np.ndarray) -> Answers:
    z, there = torch.from_numpy(logits).double(), torch.from_numpy(labels).double()
    p, log_p, log_q = z.sigmoid(), torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
    return Answers(
        p.numpy(),
        there.numpy(),
        entropy=float(-(p * log_p + (1 - p) * log_q).mean()),
        nll=float(torch.nn.functional.binary_cross_entropy_with_logits(z, there)),
    )


def _ece(answers: Answers) -> float:
    """torchmetrics' binary error of (confidence, right): to it the multiclass one comes down, but in fp32.

    Its bins are [lo,hi), with one more for 1; the next smaller number puts a confidence on an edge into the
    bin below, so that they are (lo,hi], as in the papers.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    below = np.nextafter(answers.confidence, 0.0)
    right = torch.from_numpy(answers.right).long()
    return float(binary_calibration_error(torch.from_numpy(below), right, n_bins=BINS, norm="l1"))


def _gaps(answers: Answers, index: np.ndarray) -> np.ndarray:
    """What each image adds to the ECE's bins, [n,15]: the ECE is the sum of their means' magnitudes."""
    n, each = answers.confidence.shape
    place = np.arange(n)[:, None] * BINS + index
    gaps = (answers.right - answers.confidence) / each
    return np.bincount(place.ravel(), gaps.ravel(), n * BINS).reshape(n, BINS)


def _interval(ece: float, gaps: np.ndarray, answers: Answers, index: np.ndarray) -> tuple[float, float]:
    n, each = answers.confidence.shape
    rng = np.random.default_rng(0)
    resampled = [
        np.abs(np.bincount(rng.integers(0, n, n), minlength=n) @ gaps).sum() / n for _ in range(RESAMPLES)
    ]
    half = Z * np.std(resampled)
    low, high = ece - (np.mean(resampled) - ece) - half, ece + half
    # An honest network is right with the probability it says: the bins' gaps are then nearly normal. Those of
    # one image's classes go together, which their own squares know of.
    chance = answers.confidence * (1 - answers.confidence)
    variance = np.bincount(index.ravel(), chance.ravel(), BINS) / each**2
    deviation = np.sqrt(np.maximum(variance, (gaps**2).sum(0)))
    honest = np.abs(rng.standard_normal((RESAMPLES, BINS)) * deviation).sum(1) / n
    if ece <= np.quantile(honest, 0.95):
        low = 0.0
    return min(max(float(low), 0.0), ece), max(float(high), ece)


def _bins(answers: Answers, index: np.ndarray) -> list[ReliabilityBin]:
    place = index.ravel()
    counts = np.bincount(place, minlength=BINS)
    confidence = np.bincount(place, answers.confidence.ravel(), BINS)
    right = np.bincount(place, answers.right.ravel(), BINS)
    return [
        ReliabilityBin(
            low=100 * i / BINS,
            high=100 * (i + 1) / BINS,
            n=int(counts[i]),
            confidence=100 * float(confidence[i]) / int(counts[i]) if counts[i] else None,
            accuracy=100 * float(right[i]) / int(counts[i]) if counts[i] else None,
        )
        for i in range(BINS)
    ]


LOWEST, HIGHEST = 0.05, 20.0
"""Between which a temperature is looked for."""

HALVINGS = 40
"""Of the bracket's logarithm: T is then known to eleven digits."""

TEMPERATURE_CHUNK = 1 << 22
"""Logits that are computed with at once, in float64."""


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> Temperature:
    """T that makes the NLL of logits/T least; with several labels an image, their binary cross-entropy.

    The NLL is convex in 1/T, so its slope there is zero at one place only, which bisection finds.

    Args:
        logits: [n,classes]; labels: class numbers [n], or 0 and 1 [n,classes].

    Returns:
        With a note where T is at a bound (data that is all answered right wants T = 0), or where no T changes
        anything because every image's logits are all alike.

    Raises:
        JobError: there is no image, or a logit is not finite.
    """
    if not len(logits):
        raise JobError("--calibrate has no val image to fit a temperature on; hold some out.")
    if not np.isfinite(logits).all():
        raise JobError("--calibrate found logits that are not finite; leave it out to see where from.")
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    if y.ndim == 1:
        z = z - z.amax(1, keepdim=True)  # changes no probability
    n, nll_before = len(z), _nll(1.0, z, y)
    if not z.any():
        note = "every image's logits are all alike, so that no temperature changes anything"
        return Temperature(value=1.0, n=n, nll_before=nll_before, nll_after=nll_before, note=note)
    low, high, note = 1 / HIGHEST, 1 / LOWEST, ""
    if _slopes(high, z, y)[0].mean() <= 0:
        beta, note = high, f"the best temperature would be below {LOWEST:g}, the least that is allowed"
    elif _slopes(low, z, y)[0].mean() >= 0:
        beta, note = low, f"the best temperature would be above {HIGHEST:g}, the most that is allowed"
    else:
        for _ in range(HALVINGS):
            beta = float(np.sqrt(low * high))
            if _slopes(beta, z, y)[0].mean() < 0:
                low = beta
            else:
                high = beta
    least = most = None
    if not note:
        slopes, curvature = _slopes(beta, z, y)
        # The estimate's deviation from the images' own slopes (the delta method, in log T).
        half = 1.959963984540054 * float(slopes.std(correction=0)) / np.sqrt(n) / curvature / beta
        least, most = float(np.exp(-half)) / beta, float(np.exp(half)) / beta
    return Temperature(
        value=1 / beta,
        low=least,
        high=most,
        n=n,
        nll_before=nll_before,
        nll_after=_nll(beta, z, y),
        note=note or None,
    )


def _slopes(beta: float, z: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """d NLL/dβ of each image at β = 1/T, [n], and the mean of the second derivative."""
    slopes, curvature = [], 0.0
    for z_, y_ in _chunks(z, y):
        if y.ndim == 1:
            p = (beta * z_).softmax(1)
            mean = (p * z_).sum(1)
            slopes.append(mean - z_.gather(1, y_.long()[:, None])[:, 0])
            curvature += float((p * (z_ - mean[:, None]) ** 2).sum())
        else:
            p = (beta * z_).sigmoid()
            slopes.append((z_ * (p - y_)).mean(1))
            curvature += float((z_**2 * p * (1 - p)).mean(1).sum())
    return torch.cat(slopes), curvature / len(z)


def _nll(beta: float, z: Tensor, y: Tensor) -> float:
    total = 0.0
    for z_, y_ in _chunks(z, y):
        if y.ndim == 1:
            total += float(cross_entropy(beta * z_, y_.long(), reduction="sum"))
        else:
            total += float(binary_cross_entropy_with_logits(beta * z_, y_.double())) * len(z_)
    return total / len(z)


def _chunks(z: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, TEMPERATURE_CHUNK // z.shape[1])
    for part, labels in zip(z.split(rows), y.split(rows), strict=True):
        yield part.double(), labels
