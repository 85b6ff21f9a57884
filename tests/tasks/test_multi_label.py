"""Scores, decoding and losses of images with several labels, by hand and against scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from questpress.export.runtime import Preprocessing, sigmoid
from questpress.pipeline import methods
from questpress.pipeline.data.dataset import Image
from questpress.pipeline.data.sources.label_files import read_label_file
from questpress.pipeline.errors import UsageError
from questpress.pipeline.methods.base import Batch, Setup, Shapes
from questpress.pipeline.tasks import load_task, multi_label
from questpress.pipeline.tasks.base import Outputs
from questpress.pipeline.training.distributed import Ranks
from questpress.pipeline.training.metrics import Meter
from sklearn.metrics import average_precision_score, f1_score

TASK = load_task("multi-label")

N, C = 60, 4
RNG = np.random.default_rng(0)
TARGETS = (RNG.random((N, C)) < [0.5, 0.3, 0.1, 0.2]).astype(np.float32)
LOGITS = (3 * TARGETS + 2 * RNG.standard_normal((N, C)) - 2).astype(np.float32).round(1)  # with equal ones


def bce(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0) - z * y


def test_map_is_the_mean_of_scikit_learns_average_precision() -> None:
    expected = 100 * np.mean([average_precision_score(TARGETS[:, c], LOGITS[:, c]) for c in range(C)])
    assert TASK.percent(LOGITS, TARGETS) == pytest.approx(expected, abs=1e-6)


def test_weighted_image_counts_as_often_as_copies_of_it() -> None:
    weights = RNG.integers(0, 4, N).astype(float)
    computed = multi_label.average_precision(multi_label.Ranking(LOGITS, TARGETS), weights)
    copies = np.repeat(np.arange(N), weights.astype(int))
    for c in range(C):
        expected = average_precision_score(TARGETS[copies, c], LOGITS[copies, c])
        assert computed[c] == pytest.approx(expected)


def test_threshold_has_the_best_f1_of_all_there_are() -> None:
    chosen = TASK.choose_thresholds(LOGITS, TARGETS)
    p = sigmoid(LOGITS)
    for c in range(C):
        each = [f1_score(TARGETS[:, c], p[:, c] >= threshold) for threshold in p[:, c]]
        assert f1_score(TARGETS[:, c], p[:, c] >= chosen[c]) == pytest.approx(max(each))
        assert not np.isclose(p[:, c], chosen[c], atol=1e-9).any()  # between two probabilities


def test_thresholds_at_the_ends() -> None:
    targets = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1]], dtype=np.float32)
    logits = np.array([[1, 0, 2], [2, 1, -2], [3, 2, 2]], dtype=np.float32)
    all_shown, none_shown, split = TASK.choose_thresholds(logits, targets)
    assert 0 < all_shown < sigmoid(np.array([1.0]))[0]
    assert none_shown == 0.5
    assert split == pytest.approx(0.5)  # halfway between σ(2) and σ(−2)


def test_highest_of_equal_thresholds_is_chosen() -> None:
    # One of two taken: precision 1, recall ½. Four taken: ½ and 1. Both have F1 2/3.
    targets = np.array([[1], [0], [0], [1]], dtype=np.float32)
    logits = np.array([[2], [1], [0], [-1]], dtype=np.float32)
    assert TASK.choose_thresholds(logits, targets)[0] > sigmoid(np.array([1.0]))[0]


def test_class_without_images_is_excluded_from_map() -> None:
    wider = np.concatenate([TARGETS, np.zeros((N, 1), np.float32)], 1)
    logits = np.concatenate([LOGITS, LOGITS[:, :1]], 1)
    score = TASK.score(logits, wider, "abcde")
    assert score.percent == pytest.approx(TASK.percent(LOGITS, TARGETS))
    assert score.classes[-1].percent is None and score.classes[-1].n == 0


def test_f1_is_that_of_the_labels_at_each_classes_threshold() -> None:
    thresholds = np.array([0.2, 0.5, 0.7, 0.4])
    decided = sigmoid(LOGITS) >= thresholds
    score = TASK.score(LOGITS, TARGETS, "abcd", thresholds)
    assert score.details["micro F1"].percent == pytest.approx(
        100 * f1_score(TARGETS, decided, average="micro")
    )
    assert score.details["macro F1"].percent == pytest.approx(
        100 * f1_score(TARGETS, decided, average="macro")
    )
    for c, by_class in enumerate(score.classes):
        assert by_class.f1 == pytest.approx(100 * f1_score(TARGETS[:, c], decided[:, c]))
        assert by_class.threshold == thresholds[c]
        assert by_class.percent == pytest.approx(100 * average_precision_score(TARGETS[:, c], LOGITS[:, c]))


def test_interval_holds_the_score_and_narrows_with_more_images() -> None:
    single = TASK.score(LOGITS, TARGETS)
    many = TASK.score(np.tile(LOGITS, (16, 1)), np.tile(TARGETS, (16, 1)))
    for score in (single, many):
        assert 0 <= score.low < score.percent < score.high <= 100
    assert many.high - many.low == pytest.approx((single.high - single.low) / 4, rel=0.35)
    perfect = TASK.score(10 * TARGETS - 5, TARGETS)
    assert (perfect.percent, perfect.low, perfect.high) == (100, 100, 100)


def test_many_classes_are_ranked_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TASK.score(LOGITS, TARGETS, "abcd")
    monkeypatch.setattr(multi_label, "CHUNK", 3 * N)
    parts = TASK.score(LOGITS, TARGETS, "abcd")
    assert parts.classes == whole.classes
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_near_chance_uses_class_frequencies() -> None:
    assert TASK.chance(TARGETS).percent == pytest.approx(100 * TARGETS.mean())
    assert TASK.is_near_chance(TASK.score(RNG.standard_normal((N, C)), TARGETS), TARGETS)
    assert not TASK.is_near_chance(TASK.score(LOGITS, TARGETS), TARGETS)


def test_same_labels_agree_and_one_other_label_does_not() -> None:
    ours = np.array([[1, -1], [1, 1], [-1, -1]], dtype=np.float32)
    theirs = np.array([[2, -1], [1, -1], [-1, -1]], dtype=np.float32)
    labels, high = np.array([[1, 0], [1, 0], [0, 0]], dtype=np.float32), np.array([0.8, 0.5])
    assert TASK.agreement(Outputs(ours, labels), Outputs(theirs, labels)).correct == 2
    assert TASK.agreement(Outputs(ours, labels, high), Outputs(theirs, labels, high)).correct == 1
    assert TASK.is_correct(ours, labels).tolist() == [True, False, True]


def test_multi_label_prediction_is_a_set_with_probability() -> None:
    logits = np.array([[2.0, -1.0, 0.5], [-3.0, -3.0, -3.0]], dtype=np.float32)
    p = sigmoid(logits)
    computed = TASK.decode(logits, ["a", "b", "c"])
    assert [text for text, _ in computed] == ["a, c", "no class"]
    assert computed[0][1] == pytest.approx(p[0, 0] * (1 - p[0, 1]) * p[0, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_the_sum_of_each_classes_own(smoothing: float) -> None:
    expected = bce(LOGITS, TARGETS * (1 - smoothing) + smoothing / 2).sum(1).mean()
    loss = TASK.label_loss(smoothing)
    computed = loss(torch.tensor(LOGITS), torch.tensor(TARGETS))
    assert float(computed) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("teachers", [1, 2])
def test_kd_is_the_divergence_of_each_classes_own_probability(teachers: int) -> None:
    tau, weight = 3.0, 0.7
    others = [LOGITS, RNG.standard_normal((N, C)).astype(np.float32)][:teachers]
    student = RNG.standard_normal((N, C)).astype(np.float32)
    settings = {"kd.tau": str(tau), "kd.weight": str(weight)}
    parameters = methods.parse_parameters(["kd"], settings)["kd"]
    shapes = Shapes({}, vector=3, logits=C)
    method = methods.load("kd")(parameters, Setup(shapes, [shapes] * teachers, {}))
    readouts = [{"logits": torch.tensor(other)} for other in others]
    computed = method(Batch({"logits": torch.tensor(student)}, readouts, torch.tensor(TARGETS), 0))["kd"]
    p = np.mean([sigmoid(other / tau) for other in others], axis=0)
    q = sigmoid(student / tau)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert float(computed) == pytest.approx(weight * tau**2 * kl.sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "settings"), [("dkd", {}), ("quest+dist", {}), ("kd", {"kd.standardize": "true"})]
)
def test_methods_for_one_label_are_refused(method: str, settings: dict[str, str]) -> None:
    chosen = methods.parse_parameters(methods.parse_methods(method), settings)
    with pytest.raises(UsageError, match=r"multi-label data.*Use .*quest"):
        methods.check_task(chosen, "multi-label")


def test_training_accuracy_of_several_labels_is_left_open() -> None:
    meter = Meter(torch.device("cpu"), Ranks(), TASK)
    logits = torch.tensor(LOGITS)
    meter.add({"loss": torch.tensor(1.0), "output": logits}, torch.tensor(TARGETS), len(logits))
    assert meter.accuracy() is None and meter.means(0)["loss"] == 1


def test_targets_are_one_for_each_class_of_an_image(tmp_path: Path) -> None:
    from PIL import Image as PillowImage
    from questpress.pipeline.data.decode import ReadableImages

    rows = ["file,labels"]
    for n in range(12):
        PillowImage.new("RGB", (8, 8), (20 * n, 0, 0)).save(tmp_path / f"{n}.png")
        rows.append(f"{n}.png,{'a;c' if n % 2 else 'b'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = read_label_file(tmp_path / "labels.csv").split()
    images = (*data.train, *data.val, *data.test)
    computed = ReadableImages(images, (), lambda height, width: (0, 0, height, width)).targets(data)
    assert computed.dtype == torch.float32
    for image, row in zip(images, computed.tolist(), strict=True):
        assert row == ([1, 0, 1] if int(image.name[:-4]) % 2 else [0, 1, 0])


def test_manifest_entry_has_the_metrics_of_the_runtime() -> None:
    entry = TASK.manifest_entry(TASK.score(LOGITS, TARGETS))
    assert list(entry) == ["map", "n", "low", "high", "micro_f1", "macro_f1"]


def test_images_with_unknown_labels_are_kept() -> None:
    images = [Image.with_labels("a", [0, 1, 2], "a", Path()), Image.with_labels("b", [], "b", Path())]
    encoded = TASK.encode(images, [2, -1, 0], 3, Preprocessing.create(8))
    assert encoded.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert TASK.drop_unknown(images, {1}) == tuple(images)
