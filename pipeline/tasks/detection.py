"""Object detection: the detector's own losses, COCO's average precision, a paired bootstrap over images.

Labels are float32 [n,M,7], rows (class, x1, y1, x2, y2, area, crowd), class −1 in unused rows. Logits are
decoded detections, float32 [n,D,6], rows (score, class, x1, y1, x2, y2) by falling score, score 0 in unused
rows. Boxes are fractions of the image as the network receives it, areas pixels of the original image.
"""

import math
from collections.abc import Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from PIL import Image as PillowImage
from torchvision.ops import batched_nms, box_iou

from ...export.predict_cli import draw_boxes
from ...export.runtime import Preprocessing
from ..data.boxes import place_boxes, shown_window
from ..data.dataset import Image
from ..evaluation import average_precision as ap
from ..evaluation.comparison import bootstrap_interval
from ..runs.scores import ClassScore, Measure, Score
from .base import Chance, Difference, LabelLoss, Names, Outputs, PairedTest, Task, Thresholds

NOTHING = "nothing"
MIN_SCORE, MIN_IOU = 0.5, 0.5
"""The score from which a detection is predicted, and the IoU from which it is that of a box."""
AP50, AP75, AR100 = "AP50", "AP75", "AR100"
SHOWN_IOUS = (0.5, 0.75)
"""Of the precision-recall curves."""
SIZES = {f"AP {name}": areas for name, areas in ap.SIZES.items()}
LABEL_COLOR, PREDICTION_COLOR = 1, 3
"""Of true boxes and of detections, as ``draw_boxes`` numbers colors: green and orange."""


def sum_losses(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """Return the sum of a detector's losses, which it has computed from the labels."""
    return losses.sum()


class Detection(Task):
    """Labels are boxes with classes."""

    name = "detection"
    metric = class_metric = "AP"
    manifest_key = "ap"
    likelihood = None
    loss_read = "losses"
    # The gradient ratios that balancing aims at were measured on classifiers.
    default_balance = "off"
    unsupported = MappingProxyType(
        {
            "calibrate": "its scores have no temperature",
            "qat": "it trains networks of one output, and detectors have two",
            "label_smoothing": "the losses of detectors have none",
            "randaugment": "it moves objects without their boxes",
            "erasing": "it hides objects that keep their boxes",
            "mixup": "the boxes of two images would be needed",
            "cutmix": "it hides objects that keep their boxes",
            "formats": "the files are compared by logits, and detectors have boxes too",
        }
    )
    needs_label_loss = "no method trains the boxes"
    has_boxes = True
    labels_note = " of objects"
    prediction_note = (
        f"A prediction is the detections with a score of {100 * MIN_SCORE:.0f} % or more, its probability "
        "their mean score. It is correct if these are the objects of the image, each with an IoU of "
        f"{MIN_IOU} or more."
    )
    picture_note = "True boxes are green, with the class of missed ones; detections are orange."
    errors_order = "the lowest F1 of an image first"
    counted = "objects"
    test_name = "paired bootstrap over images"
    example_side = 384
    pipeline_tag = "object-detection"
    model_kind = "Object detector"
    usage = """\
from predict import Detector

detector = Detector.load(".")
for detection in detector.detect(["photo.jpg"])[0]:
    print(detection.label, detection.score, detection.box)"""
    camera_usage = """\
import cv2
from predict import Detector

detector = Detector.load(".")
_, frame = cv2.VideoCapture(0).read()
[detections] = detector.detect(frame[:, :, ::-1])
print(detections)"""

    def label_loss(self, smoothing: float) -> LabelLoss:
        return sum_losses

    def guessing_loss(self, classes: int) -> float:
        return math.inf

    def encode(
        self, images: Sequence[Image], numbers: Sequence[int], classes: int, preprocessing: Preprocessing
    ) -> ndarray:
        boxes = [
            [box._replace(label=numbers[box.label]) for box in image.boxes or () if numbers[box.label] >= 0]
            for image in images
        ]
        sizes = [image.size or (1, 1) for image in images]
        return place_boxes(boxes, sizes, partial(shown_window, p=preprocessing)).numpy()

    def predict(self, logits: ndarray, thresholds: Thresholds = None) -> ndarray:
        predicted = np.zeros((*logits.shape[:2], 7), dtype=np.float32)
        predicted[..., 0] = np.where(logits[..., 0] >= MIN_SCORE, logits[..., 1], -1)
        predicted[..., 1:5] = logits[..., 2:]
        predicted[..., 5] = np.prod(logits[..., 4:] - logits[..., 2:4], axis=-1)
        return predicted

    def confidence(self, logits: ndarray, thresholds: Thresholds = None) -> ndarray:
        scores = np.where(logits[..., 0] >= MIN_SCORE, logits[..., 0], 0.0)
        return np.asarray(scores.sum(1) / np.maximum((scores > 0).sum(1), 1))

    def describe(self, labels: ndarray, classes: Names) -> list[str]:
        texts = []
        for rows in labels:
            counts = np.bincount(rows[(rows[:, 0] >= 0) & (rows[:, 6] == 0), 0].astype(int))
            texts.append(", ".join(f"{n} {classes[c]}" for c, n in enumerate(counts) if n) or NOTHING)
        return texts

    def reorder(self, logits: ndarray, classes: Sequence[int]) -> ndarray:
        numbers = np.argsort(classes)
        reordered = logits.copy()
        reordered[..., 1] = numbers[logits[..., 1].astype(int)]
        return reordered

    def ensemble(self, logits: Sequence[ndarray]) -> ndarray:
        """Return the best detections of several networks that no better one of their class overlaps."""
        if len(logits) == 1:
            return logits[0]
        merged = np.zeros_like(logits[0])
        for row, rows in zip(merged, np.concatenate(logits, axis=1), strict=True):
            boxes = torch.from_numpy(rows[rows[:, 0] > 0])
            kept = batched_nms(boxes[:, 2:], boxes[:, 0], boxes[:, 1], MIN_IOU)[: len(row)]
            row[: len(kept)] = boxes[kept].numpy()
        return merged

    def draw(self, pixels: ndarray, labels: ndarray, logits: ndarray, classes: Names) -> ndarray:
        picture = PillowImage.fromarray(np.ascontiguousarray(pixels))
        width, height = (round(side * self.example_side / max(picture.size)) for side in picture.size)
        enlarged = np.asarray(picture.resize((width, height), PillowImage.Resampling.LANCZOS))
        sides = np.array([width, height, width, height])
        true, predicted = labels[labels[:, 0] >= 0], logits[logits[:, 0] >= MIN_SCORE]
        iou = box_iou(torch.from_numpy(true[:, 1:5]), torch.from_numpy(predicted[:, 2:])).numpy()
        missed = (iou * (true[:, :1] == predicted[:, 1])).max(1, initial=0) < MIN_IOU
        # The name of a found object is that of its detection.
        names = [
            classes[int(row[0])] if is_missed else "" for row, is_missed in zip(true, missed, strict=True)
        ]
        shown = [(LABEL_COLOR, name, row[1:5]) for name, row in zip(names, true, strict=True)]
        shown += [
            (PREDICTION_COLOR, f"{classes[int(row[1])]} {100 * row[0]:.0f} %", row[2:]) for row in predicted
        ]
        boxes = [(color, text, tuple((box * sides).tolist())) for color, text, box in shown]
        return np.asarray(draw_boxes(enlarged, boxes))

    # Scores.

    def percent(self, logits: ndarray, labels: ndarray) -> float:
        [matches] = ap.match(logits, labels, count_numbers(logits, labels))
        return _finite(ap.mean_of_classes(matches.curves.average_precision()).mean())

    def score(
        self, logits: ndarray, labels: ndarray, classes: Names = (), thresholds: Thresholds = None
    ) -> Score:
        """Return AP; 0 with an interval of 0 to 100 if the images show no object."""
        number = max(len(classes), count_numbers(logits, labels))
        matches, *by_size = ap.match(logits, labels, number, areas=(ap.ALL, *SIZES.values()))
        by_class = 100 * matches.curves.average_precision()
        drawn = ap.resample(matches)[..., 0]
        drawn = drawn[np.isfinite(drawn).all(1)]
        values = ap.mean_of_classes(by_class / 100)
        overall, *others = (
            _measure(values[part], drawn[:, part]) for part in (slice(None), slice(0, 1), slice(5, 6))
        )
        details = {
            name: Measure(percent=percent, low=low, high=high)
            for name, (percent, low, high) in zip((AP50, AP75), others, strict=True)
        }
        for name, part in zip(SIZES, by_size, strict=True):
            percent = ap.mean_of_classes(part.curves.average_precision()).mean()
            if np.isfinite(percent):
                details[name] = Measure(percent=percent)
        details[AR100] = Measure(percent=_finite(ap.mean_of_classes(matches.curves.recall()).mean()))
        precision = ap.mean_of_classes(matches.curves.precision())
        counts = matches.count_images()
        means = np.where(counts > 0, np.nan_to_num(by_class).mean(0), np.nan)
        return Score(
            metric=self.metric,
            percent=overall[0],
            low=overall[1],
            high=overall[2],
            n=len(labels),
            details=details,
            classes=[
                ClassScore(label=name, n=n, percent=mean if n else None)
                for name, n, mean in zip(classes, counts.tolist(), means.tolist(), strict=False)
            ],
            precision={
                f"IoU ≥ {iou:g}": np.nan_to_num(values).round(2).tolist()
                for iou, values in zip(ap.IOUS, precision, strict=True)
                if iou in SHOWN_IOUS
            },
        )

    def manifest_entry(self, score: Score) -> dict[str, Any]:
        details = {"ap50": AP50, "ap75": AP75, "ar100": AR100}
        return {
            self.manifest_key: score.percent,
            "n": score.n,
            "low": score.low,
            "high": score.high,
            **{key: score.details[name].percent for key, name in details.items()},
        }

    def count_classes(
        self, logits: ndarray, labels: ndarray, classes: int, thresholds: Thresholds = None
    ) -> tuple[ndarray, ...]:
        """Return the number of objects of each class, of predicted ones, and of those that are both."""
        matches = self._match_predicted(logits, labels, classes)
        hits, ignored = matches.is_hit[0] & ~matches.is_ignored[0], matches.is_ignored[0]
        predicted, correct = (
            np.bincount(matches.label[rows], minlength=classes) for rows in (~ignored, hits)
        )
        return matches.count_boxes(), predicted, correct

    def chance(self, labels: ndarray) -> Chance:
        return Chance(0.0, "that of no detection")

    # Comparison of networks.

    def is_correct(self, logits: ndarray, labels: ndarray, thresholds: Thresholds = None) -> ndarray:
        return np.asarray(self.severity(logits, labels) == 0)

    def severity(self, logits: ndarray, labels: ndarray, thresholds: Thresholds = None) -> ndarray:
        """Return 1 − F1 of the objects of each image."""
        matches = self._match_predicted(logits, labels, count_numbers(logits, labels))
        hits, ignored = matches.is_hit[0] & ~matches.is_ignored[0], matches.is_ignored[0]
        correct, predicted, shown = (
            np.bincount(images, minlength=len(labels))
            for images in (matches.image[hits], matches.image[~ignored], matches.box_image)
        )
        total = predicted + shown
        return np.asarray(np.where(total > 0, (total - 2 * correct) / np.maximum(total, 1), 0.0))

    def _match_predicted(self, logits: ndarray, labels: ndarray, classes: int) -> ap.Matches:
        predicted = np.where(logits[..., :1] >= MIN_SCORE, logits, 0.0)
        [matches] = ap.match(predicted, labels, classes, ious=np.array([MIN_IOU]))
        return matches

    def compare(self, first: Outputs, second: Outputs) -> Difference:
        """Compare the AP of two networks on the same images by the paired bootstrap."""
        matches = [
            ap.match(o.logits, o.labels, count_numbers(o.logits, o.labels))[0] for o in (first, second)
        ]
        return Difference(*ap.compare(*matches))

    def fidelity(self, fp32: ndarray, int8: ndarray) -> float:
        """Return the signal-to-noise ratio of the scores of the fp32 detections in decibels.

        The int8 score of a detection is that of the detection of its class with the highest IoU, times this
        IoU; 0 if none overlaps.
        """
        noise = power = 0.0
        for a, b in zip(torch.from_numpy(fp32), torch.from_numpy(int8), strict=True):
            iou = box_iou(a[:, 2:], b[:, 2:]).nan_to_num() * (a[:, None, 1] == b[None, :, 1])
            best, place = iou.max(1)
            power += float(a[:, 0].double().square().sum())
            noise += float((a[:, 0] - best * b[place, 0]).double().square().sum())
        return 10 * math.log10(power / noise) if noise and power else math.inf

    def paired_test(self, fp32: ndarray, int8: ndarray, labels: ndarray) -> PairedTest:
        # AP changes by less than an image's points, so a loss beyond the budget is not excused.
        test = self.compare(Outputs(fp32, labels), Outputs(int8, labels))
        return PairedTest(test.p, may_be_chance=False)


def count_numbers(logits: ndarray, labels: ndarray) -> int:
    """Return the number of classes up to the largest in detections and labels, at least 1."""
    return int(max(logits[..., 1].max(initial=0), labels[..., 0].max(initial=0))) + 1


def _finite(percent: float) -> float:
    return float(percent) if math.isfinite(percent) else 0.0


def _measure(values: ndarray, drawn: ndarray) -> tuple[float, float, float]:
    """Return the mean over thresholds, percent [T], and its interval by the resamples, [R,T]."""
    percent = float(values.mean())
    if not math.isfinite(percent):
        return 0.0, 0.0, 100.0
    return percent, *bootstrap_interval(drawn.mean(1), percent)
