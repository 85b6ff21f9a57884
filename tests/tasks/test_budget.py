"""The accuracy budget of int8 candidates."""

import numpy as np
import pytest
from questpress.pipeline.evaluation.comparison import mcnemar
from questpress.pipeline.stages.quantize import Budget
from questpress.pipeline.tasks import load_task

CLASSIFICATION = load_task("classification")
MULTI_LABEL = load_task("multi-label")


def logits_with(correct: np.ndarray, labels: np.ndarray, classes: int = 3) -> np.ndarray:
    """Return logits that are correct for the images of ``correct``."""
    predicted = np.where(correct, labels, (labels + 1) % classes)
    return np.eye(classes, dtype=np.float32)[predicted]


def budget(n: int, max_drop: float) -> tuple[Budget, np.ndarray]:
    labels = np.arange(n) % 3
    return Budget(CLASSIFICATION, logits_with(np.ones(n, bool), labels), labels, max_drop), labels


@pytest.mark.parametrize(
    ("n", "max_drop", "lost", "holds"),
    [
        (1000, 0.5, 5, True),  # just the budget
        (1000, 0.5, 6, False),
        (100, 0.5, 1, True),  # a point, but one image
        (100, 0.5, 2, True),
        (100, 0.5, 3, False),
        (10_000, 1.0, 100, True),  # significant, and within what was allowed
        (100, 0.0, 2, True),
        (100, 0.0, 3, False),
        (100, 5.0, 5, True),
    ],
)
def test_more_than_the_budget_and_more_than_two_images_are_refused(
    n: int, max_drop: float, lost: int, holds: bool
) -> None:
    judge, labels = budget(n, max_drop)
    correct = np.ones(n, bool)
    correct[:lost] = False
    verdict = judge.judge(logits_with(correct, labels))
    assert verdict.holds is holds
    assert verdict.lost == pytest.approx(100 * lost / n) and verdict.score == pytest.approx(
        100 - 100 * lost / n
    )
    assert verdict.p == pytest.approx(mcnemar(lost, 0))


def test_mcnemar_counts_lost_and_won_images() -> None:
    labels = np.arange(200) % 3
    was_correct = np.arange(200) >= 10
    judge = Budget(CLASSIFICATION, logits_with(was_correct, labels), labels, 0.5)
    correct = was_correct.copy()
    correct[:6], correct[100:107] = True, False  # six won, seven lost
    verdict = judge.judge(logits_with(correct, labels))
    assert verdict.lost == pytest.approx(0.5) and verdict.holds
    assert verdict.p == pytest.approx(mcnemar(7, 6)) == 1.0


def test_sqnr_is_relative_to_the_fp32_logits() -> None:
    judge, labels = budget(30, 0.5)
    logits = logits_with(np.ones(30, bool), labels)
    assert judge.judge(logits).sqnr == float("inf")
    assert judge.judge(logits * 1.1).sqnr == pytest.approx(20, abs=1e-4)


def test_with_several_labels_the_points_are_those_of_map() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 3)) < 0.4).astype(np.float32)
    logits = (labels * 4 - 2 + rng.normal(0, 0.3, labels.shape)).astype(np.float32)
    judge = Budget(MULTI_LABEL, logits, labels, 0.5)
    assert judge.score == pytest.approx(100)
    worse = judge.judge(-logits)
    assert worse.lost > 30 and not worse.holds and worse.p is None
    assert judge.judge(logits * 2).holds
