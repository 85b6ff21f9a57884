"""What a network's logits amount to: accuracy, each class, calibration, agreement, and files in pairs."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..evaluation import calibration, metrics, multi_label
from ..runs.scores import Accuracy
from ..significance import SIGNIFICANT, holm, mcnemar
from ..validation.results import ClassMeasure, Confused, Pair, Verdict
from .validate_inputs import Asked

MOST_IN_MATRIX = 100
"""A larger confusion matrix is not kept: the pairs confused most often say what it would."""

MOST_CONFUSED = 100


def measured(network: Asked, logits: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """What the images tell of a network, as fields of ``results.Network``.

    Args:
        logits: [n,classes], n > 0.
        targets: class numbers [n], or [n,classes] of zeros and ones where images have several labels.
    """
    labels = network.labels
    found: dict[str, Any] = {
        "calibration": calibration.measure(logits, targets),
        "mistakes": int((~right(network, logits, targets)).sum()),
    }
    if network.several:
        thresholds = thresholds_of(network)
        decided = multi_label.decide(logits, thresholds)
        return found | {
            "multi_label": multi_label.score(logits, targets, thresholds, labels),
            "per_class": _of_decided(decided, targets > 0, labels),
        }
    table = metrics.confusion(logits, targets)
    return found | {
        "accuracy": metrics.accuracy(logits, targets),
        "top5": metrics.top5(logits, targets),
        "per_class": _of_table(np.array(table), labels),
        "confusion": table if len(labels) <= MOST_IN_MATRIX else None,
        "confused": _confused(np.array(table), labels),
    }


def thresholds_of(network: Asked) -> np.ndarray:
    """A multi-label network's; even chances where nothing says any."""
    known = network.thresholds
    return np.full(len(network.labels), multi_label.EVEN) if known is None else known


def right(network: Asked, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """bool [n]: the answer is the label, or with several labels the very same ones."""
    if targets.ndim == 1:
        return np.asarray(logits.argmax(1) == targets)
    decided = multi_label.decide(logits, thresholds_of(network))
    return np.asarray((decided == (targets > 0)).all(1))


def agreement(
    student: Asked, logits: np.ndarray, teacher: Asked, others: np.ndarray, *, several: bool
) -> Accuracy | None:
    """How often the student's answer is the teacher's; None where they know different classes."""
    columns = in_order_of(student, teacher)
    if columns is None:
        return None
    if not several:
        return metrics.agreement(logits, others[:, columns])
    return metrics.agreement(
        logits, others[:, columns], thresholds_of(student), thresholds_of(teacher)[columns]
    )


def in_order_of(student: Asked, teacher: Asked) -> list[int] | None:
    """Where the teacher has each of the student's classes; None where they are not the same ones."""
    if set(student.labels) != set(teacher.labels) or len(student.labels) != len(teacher.labels):
        return None
    place = {name: number for number, name in enumerate(teacher.labels)}
    return [place[name] for name in student.labels]


def pairs(names: Sequence[str], rights: Sequence[np.ndarray]) -> list[Pair]:
    """Every two files on the same images; ``rights`` bool [n] each."""
    found = []
    for i, k in combinations(range(len(names)), 2):
        alone, other = int((rights[i] & ~rights[k]).sum()), int((rights[k] & ~rights[i]).sum())
        found.append((names[i], names[k], alone, other, mcnemar(alone, other)))
    corrected = holm([one[-1] for one in found])
    n = max((len(one) for one in rights), default=1)
    return [
        Pair(
            first=first,
            second=second,
            first_alone=alone,
            second_alone=other,
            points=100 * (alone - other) / n,
            p=p,
            p_holm=p_holm,
            verdict=verdict(alone - other, p_holm),
        )
        for (first, second, alone, other, p), p_holm in zip(found, corrected, strict=True)
    ]


def verdict(difference: float, p: float) -> Verdict:
    if p >= SIGNIFICANT or difference == 0:
        return "no difference"
    return "better" if difference > 0 else "worse"


def _of_table(table: np.ndarray, labels: Sequence[str]) -> list[ClassMeasure]:
    shown, answered, correct = table.sum(1), table.sum(0), table.diagonal()
    return [_class(*row) for row in zip(labels, shown, answered, correct, strict=True)]


def _of_decided(decided: np.ndarray, shown: np.ndarray, labels: Sequence[str]) -> list[ClassMeasure]:
    counts = (shown.sum(0), decided.sum(0), (decided & shown).sum(0))
    return [_class(*row) for row in zip(labels, *counts, strict=True)]


def _class(label: str, n: int, answered: int, correct: int) -> ClassMeasure:
    n, answered, correct = int(n), int(answered), int(correct)
    return ClassMeasure(
        label=label,
        n=n,
        answered=answered,
        correct=correct,
        recall=Accuracy.of(correct, n) if n else None,
        precision=Accuracy.of(correct, answered) if answered else None,
        f1=200 * correct / (n + answered) if n + answered else None,
    )


def _confused(table: np.ndarray, labels: Sequence[str]) -> list[Confused]:
    missed = table.copy()
    np.fill_diagonal(missed, 0)
    places = np.argsort(-missed, axis=None, kind="stable")[:MOST_CONFUSED]
    pairs = [divmod(int(place), len(labels)) for place in places]
    return [
        Confused(
            label=labels[truth],
            answer=labels[answer],
            n=int(missed[truth, answer]),
            share=100 * float(missed[truth, answer] / table[truth].sum()),
        )
        for truth, answer in pairs
        if missed[truth, answer]
    ]
