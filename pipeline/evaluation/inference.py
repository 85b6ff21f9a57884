"""Logits of rendered images: of a network in torch, and of an ONNX file in ONNX Runtime."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...export.runtime import Classifier, open_session
from ..runs.console import Stage
from ..runs.device import Engine

BATCH = 128
ONNX_BATCH = 32

Progress = Callable[[int, int], None]
"""Called with the number of images done and of all images."""


def batches(pixels: Tensor, device: str, size: int = BATCH) -> Iterator[tuple[int, Tensor]]:
    """Yield rendered images uint8 [N,S,S,3] as (index of the first, uint8 [B,3,S,S] on the device)."""
    for start in range(0, len(pixels), size):
        yield start, pixels[start : start + size].to(device).permute(0, 3, 1, 2)


@torch.no_grad()
def compute_logits(
    network: nn.Module, normalize: nn.Module, pixels: Tensor, engine: Engine, progress: Progress | None = None
) -> Tensor:
    """Return the network's logits in eval mode, fp32 [N,classes] on the host, for images uint8 [N,S,S,3]."""
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


def compute_onnx_logits(file: Path, images: np.ndarray, progress: Stage, *, fuse: bool = True) -> np.ndarray:
    """Return an ONNX file's logits [n,classes] for rendered images, uint8 [n,S,S,3], n > 0.

    ``fuse`` is that of ``runtime.open_session``.
    """
    classifier = Classifier(file.read_bytes(), file.name)
    if not fuse:
        classifier.session = open_session(file, classifier.threads, fuse=False)
    logits = []
    for start in range(0, len(images), ONNX_BATCH):
        batch = images[start : start + ONNX_BATCH]
        logits.append(classifier.logits(classifier.to_input(batch)))
        progress.update(f"evaluating {file.name}", start + len(batch), len(images), "images")
    return np.concatenate(logits)
