"""Accuracy, its interval and further metrics, loss and decoding of one class per image, by hand."""

import numpy as np
import pytest
import torch
from questpress.pipeline.runs.scores import Proportion, Score
from questpress.pipeline.tasks import load_task
from questpress.pipeline.tasks.base import Outputs

TASK = load_task("classification")


def one_hot(predictions: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predictions]


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: the score interval.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_is_wilsons_as_published(correct: int, n: int, low: float, high: float) -> None:
    proportion = Proportion.from_counts(correct, n)
    assert proportion.percent == pytest.approx(100 * correct / n)
    assert (proportion.low, proportion.high) == pytest.approx((100 * low, 100 * high), abs=0.006)


def test_interval_ends_at_0_and_100() -> None:
    assert Proportion.from_counts(0, 5).low == 0 and Proportion.from_counts(5, 5).high == 100
    assert Proportion.from_counts(5, 5).low < 100


def test_score_counts_the_largest_logit() -> None:
    logits, labels = one_hot([0, 1, 2, 0, 2, 1], 3), np.array([0, 1, 2, 0, 1, 2])
    score = TASK.score(logits, labels)
    assert (score.correct, score.n) == (4, 6) and score.percent == pytest.approx(200 / 3)
    assert TASK.percent(logits, labels) == score.percent
    assert not score.details and not score.classes
    assert TASK.count_correct(torch.tensor(logits), torch.tensor(labels)) == 4


def test_top_5_accuracy_is_reported_above_ten_classes() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 12)), rng.integers(0, 12, 60)
    correct = sum(label in np.argsort(-row)[:5] for row, label in zip(logits, labels, strict=True))
    top5, expected = TASK.score(logits, labels).details["top-5 accuracy"], Proportion.from_counts(correct, 60)
    assert (top5.percent, top5.low, top5.high) == (expected.percent, expected.low, expected.high)
    assert "top-5 accuracy" not in TASK.score(logits[:, :10], labels % 10).details


def test_balanced_accuracy_is_reported_for_uneven_classes() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    score = TASK.score(one_hot([0] * 10, 3), labels)
    # The class without images does not count.
    assert score.percent == 80 and score.details["balanced accuracy"].percent == 50
    assert not TASK.score(one_hot([0] * 5, 2), np.array([0, 0, 0, 1, 1])).details


def test_class_scores_and_confusion_add_up() -> None:
    labels, logits = np.array([0, 0, 1, 2, 2, 2]), one_hot([0, 1, 1, 2, 2, 0], 4)
    classes = TASK.score(logits, labels, "abcd").classes
    assert [(c.label, c.n, c.percent) for c in classes] == [
        ("a", 2, 50), ("b", 1, 100), ("c", 3, pytest.approx(200 / 3)),
    ]  # fmt: skip
    assert TASK.confusion(logits, labels) == [(0, 0, 1), (0, 1, 1), (1, 1, 1), (2, 0, 1), (2, 2, 2)]
    measures = TASK.measure_classes(logits, labels, "abcd")
    assert [(c.n, c.predicted, c.correct) for c in measures] == [(2, 2, 1), (1, 2, 1), (3, 2, 2), (0, 0, 0)]
    assert measures[1].f1 == pytest.approx(200 / 3) and measures[3].f1 is None


def test_agreement_is_the_proportion_of_equal_predictions() -> None:
    labels = np.zeros(4, dtype=int)
    first, second = one_hot([0, 1, 2, 2], 3), 5 * one_hot([0, 1, 1, 2], 3) - 7
    agreement = TASK.agreement(Outputs(first, labels), Outputs(second, labels))
    assert (agreement.correct, agreement.n) == (3, 4)


def test_prediction_is_decoded_with_its_softmax_probability() -> None:
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]], dtype=np.float32)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    [first, second] = TASK.decode(logits, ["a", "b", "c"])
    assert (first[0], second[0]) == ("a", "c")
    assert (first[1], second[1]) == pytest.approx((p[0, 0], p[1, 2]))


def test_label_loss_is_torchs_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    logits, labels = torch.tensor(rng.normal(size=(9, 4))), torch.tensor(rng.integers(0, 4, 9))
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    more = torch.cat([logits, torch.ones(2, 4)])  # of images without labels
    torch.testing.assert_close(TASK.label_loss(0.1)(more, labels), expected.float())


@pytest.mark.parametrize(
    ("percent", "low", "largest", "near"),
    [
        (14.9, 12, 10, True),
        (15.1, 12, 10, False),
        (15.1, 9, 10, True),
        (89, 85, 80, True),
        (91, 85, 80, False),
    ],
)
def test_near_chance_is_below_one_and_a_half_times_the_largest_class(
    percent: float, low: float, largest: int, near: bool
) -> None:
    labels = np.repeat([0, *range(1, 101 - largest)], [largest, *[1] * (100 - largest)])
    assert TASK.chance(labels).percent == largest
    score = Score(metric="accuracy", percent=percent, low=low, high=99, n=100)
    assert TASK.is_near_chance(score, labels) is near


def test_manifest_names_the_metrics_as_the_runtime_documents_them() -> None:
    labels = np.arange(12).repeat(3)
    entry = TASK.manifest_entry(TASK.score(one_hot(labels.tolist(), 12), labels))
    assert list(entry) == ["top1", "n", "low", "high", "correct", "top5"] and entry["top1"] == 100
