"""Mean average precision and thresholds, by hand and against scikit-learn."""

import numpy as np
import pytest
from questpress.export.runtime import sigmoid
from questpress.pipeline.evaluation import average_precision
from sklearn.metrics import average_precision_score, f1_score

N, C = 60, 4
RNG = np.random.default_rng(0)
TARGETS = (RNG.random((N, C)) < [0.5, 0.3, 0.1, 0.2]).astype(np.float32)
LOGITS = (3 * TARGETS + 2 * RNG.standard_normal((N, C)) - 2).astype(np.float32).round(1)  # with equal ones


def test_map_is_the_mean_of_scikit_learns_average_precision() -> None:
    expected = 100 * np.mean([average_precision_score(TARGETS[:, c], LOGITS[:, c]) for c in range(C)])
    assert average_precision.mean_average_precision(LOGITS, TARGETS) == pytest.approx(expected, abs=1e-6)


def test_weighted_image_counts_as_often_as_copies_of_it() -> None:
    weights = RNG.integers(0, 4, N).astype(float)
    found = average_precision.average_precision(average_precision.Ranking(LOGITS, TARGETS), weights)
    copies = np.repeat(np.arange(N), weights.astype(int))
    for c in range(C):
        expected = average_precision_score(TARGETS[copies, c], LOGITS[copies, c])
        assert found[c] == pytest.approx(expected)


def test_threshold_has_the_best_f1_of_all_there_are() -> None:
    chosen = average_precision.choose_thresholds(LOGITS, TARGETS)
    p = sigmoid(LOGITS)
    for c in range(C):
        each = [f1_score(TARGETS[:, c], p[:, c] >= one) for one in p[:, c]]
        assert f1_score(TARGETS[:, c], p[:, c] >= chosen[c]) == pytest.approx(max(each))
        assert not np.isclose(p[:, c], chosen[c], atol=1e-9).any()  # between two probabilities


def test_thresholds_at_the_ends() -> None:
    targets = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1]], dtype=np.float32)
    logits = np.array([[1, 0, 2], [2, 1, -2], [3, 2, 2]], dtype=np.float32)
    all_shown, none_shown, split = average_precision.choose_thresholds(logits, targets)
    assert 0 < all_shown < sigmoid(np.array([1.0]))[0]
    assert none_shown == 0.5
    assert split == pytest.approx(0.5)  # halfway between σ(2) and σ(−2)


def test_highest_of_equal_thresholds_is_chosen() -> None:
    # One of two taken: precision 1, recall ½. Four taken: ½ and 1. Both have F1 2/3.
    targets = np.array([[1], [0], [0], [1]], dtype=np.float32)
    logits = np.array([[2], [1], [0], [-1]], dtype=np.float32)
    assert average_precision.choose_thresholds(logits, targets)[0] > sigmoid(np.array([1.0]))[0]
