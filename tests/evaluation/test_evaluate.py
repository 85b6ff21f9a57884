"""Accuracy, its interval, and what else is counted, by hand."""

import numpy as np
import pytest
from questpress.pipeline.evaluation.metrics import accuracy, agreement, confusion, per_class
from questpress.pipeline.runs.scores import Accuracy


def one_hot(answers: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: the score interval.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons_as_published(correct, n, low, high):
    found = Accuracy.of(correct, n)
    assert found.top1 == pytest.approx(100 * correct / n)
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high), abs=0.006)


def test_the_interval_ends_at_0_and_100():
    assert Accuracy.of(0, 5).low == 0 and Accuracy.of(5, 5).high == 100
    assert Accuracy.of(5, 5).low < 100


def test_top_1_counts_the_largest_logit():
    found = accuracy(one_hot([0, 1, 2, 0, 2, 1], 3), np.array([0, 1, 2, 0, 1, 2]))
    assert (found.correct, found.n) == (4, 6) and found.top1 == pytest.approx(200 / 3)
    assert found.top5 is None and found.balanced is None


def test_top_5_is_told_above_ten_classes():
    logits = np.tile(np.arange(12.0), (3, 1))
    found = accuracy(logits, np.array([11, 7, 6]))
    assert found.correct == 1 and found.top5 == pytest.approx(200 / 3)


def test_the_balanced_accuracy_is_told_where_classes_are_uneven():
    labels = np.array([0] * 8 + [1] * 2)
    found = accuracy(one_hot([0] * 10, 3), labels)
    assert found.top1 == 80 and found.balanced == 50  # the class without images doesn't count
    assert accuracy(one_hot([0] * 5, 2), np.array([0, 0, 0, 1, 1])).balanced is None


def test_counts_per_class_and_confusions_add_up():
    labels, answers = np.array([0, 0, 1, 2, 2, 2]), one_hot([0, 1, 1, 2, 2, 0], 3)
    counts = per_class(answers, labels, ("a", "b", "c"))
    assert [(c.label, c.n, c.correct) for c in counts] == [("a", 2, 1), ("b", 1, 1), ("c", 3, 2)]
    assert confusion(answers, labels) == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_the_agreement_is_the_share_of_equal_answers():
    found = agreement(one_hot([0, 1, 2, 2], 3), 5 * one_hot([0, 1, 1, 2], 3) - 7)
    assert (found.correct, found.n) == (3, 4)
