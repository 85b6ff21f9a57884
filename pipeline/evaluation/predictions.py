"""Logits of rendered images, in torch and in ONNX Runtime; the classes confused most; example images."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...export.runtime import open_model, open_session
from ..data.dataset import Image
from ..data.decode import encode_thumbnail
from ..runs.console import StageProgress
from ..runs.device import Engine
from ..runs.results import Example
from ..runs.scores import Confusion, Prediction
from .results import Confused

BATCH = 128
ONNX_BATCH = 32
EXAMPLES = 12

Progress = Callable[[int, int], None]
"""Called with the number of images done and of all images."""


def batches(pixels: Tensor, device: str, size: int = BATCH) -> Iterator[tuple[int, Tensor]]:
    """Yield rendered images uint8 [N,H,W,3] as (index of the first, uint8 [B,3,H,W] on the device)."""
    for start in range(0, len(pixels), size):
        yield start, pixels[start : start + size].to(device).permute(0, 3, 1, 2)


@torch.no_grad()
def compute_logits(
    network: nn.Module, normalize: nn.Module, pixels: Tensor, engine: Engine, progress: Progress | None = None
) -> Tensor:
    """Return the network's logits in eval mode, fp32 [N,classes] on the host, for images uint8 [N,H,W,3]."""
    was_training = network.training
    network.eval()
    logits = []
    for start, batch in batches(pixels, engine.device):
        with engine.autocast():
            logits.append(network(normalize(batch)).float().cpu())
        if progress is not None:
            progress(start + len(batch), len(pixels))
    network.train(was_training)
    return torch.cat(logits) if logits else torch.empty(0)


def compute_onnx_logits(
    file: Path, images: np.ndarray, progress: StageProgress, *, fuse: bool = True
) -> np.ndarray:
    """Return an ONNX file's logits [n,classes] for rendered images, uint8 [n,H,W,3], n > 0.

    Of a detector's file, these are its decoded detections, ``runtime.Detector.detections``.

    ``fuse`` is that of ``runtime.open_session``.
    """
    model = open_model(file)
    if not fuse:
        model.session = open_session(file, model.threads, fuse=False)
    logits = []
    for start in range(0, len(images), ONNX_BATCH):
        batch = images[start : start + ONNX_BATCH]
        logits.append(model.infer(model.to_input(batch)))
        progress.update(f"evaluating {file.name}", start + len(batch), len(images), "images")
    return np.concatenate(logits)


def most_confused(confusion: Confusion, classes: Sequence[str]) -> list[Confused]:
    """Return the mistakes in ``confusion``, the most frequent first."""
    images: Counter[int] = Counter()
    for label, _, n in confusion:
        images[label] += n
    mistakes = [entry for entry in confusion if entry[0] != entry[1]]
    return [
        Confused(label=classes[i], predicted=classes[k], n=n, percent=100 * n / images[i])
        for i, k, n in sorted(mistakes, key=lambda entry: (-entry[2], *entry[:2]))
    ]


def make_example(
    image: Image,
    label: str,
    student: Prediction,
    teacher: Prediction | None,
    pixels: np.ndarray | None,
    side: int,
) -> Example:
    """Return an image with its predictions; ``pixels`` uint8 [H,W,3], None if they cannot be read.

    ``side`` is the largest length of a side as shown, in pixels.
    """
    return Example(
        name=image.name,
        label=label,
        teacher=None if teacher is None else teacher.label,
        teacher_probability=None if teacher is None else teacher.probability,
        teacher_correct=None if teacher is None else teacher.is_correct,
        student=student.label,
        student_probability=student.probability,
        student_correct=student.is_correct,
        png="" if pixels is None else encode_thumbnail(pixels, min(side, max(pixels.shape[:2]))),
    )


def choose_examples(predictions: Sequence[Prediction]) -> list[int]:
    """Return images to show: the worst mistakes, then images spread over all, the least certain first."""
    mistakes = [i for i, prediction in enumerate(predictions) if not prediction.is_correct]
    mistakes = sorted(mistakes, key=lambda i: -predictions[i].severity)[: EXAMPLES // 2]
    spread = np.linspace(0, len(predictions) - 1, min(EXAMPLES, len(predictions))).astype(int)
    chosen = list(dict.fromkeys([*mistakes, *spread.tolist()]))[:EXAMPLES]
    return sorted(chosen, key=lambda i: (-predictions[i].severity, predictions[i].probability))
