"""Scores of detections: against pycocotools, by hand, at the edges, and their intervals and tests."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from questpress.export.runtime import Preprocessing
from questpress.pipeline.data.boxes import Box
from questpress.pipeline.data.dataset import Image
from questpress.pipeline.evaluation import average_precision
from questpress.pipeline.stages.quantize import Budget
from questpress.pipeline.tasks import load_task
from questpress.pipeline.tasks.base import Outputs

TASK = load_task("detection")
K, N, M, D = 4, 30, 8, 20
PIXELS = 400.0 * 300


def draw_scene(seed: int, noise: float = 0.03, crowds: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Return random detections [N,D,6], with equal scores, and labels [N,M,7]; every third image is empty."""
    rng = np.random.default_rng(seed)
    logits, labels = np.zeros((N, D, 6), np.float32), np.zeros((N, M, 7), np.float32)
    labels[..., 0] = -1
    for i in range(N):
        rows = []
        for j in range(0 if i % 3 == 0 else rng.integers(1, M + 1)):
            c, corner, sides = rng.integers(K), 0.5 * rng.random(2), 0.05 + 0.45 * rng.random(2)
            box = np.concatenate([corner, corner + sides])
            labels[i, j] = (c, *box, PIXELS * sides.prod(), rng.random() < crowds)
            for _ in range(rng.integers(3)):
                moved = box + noise * rng.normal(size=4)
                rows.append((math.ceil(10 * rng.random()) / 10, c, *moved.clip([0, 0, 0.53, 0.53], 1)))
        for _ in range(rng.integers(4)):
            corner = 0.5 * rng.random(2)
            rows.append((math.ceil(5 * rng.random()) / 10, rng.integers(K), *corner, *(corner + 0.2)))
        rows = sorted(rows, key=lambda row: -row[0])[:D]
        logits[i, : len(rows)] = np.array(rows).reshape(-1, 6)
    return logits, labels


def run_coco(logits: np.ndarray, labels: np.ndarray) -> COCOeval:
    """Return the plain evaluation of pycocotools."""
    truth: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []

    def add(annotations: list[dict[str, Any]], i: int, c: float, box: np.ndarray, **more: float) -> None:
        x1, y1, x2, y2 = box.astype(np.float64).tolist()
        entry = {"id": len(annotations) + 1, "image_id": i, "category_id": int(c)}
        sides = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": PIXELS * (x2 - x1) * (y2 - y1)}
        annotations.append({**entry, **sides, "iscrowd": 0, **more})

    for i in range(len(labels)):
        for row in labels[i][labels[i, :, 0] >= 0]:
            add(truth, i, row[0], row[1:5], iscrowd=int(row[6]))
        for row in logits[i][logits[i, :, 0] > 0]:
            add(detections, i, row[1], row[2:], score=float(row[0]))
    sets = []
    with contextlib.redirect_stdout(io.StringIO()):
        for annotations in (truth, detections):
            coco = COCO()
            images, categories = [{"id": i} for i in range(len(labels))], [{"id": c} for c in range(K)]
            coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
            coco.createIndex()
            sets.append(coco)
        evaluation = COCOeval(*sets, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def make(*images: list[tuple[float, ...]], columns: int) -> np.ndarray:
    """Return rows of images in an array with unused rows."""
    array = np.zeros((len(images), max(1, *map(len, images)), columns), np.float32)
    array[..., 0] = 0 if columns == 6 else -1
    for i, rows in enumerate(images):
        array[i, : len(rows)] = np.array(rows).reshape(-1, columns)
    return array


A, B, C = (0.1, 0.1, 0.3, 0.3), (0.5, 0.5, 0.9, 0.9), (0.1, 0.6, 0.3, 0.8)
CROWD = (0.0, 0.0, 1.0, 0.45)


def truth(c: int, box: tuple[float, ...], crowd: int = 0) -> tuple[float, ...]:
    return (c, *box, PIXELS * (box[2] - box[0]) * (box[3] - box[1]), crowd)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_pycocotools(seed: int) -> None:
    logits, labels = draw_scene(seed)
    evaluation = run_coco(logits, labels)
    expected = 100 * evaluation.stats
    score = TASK.score(logits, labels, "abcd")
    assert score.metric == "AP" and score.n == N and score.correct is None
    assert score.percent == pytest.approx(expected[0], abs=1e-9) and 5 < score.percent < 95
    assert TASK.percent(logits, labels) == pytest.approx(score.percent, abs=1e-9)
    names = ("AP50", "AP75", "AP small", "AP medium", "AP large")
    for name, value in zip(names, expected[1:6], strict=True):
        assert (
            value == -100
            if name not in score.details
            else score.details[name].percent == pytest.approx(value)
        )
    assert {"AP50", "AP75", "AP medium", "AP large"} <= set(score.details)
    assert score.details["AR100"].percent == pytest.approx(expected[8])
    for threshold, iou in ((0, 0.5), (5, 0.75)):
        by_class = evaluation.eval["precision"][threshold, :, :, 0, 2]
        mean = 100 * by_class[:, (by_class >= 0).all(0)].mean(1)
        assert score.precision[f"IoU ≥ {iou:g}"] == pytest.approx(mean, abs=0.006)
    for c, scored in enumerate(score.classes):
        precision = evaluation.eval["precision"][:, :, c, 0, 2]
        assert scored.percent == pytest.approx(100 * precision.mean())
        assert scored.n == sum(((rows[:, 0] == c) & (rows[:, 6] == 0)).any() for rows in labels)


def test_weighted_image_counts_as_often_as_copies_of_it() -> None:
    logits, labels = draw_scene(0)
    logits[..., 0] *= np.linspace(1, 0.99, N * D).reshape(N, D)  # copies of equal scores would be mixed
    weights = np.random.default_rng(1).integers(0, 4, N)
    [matches] = average_precision.match(logits, labels, K)
    copies = np.repeat(np.arange(N), weights)
    [expected] = average_precision.match(logits[copies], labels[copies], K)
    assert matches.curves.average_precision(weights.astype(float)) == pytest.approx(
        expected.curves.average_precision(), nan_ok=True
    )


def test_hit_miss_duplicate_and_crowd_by_hand() -> None:
    labels = make([truth(0, A), truth(0, B), truth(0, C), truth(0, CROWD, crowd=1)], [truth(0, A)], columns=7)
    logits = make(
        # A hit; its duplicate is in the crowd and ignored; B is missed; a false one; C is found last.
        [(0.9, 0, *A), (0.8, 0, *A), (0.7, 0, 0.4, 0.8, 0.45, 0.9), (0.5, 0, *C)],
        [(0.6, 0, *B), (0.4, 0, *A), (0.3, 0, *A)],  # a false one, a hit, and a duplicate
        columns=6,
    )
    # By falling score: hit, false, false, hit, hit, false. Precision 1, 2/4, 3/5 at recall 1/4, 2/4, 3/4:
    # 26 recalls at 1, and 50 at the larger precision that follows, 3/5.
    expected = 100 * (26 + 50 * 3 / 5) / 101
    score = TASK.score(logits, labels, ["cell"])
    assert score.percent == pytest.approx(expected) == pytest.approx(100 * run_coco(logits, labels).stats[0])
    assert score.details["AP50"].percent == pytest.approx(expected)
    assert score.details["AR100"].percent == pytest.approx(75)
    [cell] = TASK.measure_classes(logits, labels, ["cell"])  # scores from 0.5: 2 hits of 4 detections
    assert (cell.n, cell.predicted, cell.correct) == (4, 4, 2)


def test_class_without_boxes_and_images_without_boxes() -> None:
    labels = make([truth(1, A)], [], columns=7)
    logits = make([(0.9, 1, *A)], [(0.8, 0, *B)], columns=6)
    score = TASK.score(logits, labels, "ab")
    assert score.percent == 100  # a false detection of a class without boxes has no average precision
    assert [(c.n, c.percent) for c in score.classes] == [(0, None), (1, 100)]
    false = make([(0.9, 1, *A)], [(0.95, 1, *B)], columns=6)
    assert TASK.percent(false, labels) == pytest.approx(50)  # one in an empty image counts
    nothing, empty = np.zeros((2, 5, 6), np.float32), make([], [], columns=7)
    assert TASK.score(nothing, labels, "ab").percent == 0
    unknown = TASK.score(nothing, empty, "ab")
    assert (unknown.percent, unknown.low, unknown.high) == (0, 0, 100)
    assert TASK.severity(nothing, empty).tolist() == [0, 0]
    assert TASK.percent(nothing, empty) == 0 and TASK.is_near_chance(unknown, empty)


def test_one_class_and_perfect_detections() -> None:
    _, labels = draw_scene(0, crowds=0)
    labels[..., 0] = np.minimum(labels[..., 0], 0)
    logits = np.zeros((N, M, 6), np.float32)
    logits[..., 0], logits[..., 2:] = labels[..., 0] + 1, labels[..., 1:5]
    score = TASK.score(logits, labels, ["cell"])
    assert (score.percent, score.low, score.high) == pytest.approx((100, 100, 100))
    assert TASK.is_correct(logits, labels).all()


def test_interval_covers_the_ap_of_more_images() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(seed, noise=0.06) for seed in range(30)]
    logits, labels = (np.concatenate(part) for part in zip(*scenes, strict=True))
    exact = TASK.percent(logits, labels)
    covered = 0
    for _ in range(20):
        chosen = rng.integers(0, len(labels), 60)
        score = TASK.score(logits[chosen], labels[chosen])
        assert score.low <= score.percent <= score.high
        covered += score.low <= exact <= score.high
        assert score.details["AP50"].low is not None and score.high - score.low > 1
    assert covered >= 16  # of 20 at 95 %: fewer have a probability of 3e-4


def test_paired_bootstrap_finds_a_loss_and_no_loss() -> None:
    logits, labels = draw_scene(0)
    same = TASK.compare(Outputs(logits, labels), Outputs(logits.copy(), labels))
    assert (same.points, same.p, same.first_alone) == (0, 1, None)
    worse = logits.copy()
    worse[..., 2:] += 0.04
    lost = TASK.compare(Outputs(logits, labels), Outputs(worse, labels))
    assert lost.points == pytest.approx(TASK.percent(logits, labels) - TASK.percent(worse, labels))
    assert lost.points > 3 and lost.p < 0.05
    assert TASK.compare(Outputs(worse, labels), Outputs(logits, labels)).p == pytest.approx(lost.p)


def test_budget_is_in_points_of_ap() -> None:
    logits, labels = draw_scene(1)
    budget = Budget(TASK, logits, labels, 0.5)
    same = budget.judge(logits)
    assert same.holds and same.lost == 0 and same.sqnr == math.inf and same.p == 1
    worse = logits.copy()
    worse[..., 2:] += 0.02
    verdict = budget.judge(worse)
    assert verdict.lost == pytest.approx(budget.score - TASK.percent(worse, labels)) and verdict.lost > 0.5
    assert not verdict.holds and 0 < verdict.sqnr < 40
    assert budget.judge(logits * [0.9, 1, 1, 1, 1, 1]).sqnr == pytest.approx(20, abs=1e-4)


def test_correct_images_have_all_boxes_and_no_others() -> None:
    labels = make([truth(0, A), truth(1, B)], [truth(0, A)], [truth(0, A), truth(0, CROWD, 1)], columns=7)
    logits = make(
        [(0.9, 0, *A), (0.8, 1, *B), (0.4, 1, *C)], [(0.9, 1, *A)], [(0.9, 0, *A), (0.8, 0, *A)], columns=6
    )
    assert TASK.severity(logits, labels).tolist() == [0, 1, 0]
    assert TASK.is_correct(logits, labels).tolist() == [True, False, True]
    missed = make([(0.9, 0, *A)], [], [], columns=6)
    assert TASK.severity(missed, labels) == pytest.approx([1 - 2 / 3, 1, 1])
    assert TASK.agreement(Outputs(logits, labels), Outputs(logits, labels)).correct == 3
    assert TASK.agreement(Outputs(logits, labels), Outputs(missed, labels)).correct == 0
    empty = make([(0.9, 0, *A), (0.8, 1, 0.5, 0.2, 0.5, 0.6)], [], [], columns=6)  # clipped to a line
    assert TASK.agreement(Outputs(empty, labels), Outputs(empty, labels)).correct == 2
    first, *_ = TASK.judge(Outputs(logits, labels), ["RBC", "WBC"])
    assert first.label == "1 RBC, 1 WBC" and first.probability == pytest.approx(0.85) and first.is_correct


def test_texts_count_the_objects_of_each_class() -> None:
    labels = make([truth(1, A), truth(0, B), truth(0, C), truth(2, CROWD, 1)], [], columns=7)
    assert TASK.describe(labels, ["RBC", "WBC", "other"]) == ["2 RBC, 1 WBC", "nothing"]


def test_classes_in_another_order_are_renumbered() -> None:
    logits = make([(0.9, 2, *A), (0.8, 0, *B), (0.7, 1, *C)], columns=6)
    assert TASK.reorder(logits, [2, 0, 1])[0, :, 1].tolist() == [0, 1, 2]
    assert logits[0, :, 1].tolist() == [2, 0, 1]


def test_several_detectors_give_the_best_of_overlapping_boxes() -> None:
    first, second = (
        make([(0.9, 0, *A), (0.5, 1, *B)], columns=6),
        make([(0.8, 0, *A), (0.6, 1, *C)], columns=6),
    )
    assert TASK.ensemble([first]) is first
    assert TASK.ensemble([first, second])[0] == pytest.approx(
        np.array([(0.9, 0, *A), (0.6, 1, *C)], np.float32)
    )  # as many rows as before


def test_boxes_follow_the_letterbox_and_the_networks_classes() -> None:
    box = Box(1, 0.0, 0.0, 0.5, 1.0, 5000.0, False)
    image = Image("a.jpg", 1, "a", Path(), (0, 1), boxes=(box, box._replace(label=0)), size=(50, 100))
    form = Preprocessing.create(100, 1.0, crop_mode="border")
    encoded = TASK.encode([image], [-1, 2], 3, form)
    assert encoded.tolist() == [[[2, 0, 0.25, 0.5, 0.75, 5000, 0]]]


def test_picture_shows_true_boxes_green_and_detections_orange() -> None:
    labels, logits = make([truth(0, A)], columns=7)[0], make([(0.9, 0, *B), (0.3, 0, *C)], columns=6)[0]
    drawn = TASK.draw(np.zeros((60, 80, 3), np.uint8), labels, logits, ["x"])
    assert drawn.shape == (288, 384, 3) and drawn.dtype == np.uint8

    def colors(x: float, y: float) -> set[tuple[int, ...]]:
        column, row = round(x * 384), round(y * 288)
        return set(map(tuple, drawn[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3).tolist()))

    assert colors(A[0], 0.28) == colors(A[2], 0.25) == {(0, 0, 0), (0x3C, 0xB4, 0x4B)}
    assert colors(B[0], 0.7) == colors(0.7, B[3]) == {(0, 0, 0), (0xF5, 0x82, 0x31)}
    assert colors(C[0], 0.75) == {(0, 0, 0)}  # a score below 50 %


def test_label_loss_is_the_sum_of_the_detectors_losses() -> None:
    losses, labels = torch.arange(4.0), torch.ones(3)
    assert float(TASK.label_loss(0.0)(losses, labels)) == 6
    assert TASK.guessing_loss(3) == math.inf and TASK.count_correct(losses, labels) is None


def test_manifest_entry_and_calibration() -> None:
    logits, labels = draw_scene(0)
    entry = TASK.manifest_entry(TASK.score(logits, labels))
    assert list(entry) == ["ap", "n", "low", "high", "ap50", "ap75", "ar100"]
    assert TASK.likelihood is None and TASK.measure_calibration(logits, labels) is None
    assert TASK.confusion(logits, labels) is None
