"""The proof that an exported file answers as its network does."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import runtime
from .errors import ExportError
from .uint8_front import INPUT


@dataclass(frozen=True)
class Parity:
    """How far the file's logits are from the network's: the largest difference over all images and batch
    sizes.

    `max_rel` is that difference over the spread (largest minus smallest) of the network's logits.
    """

    max_abs: float
    max_rel: float
    n: int
    batch_sizes: tuple[int, ...]


def check_parity(
    network: nn.Module,
    onnx_path: str | Path,
    images: torch.Tensor,
    *,
    pixels: np.ndarray | None = None,
    batch_sizes: Sequence[int] = (1, 5),
    tolerance: float = 1e-4,
) -> Parity:
    """Compare the file in onnxruntime with the network in torch on `images`, float32 [N, 3, S, S],
    preprocessed; of a file that takes pixels, `pixels` are the same images, uint8 [N, S, S, 3].

    Passes where the largest difference is within `tolerance`, absolute or relative to the logits' spread; an
    image must get the same answer at every batch size, too. Raises ExportError, saying by how much, and where
    logits aren't finite. The network computes in float32 on the CPU, as a copy.
    """
    if not len(images):
        raise ExportError("there are no images to compare the exported file with the network on")
    network = getattr(network, "_orig_mod", network)
    twin = copy.deepcopy(network).cpu().float().eval()
    images = images.detach().cpu().float()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = torch.cat([twin(chunk) for chunk in images.split(max(batch_sizes))]).numpy()
    # External weights are found beside the file, so it is opened by its path.
    session = runtime.session(Path(onnx_path), runtime.default_threads())
    if (session.get_inputs()[0].type == "tensor(uint8)") != (pixels is not None):
        raise ExportError(f"{onnx_path} takes pixels, and is compared on them, or neither")
    fed = images.numpy() if pixels is None else pixels
    answers = [
        np.concatenate([session.run(None, {INPUT: chunk})[0] for chunk in _chunks(fed, size)])
        for size in batch_sizes
    ]
    if any(answer.shape != expected.shape for answer in answers):
        raise ExportError(
            f"{onnx_path} gives logits of shape {answers[0].shape}, the network {expected.shape}"
        )
    if not all(np.isfinite(logits).all() for logits in (expected, *answers)):
        raise ExportError(f"the logits of the network or of {onnx_path} are not all finite numbers")
    spread = float(expected.max() - expected.min())
    max_abs = max(float(np.abs(answer - expected).max()) for answer in answers)
    between = max(float(np.abs(answer - answers[0]).max()) for answer in answers)

    def relative(difference: float) -> float:
        return difference / spread if spread > 0 else (0.0 if difference == 0 else float("inf"))

    parity = Parity(max_abs, relative(max_abs), len(images), tuple(batch_sizes))
    if min(parity.max_abs, parity.max_rel) > tolerance:
        raise ExportError(
            f"{onnx_path} does not compute what the network does: on {parity.n} images its logits differ by "
            f"up to {parity.max_abs:.2g} ({parity.max_rel:.2g} of their spread), {tolerance:g} is allowed"
        )
    if min(between, relative(between)) > tolerance:
        raise ExportError(
            f"{onnx_path} answers differently at batch sizes {', '.join(map(str, batch_sizes))}: by up to "
            f"{between:.2g}, {tolerance:g} is allowed"
        )
    return parity


def _chunks(images: np.ndarray, size: int) -> list[np.ndarray]:
    return [images[start : start + size] for start in range(0, len(images), size)]
