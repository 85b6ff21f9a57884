"""One temperature for a network's logits, so that its probabilities are honest (Guo et al., ICML 2017)."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from .errors import JobError
from .runs.scores import Temperature

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
        raise JobError("--calibrate has no select image to fit a temperature on; hold some out.")
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
