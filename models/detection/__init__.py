"""Detectors: a timm backbone, a feature pyramid, and heads, losses and decoding of torchvision."""

from typing import Any

from .network import DenseDetector
from .pyramid import PyramidDetector, create_backbone
from .two_stage import TwoStageDetector

KINDS: dict[str, type[DenseDetector | TwoStageDetector]] = {
    "fasterrcnn": TwoStageDetector,
    "retinanet": DenseDetector,
    "ssdlite": DenseDetector,
}


def build_detector(
    kind: str, backbone: str, num_classes: int, image_size: tuple[int, int], **options: Any
) -> PyramidDetector:
    """Build a detector of a kind on timm's network of a resolved name; `options` are those of timm."""
    return KINDS[kind](kind, create_backbone(backbone, **options), num_classes, image_size)
