"""How much accuracy int8 may cost, and whether a candidate keeps to it.

A candidate is refused when it loses more than ``--max-drop`` points to the fp32 file on the same images, and
that is either more than two images or significant by McNemar's test (McNemar 1947; exact, two-sided, 5 %). A
loss within the budget is never refused, and one or two images of a small select role are chance.
"""

import numpy as np

from ..export.int8.search import Verdict
from .evaluation import metrics
from .significance import SIGNIFICANT, mcnemar

FEW = 2
"""Images that may be lost in any case."""


class Budget:
    """The fp32 file's answers on the images that decide, and how much may be lost of them."""

    def __init__(self, answers: np.ndarray, labels: np.ndarray, max_drop: float) -> None:
        """
        Args:
            answers: the fp32 file's logits [n,classes], n > 0.
            labels: class numbers [n], or [n,classes] of zeros and ones where images have several labels.
        """
        self.answers, self.labels, self.max_drop = answers, labels, max_drop
        self.score = metrics.percent(answers, labels)

    def verdict(self, logits: np.ndarray) -> Verdict:
        """What a candidate with these logits is worth."""
        score = metrics.percent(logits, self.labels)
        lost = self.score - score
        noise = float(np.square(logits.astype(np.float64) - self.answers).sum())
        power = float(np.square(self.answers, dtype=np.float64).sum())
        sqnr = 10 * float(np.log10(power / noise)) if noise and power else float("inf")
        if self.labels.ndim == 2:
            return Verdict(score, lost, lost <= self.max_drop, sqnr)
        right, was_right = logits.argmax(1) == self.labels, self.answers.argmax(1) == self.labels
        worse, better = int((was_right & ~right).sum()), int((right & ~was_right).sum())
        p = mcnemar(worse, better)
        refused = lost > self.max_drop and (worse - better > FEW or p < SIGNIFICANT)
        return Verdict(score, lost, not refused, sqnr, {"p": p})
