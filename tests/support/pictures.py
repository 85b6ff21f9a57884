"""Small images and folders of images for tests of the data pipeline."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from questpress.pipeline.data.dataset import Image, ImageSet, Progress, hash_array
from questpress.pipeline.data.sources.folders import read_folder
from questpress.pipeline.data.sources.timm_datasets import read_digits


def pixels(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, seed: int, height: int = 12, width: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(pixels(seed, height, width)).save(path)
    return path


def folder(root: Path, counts: Mapping[str, int], first_seed: int = 0) -> Path:
    """Write ``counts['train/cat']`` different images into each folder."""
    seed = first_seed
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            save(root / name / f"{number}.png", seed)
            seed += 1
    return root


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """Return an image with edges and gradients, as in photos."""
    rng = np.random.default_rng(seed)
    small = PillowImage.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), PillowImage.Resampling.BICUBIC)).copy()


def in_memory(arrays: list[np.ndarray], labels: list[int] | None = None) -> list[Image]:
    return [
        Image(f"{number}", labels[number] if labels else 0, hash_array(array), array)
        for number, array in enumerate(arrays)
    ]


def open_folder(
    path: Path, *, val_fraction: float | None = None, progress: Progress | None = None
) -> ImageSet:
    return read_folder(path, progress=progress).split(val_fraction)


def open_digits(*, val_fraction: float | None = None) -> ImageSet:
    return read_digits().split(val_fraction)
